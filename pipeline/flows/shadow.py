"""Shadow: a candidate network on a sample of what is published, and on the labelled set; advice, no more."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import results, storage, tables
from pipeline.bundle import load_bundle
from pipeline.compare import Comparison, compare_nights
from pipeline.config import SegmentConfig, decode
from pipeline.drift import Drift, find_drift
from pipeline.errors import ConfigError, ResultsError
from pipeline.flows.labelled import score_bundles
from pipeline.flows.segment import run_segment
from pipeline.gate import PairedScores, Verdict, judge
from pipeline.groups import make_group_of
from pipeline.planning import Selection, new_run_id
from pipeline.policy import NightlyConfig
from pipeline.results import Night
from pipeline.telemetry import Report, silent

_MOST_SHARDS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """What a candidate would do. `out` holds its own results, of the sample alone."""

    out: str
    night: int
    candidate: str
    strata: Mapping[str, int]
    num_cases: int
    verdict: Verdict
    scores: PairedScores | None
    mean_dice: float | None
    confidence: tuple[float, float] | None
    drift: Sequence[Drift]
    worst: Sequence[Mapping[str, Any]]

    @property
    def advice(self) -> str:
        """promote or hold."""
        return "promote" if self.verdict.passed and self.scores is not None else "hold"

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        if not self.verdict.passed:
            return self.verdict.sentence
        if self.scores is None:
            return "no limit is broken on the sample, but without a labelled set nothing says it is better"
        change = -self.scores.drop
        return (
            f"{self.verdict.sentence}; Dice on the labelled set {change:+.4f} (95 % interval "
            f"{-self.scores.high:+.4f} to {-self.scores.low:+.4f})"
        )

    def to_plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "advice": self.advice,
            "reason": self.reason,
            "night": self.night,
            "candidate": self.candidate,
            "out": self.out,
            "sampled_cases": self.num_cases,
            "strata": dict(self.strata),
            "mean_dice_to_published": self.mean_dice,
            "mean_confidence": self.confidence,
            "labelled": self.scores and asdict(self.scores),
            "verdict": self.verdict.to_plain(),
            "drift": [asdict(item) for item in self.drift],
            "worst": [dict(row) for row in self.worst],
        }


def run_shadow(
    location: str,
    results_location: str,
    candidate: str,
    config: NightlyConfig | None,
    *,
    sample: int = 100,
    address: str | None = None,
    report: Report | None = None,
) -> Shadow:
    """Segment a stratified sample of the published cases with a candidate, and compare.

    config: groups, gate, labelled set and how to segment; None: as the published night was. The sample
    is the same for every candidate of a night. Publishes nothing. Raises ResultsError where
    nothing is published.
    """
    told = report or silent
    bundle = load_bundle(candidate)
    results_uri = storage.resolve(results_location)
    night = results.open_night(results_uri)
    if night is None:
        raise ResultsError(f"{results_location} holds no published night to compare with")
    if storage.resolve(location) != night.metadata["source"]["uri"]:
        raise ConfigError(
            f"{results_uri} holds the results of {night.metadata['source']['uri']}, not {location}"
        )
    if config is None:
        segment = replace(decode(SegmentConfig, night.metadata["config"]), max_bad_share=0.05)
        config = NightlyConfig(segment=segment)
    if night.metadata["bundle"]["digest"] == bundle.digest:
        raise ConfigError(
            f"{candidate} is the published network itself: there is nothing to compare"
        )
    config = replace(config, source=location, results=results_uri, bundle=candidate)
    group_of = make_group_of(config.groups)
    chosen, strata = choose_cases(night, group_of, sample)
    out = storage.join(results_uri, "_shadow", new_run_id())
    run_segment(
        location,
        out,
        candidate,
        replace(config.segment, max_bad_share=1.0),
        address=address,
        report=told,
        only=Selection(cases=chosen, num_buckets=night.metadata["source"]["num_buckets"]),
    )
    after = results.open_night(out)
    assert after is not None
    comparison = compare_nights(night, after, group_of, only=chosen, progress=told)
    drift = find_drift(comparison.cases, _no_reference())
    scores, why = score_bundles(config, night, bundle.digest, address, told)
    verdict = judge(
        config.gate,
        comparison,
        drift,
        num_images=sum(shard.num_images for shard in after.shards.values()),
        num_bad=sum(shard.num_bad for shard in after.shards.values()),
        scores=scores,
        why_no_scores=why,
    )
    return _describe(out, night, bundle.digest, strata, comparison, verdict, scores, drift)


def _no_reference() -> pa.Table:
    columns = {"label_name": pa.string(), "volume_px": pa.int64(), "confidence": pa.float64()}
    return pa.schema([*columns.items(), ("group", pa.string())]).empty_table()


def _describe(
    out: str,
    night: Night,
    candidate: str,
    strata: Mapping[str, int],
    comparison: Comparison,
    verdict: Verdict,
    scores: PairedScores | None,
    drift: Sequence[Drift],
) -> Shadow:
    rows = comparison.cases.to_pylist()
    dice = sorted(
        (row for row in rows if row["dice"] is not None), key=lambda r: (r["dice"], r["case_id"])
    )
    sure = [
        (row["confidence_before"], row["confidence_after"])
        for row in rows
        if None not in (row["confidence_before"], row["confidence_after"])
    ]
    columns = ("case_id", "label_name", "dice", "volume_px_before", "volume_px_after")
    return Shadow(
        out=out,
        night=night.number,
        candidate=candidate,
        strata=strata,
        num_cases=comparison.num_cases_before,
        verdict=verdict,
        scores=scores,
        mean_dice=float(np.mean([row["dice"] for row in dice])) if dice else None,
        confidence=(float(np.mean([b for b, _ in sure])), float(np.mean([a for _, a in sure])))
        if sure
        else None,
        drift=drift,
        worst=[{key: row[key] for key in columns} for row in dice[:10]],
    )


def choose_cases(
    night: Night, group_of: Callable[[str], str], sample: int
) -> tuple[dict[str, set[str]], dict[str, int]]:
    """A sample of a night's cases, spread evenly over strata: group x size of what was found.

    By shard id, and the number of cases by stratum. Sizes are: nothing, and the thirds of the volumes
    that are not 0. Which cases of a stratum is decided by a hash of their ids.
    """
    columns = ["case_id", "volume_px"]
    volumes: dict[str, tuple[str, int]] = {}
    for shard_id in sorted(night.shards)[:_MOST_SHARDS]:
        path = night.shards[shard_id].parts.cases
        if path is None:
            continue
        for row in tables.read_part(night.results, "cases", path, columns).to_pylist():
            before = volumes.get(row["case_id"], (shard_id, 0))[1]
            volumes[row["case_id"]] = (shard_id, before + (row["volume_px"] or 0))
    found = [volume for _, volume in volumes.values() if volume]
    edges = np.quantile(found, [1 / 3, 2 / 3]) if found else np.zeros(2)
    strata: dict[str, list[str]] = {}
    for case_id, (_, volume) in volumes.items():
        third = int(np.searchsorted(edges, volume, side="left"))
        size = ("small", "medium", "large")[third] if volume else "nothing"
        group = group_of(case_id)
        strata.setdefault(f"{group}: {size}" if group else size, []).append(case_id)
    lines = [sorted(members, key=_hash) for _, members in sorted(strata.items())]
    taken = _round_robin(lines, sample)
    chosen: dict[str, set[str]] = {}
    for case_id in taken:
        chosen.setdefault(volumes[case_id][0], set()).add(case_id)
    picked = set(taken)
    return chosen, {
        name: sum(case_id in picked for case_id in members)
        for name, members in sorted(strata.items())
    }


def _round_robin(lines: Sequence[list[str]], sample: int) -> list[str]:
    taken: list[str] = []
    for turn in range(max(map(len, lines), default=0)):
        for line in lines:
            if turn < len(line) and len(taken) < sample:
                taken.append(line[turn])
    return taken


def _hash(case_id: str) -> str:
    return hashlib.sha256(case_id.encode("utf-8", "surrogatepass")).hexdigest()
