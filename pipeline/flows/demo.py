"""The demo: phantoms in, a published night out, with the network that ships."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import lookup, results
from pipeline.config import SegmentConfig, load_config
from pipeline.errors import ConfigError
from pipeline.flows.segment import Summary, run_segment
from pipeline.formats import open_source
from pipeline.sharding import write_shards
from pipeline.synthetic import SPACING_MM, write_phantoms

BUNDLE = Path(__file__).resolve().parent.parent / "defaults" / "demo-bundle"
_MARK = ".reseg-demo"
_PATTERNS = {
    "source.images": "{case}/{case}_{slice}.png",
    "source.masks": "{case}/{case}_{slice}_mask.png",
    "source.spacing_mm": SPACING_MM,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo made: where the results are, its rows of `cases`, and a picture."""

    results: Path
    summary: Summary
    rows: list[dict[str, Any]]
    mean_dice: float
    picture: Path

    def to_plain(self) -> dict[str, Any]:
        """The object of `reseg demo --json`."""
        return {
            **self.summary.to_plain(),
            "results": str(self.results),
            "mean_dice": self.mean_dice,
            "picture": str(self.picture),
        }


def run_demo(out: Path, num_cases: int, report: Callable[..., None] | None = None) -> Demo:
    """Write phantoms, shard and segment them below `out`, draw the slice with most lesion.

    Raises ConfigError if `out` holds something that is not a demo of this size.
    """
    mark = out / _MARK
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise ConfigError(f"{out} exists and is not a demo; choose another folder with --out")
    if mark.exists() and mark.read_text() not in ("", str(num_cases)):
        raise ConfigError(
            f"{out} holds a demo of {mark.read_text()} cases; choose another folder with --out"
        )
    images = out / "images"
    if not mark.exists() or not mark.read_text():
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
        shutil.rmtree(images, ignore_errors=True)
        write_phantoms(images, range(num_cases))
        mark.write_text(str(num_cases))
    config = load_config(SegmentConfig, options=_PATTERNS)
    source = open_source(str(images), config.source, config.limits)
    write_shards(source, str(out / "shards"), "parquet", shard_bytes=1 << 20, report=report)
    summary = run_segment(
        str(out / "shards"), str(out / "results"), str(BUNDLE), SegmentConfig(), report=report
    )
    return _describe(out, summary)


def _describe(out: Path, summary: Summary) -> Demo:
    night = lookup.require_night(str(out / "results"), None)
    rows = sorted(results.read_table(night, "cases").to_pylist(), key=lambda row: row["case_id"])
    metrics = results.read_table(night, "metrics", ["image_id", "area_px"]).to_pylist()
    largest = max(metrics, key=lambda row: (row["area_px"], row["image_id"]))
    picture = out / "overlay.png"
    lookup.show_image(night, largest["image_id"]).save(picture, "PNG")
    scores = [row["dice"] for row in rows if row["dice"] is not None]
    return Demo(
        results=out / "results",
        summary=summary,
        rows=rows,
        mean_dice=sum(scores) / len(scores),
        picture=picture,
    )
