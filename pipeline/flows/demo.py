"""The demo: phantoms in, a trained network and a published night of other phantoms out."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import lookup, results
from pipeline.config import SegmentConfig, TrainConfig, load_config
from pipeline.errors import ConfigError
from pipeline.flows.cluster import connect, num_cores
from pipeline.flows.segment import Summary, run_segment
from pipeline.flows.train import run_train
from pipeline.formats import open_source
from pipeline.preparation import finished_result
from pipeline.sharding import write_shards
from pipeline.synthetic import SPACING_MM, write_phantoms

DEFAULTS = Path(__file__).resolve().parent.parent / "defaults"
BUNDLE = DEFAULTS / "demo-bundle"
TRAIN_PHANTOMS = range(1000, 1040)
"""The demo segments phantoms from 0 on, so none of these."""

_MARK = ".reseg-demo"
_PATTERNS = {
    "source.images": "{case}/{case}_{slice}.png",
    "source.masks": "{case}/{case}_{slice}_mask.png",
    "source.spacing_mm": SPACING_MM,
}

Report = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo made: training (None if it was not asked for), results, rows of `cases`, a picture."""

    training: dict[str, Any] | None
    results: Path
    summary: Summary
    rows: list[dict[str, Any]]
    mean_dice: float
    picture: Path

    def to_plain(self) -> dict[str, Any]:
        """The object of `reseg demo --json`."""
        return {
            **self.summary.to_plain(),
            "training": self.training,
            "results": str(self.results),
            "mean_dice": self.mean_dice,
            "picture": str(self.picture),
        }


def run_demo(
    out: Path, num_cases: int, *, train: bool = True, report: Report = lambda *_: None
) -> Demo:
    """Write phantoms, shard them, train on some, segment others, draw the slice with most lesion.

    train: else the bundle that ships is used. Raises ConfigError if `out` holds something that is
    not a demo of this kind and size.
    """
    kind = f"{num_cases} trained" if train else f"{num_cases}"
    mark = out / _MARK
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise ConfigError(f"{out} exists and is not a demo; choose another folder with --out")
    if mark.exists() and mark.read_text() not in ("", kind):
        raise ConfigError(
            f"{out} holds a demo of {mark.read_text()} cases; choose another folder with --out"
        )
    if not mark.exists() or not mark.read_text():
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
        shutil.rmtree(out / "images", ignore_errors=True)
        write_phantoms(out / "images" / "archive", range(num_cases))
        if train:
            write_phantoms(out / "images" / "labelled", TRAIN_PHANTOMS)
        mark.write_text(kind)
    archive = _shard(out, "archive", report)
    done = train and finished_result(str((out / "training").resolve())) is not None
    with nullcontext() if done else connect(None, num_cores()):  # one session for both
        training = None
        bundle = str(BUNDLE)
        if train:
            config = load_config(TrainConfig, DEFAULTS / "demo.toml")
            labelled = _shard(out, "labelled", report)
            training = run_train(labelled, str(out / "training"), config, report=report)
            bundle = training["bundle"]
        summary = run_segment(archive, str(out / "results"), bundle, SegmentConfig(), report=report)
    return _describe(out, summary, training)


def _shard(out: Path, name: str, report: Report) -> str:
    """The images of one folder as Parquet shards."""
    config = load_config(SegmentConfig, options=_PATTERNS)
    source = open_source(str(out / "images" / name), config.source, config.limits)
    shards = out / "shards" / name
    write_shards(source, str(shards), "parquet", shard_bytes=1 << 20, report=report)
    return str(shards)


def _describe(out: Path, summary: Summary, training: dict[str, Any] | None) -> Demo:
    night = lookup.require_night(str(out / "results"), None)
    rows = sorted(results.read_table(night, "cases").to_pylist(), key=lambda row: row["case_id"])
    metrics = results.read_table(night, "metrics", ["image_id", "area_px"]).to_pylist()
    largest = max(metrics, key=lambda row: (row["area_px"], row["image_id"]))
    picture = out / "overlay.png"
    lookup.show_image(night, largest["image_id"]).save(picture, "PNG")
    scores = [row["dice"] for row in rows if row["dice"] is not None]
    return Demo(
        training=training,
        results=out / "results",
        summary=summary,
        rows=rows,
        mean_dice=sum(scores) / len(scores),
        picture=picture,
    )
