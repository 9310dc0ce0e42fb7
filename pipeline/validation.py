"""Judging a network while it is trained: per case, in native pixels, as a night would.

The predictor is the one that `reseg segment` uses, given the network in memory.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from pipeline.cases import PredictedCase, native_maps
from pipeline.dataset import IndexedCase, IndexJob, ReadyCase
from pipeline.errors import BadImage
from pipeline.inference import Prediction, Predictor, PreparedCase
from pipeline.loading import CaseReader
from pipeline.metrics.overlap import overlap
from pipeline.report import draw_overlay
from pipeline.transforms import Recipe
from pipeline.transforms.postprocess import Threshold

T = TypeVar("T")

THRESHOLDS = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))
"""The thresholds that calibration tries."""

Row = dict[str, Any]
Reader = CaseReader[ReadyCase | None]


def validation_reader(
    job: IndexJob,
    cases: Sequence[IndexedCase],
    *,
    limit_bytes: int,
    threads: int,
    keep_pixels: bool = False,
) -> Reader:
    """Prepared cases with their references; native pixels only where a picture is wanted."""

    def convert(ready: ReadyCase) -> tuple[ReadyCase | None, int]:
        if not keep_pixels:
            ready.decoded.volume_ZHWC = None
        size = sum(item.nbytes for item in ready.decoded.references if item is not None)
        return ready, size + int(ready.ready_ZHWC.nbytes)

    return CaseReader(
        job,
        cases,
        limit_bytes=limit_bytes,
        threads=threads,
        convert=convert,
        fallback=lambda case: None,
    )


def decided_cases(
    reader: Reader,
    count: int,
    predictor: Predictor,
    decide: Callable[[PreparedCase], T],
) -> Iterator[tuple[ReadyCase, T]]:
    """Each case of a reader with what `decide` makes of its logits; what cannot be read is left out."""
    waiting: deque[ReadyCase] = deque()

    def prepared() -> Iterator[PreparedCase]:
        for ready in in_order(reader, count):
            if ready is not None:
                waiting.append(ready)
                images = torch.from_numpy(ready.ready_ZHWC).to(predictor.device)
                yield PreparedCase(images, ready.trace, ready.native_ZHW)

    for decision in predictor.decide_each(prepared(), decide):
        assert not isinstance(decision, BadImage)
        yield waiting.popleft(), decision


def in_order(reader: Reader, count: int) -> Iterator[ReadyCase | None]:
    """All cases of a reader, the next ones decoded ahead; None for one that cannot be read."""
    for number in range(count):
        needed = range(number, min(number + 3, count))
        for coming in needed:
            reader.request(coming)
        yield reader.get(number)
        reader.make_room(set(needed))


def native_masks(ready: ReadyCase, prediction: Prediction, recipe: Recipe) -> Any:
    """The predicted labels ZHW in the case's own pixels, shapes applied."""
    case = PredictedCase(
        decoded=ready.decoded, labels_ZHW=prediction.labels_ZHW, trace=prediction.trace
    )
    return native_maps(case, recipe)[0]


def score_case(
    ready: ReadyCase, prediction: Prediction, recipe: Recipe, labels: Sequence[str]
) -> list[Row]:
    """A row a label: counts and Dice over all labelled slices of a case, in native pixels."""
    references = ready.decoded.references
    known = [z for z, item in enumerate(references) if item is not None]
    mask = native_masks(ready, prediction, recipe)[known]
    reference = np.stack([item for item in references if item is not None])
    rows = []
    for number, name in enumerate(labels, start=1):
        scores = overlap(mask == number, reference == number, ())
        row = {"case_id": ready.decoded.case_id, "label": number, "label_name": name}
        rows.append(row | {key: scores[key] for key in ("tp", "fp", "fn", "dice")})
    return rows


def mean_dice(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean of the scores that exist; None if none does."""
    scores = [row["dice"] for row in rows if row["dice"] is not None]
    return float(np.mean(scores)) if scores else None


def recipes_by_threshold(recipe: Recipe) -> dict[float, Recipe]:
    """The recipe with each threshold to try; empty if it decides by argmax."""
    steps = recipe.postprocess
    if not any(isinstance(step, Threshold) for step in steps):
        return {}
    return {
        at: replace(
            recipe,
            postprocess=tuple(
                replace(step, at=at) if isinstance(step, Threshold) else step for step in steps
            ),
        )
        for at in THRESHOLDS
    }


def draw_case(ready: ReadyCase, prediction: Prediction, recipe: Recipe, dice: float) -> Image.Image:
    """The slice of a case with most wrong pixels, with both outlines."""
    masks_ZHW = native_masks(ready, prediction, recipe)
    wrong = [
        -1 if reference_HW is None else int((mask_HW != reference_HW).sum())
        for mask_HW, reference_HW in zip(masks_ZHW, ready.decoded.references, strict=True)
    ]
    z = int(np.argmax(wrong))
    assert ready.decoded.volume_ZHWC is not None
    name = f"{ready.decoded.case_id}/{ready.decoded.usable[z].name}"
    return draw_overlay(
        ready.decoded.volume_ZHWC[z],
        masks_ZHW[z],
        ready.decoded.references[z],
        f"{name}  Dice of the case {dice:.3f}",
        360,
    )
