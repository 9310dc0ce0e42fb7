"""Evaluate: segment a labelled source with a bundle, and say how good it is, case by case."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline import results, storage
from pipeline.bundle import load_bundle
from pipeline.config import SegmentConfig
from pipeline.errors import ConfigError, SourceError
from pipeline.flows.segment import run_segment
from pipeline.formats import FORMATS, open_source
from pipeline.report import draw_dice_bars
from pipeline.telemetry import Report, no_formula

_RESULTS, _TABLE, _CHART, _SUMMARY = "results", "cases.csv", "dice.png", "evaluation.json"
_MARK = ".reseg-evaluation"
_COLUMNS = ("case_id", "label", "label_name", "dice", "iou", "hd95", "assd", "tp", "fp", "fn")
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of a bundle on a labelled source, overall and by label; `out` holds table and chart."""

    out: str
    bundle: str
    rows: Sequence[Mapping[str, Any]]
    overall: Mapping[str, float]
    by_label: Mapping[str, Mapping[str, float]]
    num_both_empty: int
    num_without_reference: int
    num_bad_images: int

    def to_plain(self) -> dict[str, Any]:
        """The object of `reseg evaluate --json`."""
        return {
            "out": self.out,
            "bundle": self.bundle,
            **self.overall,
            "labels": dict(self.by_label),
            "both_empty": self.num_both_empty,
            "without_reference": self.num_without_reference,
            "bad_images": self.num_bad_images,
            "cases": [dict(row) for row in self.rows],
        }


def run_evaluate(
    location: str,
    bundle_location: str,
    out_location: str,
    config: SegmentConfig,
    *,
    address: str | None = None,
    report: Report | None = None,
) -> Evaluation:
    """Segment `location` into `OUT/results`, and write `cases.csv`, `dice.png` and `evaluation.json`.

    Run again it computes only what changed; bad images and cases without a reference do not stop it,
    they are counted. Raises ConfigError if OUT holds something else,
    SourceError if no case has a reference.
    """
    out = storage.resolve(out_location)
    mark, results_uri = storage.join(out, _MARK), storage.join(out, _RESULTS)
    if not storage.is_empty(out) and storage.file_info(mark) is None:
        raise ConfigError(f"{out} exists and is no evaluation; choose another folder with --out")
    load_bundle(bundle_location)
    check_references(location, config)
    storage.check_writable(out)
    storage.create(mark, b"")
    config = replace(
        config, source=replace(config.source, references="optional"), max_bad_share=1.0
    )
    run_segment(location, results_uri, bundle_location, config, address=address, report=report)
    night = results.open_night(results_uri)
    assert night is not None
    rows = results.read_table(night, "cases").to_pylist()
    evaluation = _evaluate(out, night.metadata["bundle"]["digest"], rows)
    plain = evaluation.to_plain()
    storage.write(storage.join(out, _TABLE), _as_csv(evaluation.rows))
    storage.write(storage.join(out, _CHART), _chart(evaluation))
    storage.write(storage.join(out, _SUMMARY), json.dumps(plain, indent=1).encode())
    return evaluation


def check_references(location: str, config: SegmentConfig) -> None:
    """Say at once what would be found out only after everything was segmented."""
    source = open_source(location, config.source, config.limits)
    listing = FORMATS[source.format].list_shards(source)
    known = [case for shard in listing.shards for case in shard.cases or ()]
    all_known = all(shard.cases is not None for shard in listing.shards)
    if all_known and not known:
        raise SourceError(f"{source.uri} holds no image")
    has_masks = any(item.mask for case in known for item in case.slices)
    if config.source.references == "ignore" or (all_known and known and not has_masks):
        raise SourceError(
            f"{source.uri} has no reference masks to compare with; say which files they are: --masks"
        )


def _evaluate(out: str, bundle: str, rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    scored = [row for row in rows if row["dice"] is not None]
    empty = sum(bool(row["both_empty"]) for row in rows)
    if not scored and not empty:
        raise SourceError(
            "no case has reference masks for all its slices, so there is nothing to compare with; "
            "does --masks fit them?"
        )
    if not scored:
        raise SourceError(
            f"all {empty} references and predictions are empty: Dice has no value anywhere"
        )
    ordered = sorted(scored, key=lambda row: (row["dice"], row["case_id"], row["label"]))
    names = dict.fromkeys(row["label_name"] for row in rows)
    return Evaluation(
        out=out,
        bundle=bundle,
        rows=[{key: row[key] for key in _COLUMNS} for row in ordered],
        overall=dice_statistics(ordered),
        by_label={
            name: dice_statistics([row for row in ordered if row["label_name"] == name])
            for name in names
            if any(row["label_name"] == name for row in ordered)
        },
        num_both_empty=empty,
        num_without_reference=len({row["case_id"] for row in rows if row["tp"] is None}),
        num_bad_images=sum({row["case_id"]: row["num_bad"] for row in rows}.values()),
    )


def dice_statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean and median of the cases' Dice, the 95 % interval of the mean, and Dice of all pixels.

    The interval is the percentile bootstrap over cases (Efron 1979), 10,000 resamples from a fixed
    seed; rows of one case are drawn together, since they are not independent.
    """
    cases: dict[str, list[float]] = {}
    for row in rows:
        cases.setdefault(row["case_id"], []).append(row["dice"])
    totals = np.array([sum(scores) for scores in cases.values()])
    counts = np.array([len(scores) for scores in cases.values()])
    rng = np.random.default_rng(0)
    means = np.concatenate(
        [
            totals[drawn].sum(1) / counts[drawn].sum(1)
            for drawn in (
                rng.integers(0, len(totals), (_RESAMPLES // 10, len(totals))) for _ in range(10)
            )
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    tp, wrong = sum(row["tp"] for row in rows), sum(row["fp"] + row["fn"] for row in rows)
    scores = [row["dice"] for row in rows]
    return {
        "mean_dice": float(np.mean(scores)),
        "median_dice": float(np.median(scores)),
        "mean_dice_low": float(low),
        "mean_dice_high": float(high),
        "pooled_dice": 2 * tp / (2 * tp + wrong),
        "num_scores": len(scores),
        "num_cases": len(cases),
    }


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: no_formula(value) for key, value in row.items()} for row in rows)
    return text.getvalue().encode()


def _chart(evaluation: Evaluation) -> bytes:
    overall = evaluation.overall
    return draw_dice_bars(
        evaluation.rows,
        overall["mean_dice"],
        overall["median_dice"],
        overall["mean_dice_low"],
        overall["mean_dice_high"],
    )
