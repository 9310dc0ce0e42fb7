"""Published masks against the same masks computed anew: the same bits, or which not and why."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline import tables
from pipeline.bundle import Bundle
from pipeline.cases import decode_case, finish_case
from pipeline.config import InferenceConfig, decode
from pipeline.formats import FORMATS, Source
from pipeline.inference import Predictor, predict_cases
from pipeline.lookup import open_night_source, read_encoded
from pipeline.records import Shard
from pipeline.results import Night
from pipeline.sandbox import Sandbox

_COLUMNS = ["image_id", "case_id", "slice_name", "status", "mask_sha256", "case_digest", "numerics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """One image. outcome: equal, different, or gone (its case is no longer what was segmented)."""

    image_id: str
    outcome: Literal["equal", "different", "gone"]
    note: str = ""

    def to_plain(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def recompute_sample(
    night: Night,
    bundle: Bundle,
    sample: int,
    *,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> list[Recomputed]:
    """Compute some images of a night again, from the source and the bundle, and compare the masks.

    Whole cases are computed, as they were; of each up to `sample` images are compared. bundle: the
    one of the night (its digest is not checked here).
    """
    chosen = _choose(night, sample, seed)
    source = open_night_source(night)
    shards = {shard.shard_id: shard for shard in FORMATS[source.format].list_shards(source).shards}
    inference = decode(InferenceConfig, night.metadata["config"]["inference"])
    predictor = Predictor(bundle, inference, device)
    limits, found, done = source.limits, list[Recomputed](), 0
    with Sandbox(
        max_pixels=limits.max_pixels,
        timeout_s=limits.decode_timeout_s,
        memory_bytes=limits.decode_memory_bytes,
    ) as sandbox:
        for (shard_id, case_id), rows in chosen.items():
            shard = shards.get(shard_id)
            masks = (
                None
                if shard is None
                else _masks_of(source, shard, case_id, rows[0]["case_digest"], sandbox, predictor)
            )
            found += [_judge(row, masks, predictor.numerics) for row in rows]
            done += len(rows)
            progress(done, sum(map(len, chosen.values())), "recomputing")
    return found


def _choose(night: Night, sample: int, seed: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of `masks` by (shard, case): images drawn at random from shards drawn at random."""
    draw = random.Random(seed)
    chosen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    left = sample
    shards = [shard for shard in night.shards.values() if shard.parts.masks]
    draw.shuffle(shards)
    share = max(1, sample // max(1, len(shards)))
    for last_round in (False, True):
        for shard in shards:
            if left <= 0:
                return chosen
            assert shard.parts.masks is not None
            rows = tables.read_part(night.results, "masks", shard.parts.masks, _COLUMNS).to_pylist()
            known = {
                r["image_id"] for k, item in chosen.items() if k[0] == shard.shard_id for r in item
            }
            rows = [row for row in rows if row["image_id"] not in known]
            for row in draw.sample(rows, min(len(rows), left, left if last_round else share)):
                chosen.setdefault((shard.shard_id, row["case_id"]), []).append(row)
                left -= 1
    return chosen


def _masks_of(
    source: Source,
    shard: Shard,
    case_id: str,
    case_digest: str,
    sandbox: Sandbox,
    predictor: Predictor,
) -> dict[str, str | None] | None:
    """Digest of each mask of a case computed anew; None if its bytes are others by now."""
    encoded = read_encoded(source, shard, case_id)
    if encoded is None or encoded.digest() != case_digest:
        return None
    bundle = predictor.bundle
    max_pixels = source.limits.max_case_pixels
    decoded = decode_case(
        encoded, sandbox, source.config, len(bundle.labels), max_pixels=max_pixels
    )
    (predicted,) = predict_cases([decoded], predictor)
    rows = finish_case(predicted, bundle.recipe, bundle.labels).masks
    return {row["image_id"]: row["mask_sha256"] for row in rows}


def _judge(row: dict[str, Any], masks: dict[str, str | None] | None, numerics: str) -> Recomputed:
    image_id = row["image_id"]
    if masks is None or image_id not in masks:
        note = "the source no longer holds what was segmented"
        return Recomputed(image_id=image_id, outcome="gone", note=note)
    if masks[image_id] == row["mask_sha256"]:
        return Recomputed(image_id=image_id, outcome="equal")
    note = ""
    if row["numerics"] != numerics:
        note = f"published with {row['numerics']}, computed now with {numerics}"
    return Recomputed(image_id=image_id, outcome="different", note=note)
