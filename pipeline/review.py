"""The cases that a person should look at, ranked, each with its reasons in words."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import delta, storage, tables
from pipeline.compare import Comparison, became_bad
from pipeline.drift import Drift
from pipeline.results import Night, history, oldest_kept_night
from pipeline.telemetry import no_formula

_LOW_DICE, _LARGE_CHANGE, _DRIFT_PSI, _FAR = 0.8, 0.5, 0.25, 5.0
_EARLIER_NIGHTS, _FEWEST_EARLIER = 6, 3
_FEWEST_FOR_RANK = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewItem:
    """One case to look at. score ranks; image_id is where to look first, where one stands out."""

    case_id: str
    group: str
    state: str
    score: float
    reasons: tuple[str, ...]
    image_id: str | None = None

    def to_plain(self) -> dict[str, Any]:
        """For JSON and the report."""
        return {**asdict(self), "reasons": list(self.reasons)}


@dataclass(slots=True)
class _Candidate:
    group: str
    state: str
    shard_id: str
    score: float = 0.0
    reasons: list[str] = field(default_factory=list)
    image_id: str | None = None
    volumes: dict[str, int] = field(default_factory=dict)

    def add(self, score: float, reason: str, image_id: str | None = None) -> None:
        if image_id and (self.image_id is None or score > self.score):
            self.image_id = image_id
        self.score += score
        self.reasons.append(reason)


def make_review(
    comparison: Comparison,
    drift: Sequence[Drift],
    reference: pa.Table,
    *,
    most: int,
    base: Night | None = None,
) -> list[ReviewItem]:
    """Rank the cases of a night by what is odd about them; the worst `most`.

    reference: a sample of published cases, to tell a low confidence by. base: the published night,
    whose forerunners tell a case's own history; only the candidates' is read.
    """
    rows = [row for row in comparison.cases.to_pylist() if row["state"] != "removed"]
    several = len({row["label_name"] for row in rows}) > 1
    candidates: dict[str, _Candidate] = {}
    rank_of = _confidence_rank(reference, rows)
    for row in rows:
        found = candidates.setdefault(
            row["case_id"],
            _Candidate(group=row["group"], state=row["state"], shard_id=row["shard_id"]),
        )
        if row["volume_px_after"] is not None:
            found.volumes[row["label_name"]] = row["volume_px_after"]
        if row["state"] == "new" and row["num_bad_after"] and row["volume_px_after"] is None:
            if not found.reasons:
                found.add(1.0, f"none of its {row['num_images_after']} images is good")
            continue
        label = f"{row['label_name']}: " if several else ""
        for score, reason in (*_movement_reasons(row), *_confidence_reasons(row, rank_of)):
            found.add(score, label + reason, row["worst_image"])
    bad: dict[str, list[dict[str, Any]]] = {}
    for image in became_bad(comparison):
        bad.setdefault(image["case_id"], []).append(image)
    for case_id, images in bad.items():
        if case_id in candidates:
            words = f"{len(images)} images that were good are bad now"
            candidates[case_id].add(1.0, words, images[0]["image_id"])
    _add_drift(candidates, drift)
    asked = [case_id for case_id, _ in _ranked(candidates)[: 4 * most]] or list(candidates)[:200]
    _add_history({case_id: candidates[case_id] for case_id in asked}, base)
    return [
        ReviewItem(
            case_id=case_id,
            group=found.group,
            state=found.state,
            score=round(found.score, 4),
            reasons=tuple(found.reasons),
            image_id=found.image_id,
        )
        for case_id, found in _ranked(candidates)[:most]
    ]


def _ranked(candidates: Mapping[str, _Candidate]) -> list[tuple[str, _Candidate]]:
    odd = [(case_id, found) for case_id, found in candidates.items() if found.reasons]
    return sorted(odd, key=lambda pair: (-pair[1].score, pair[0]))


def _movement_reasons(row: Mapping[str, Any]) -> Iterable[tuple[float, str]]:
    before, after = row["volume_px_before"], row["volume_px_after"]
    if before and after == 0:
        yield 2.0, f"vanished: {_volume(row, 'before')} before, nothing now"
    elif before == 0 and after:
        yield 1.5, f"appeared: nothing before, {_volume(row, 'after')} now"
    elif row["dice"] is not None and row["dice"] < _LOW_DICE:
        yield 1 - row["dice"], f"Dice {row['dice']:.2f} to last night"
    change = row["volume_change"]
    if change is not None and before and after and abs(change) >= _LARGE_CHANGE:
        words = f"volume {change:+.0%} ({_volume(row, 'before')} to {_volume(row, 'after')})"
        yield min(1.0, abs(float(np.log2(after / before))) / 3), words
    if before and after:
        moved = [
            f"{row[name]} component{'s' * (row[name] > 1)} {name}"
            for name in ("vanished", "appeared")
            if row[name]
        ]
        if moved:
            yield 0.25, " and ".join(moved)


def _volume(row: Mapping[str, Any], when: str) -> str:
    if row[f"volume_ml_{when}"] is not None:
        return f"{row[f'volume_ml_{when}']:.2f} ml"
    return f"{row[f'volume_px_{when}']:,} voxels"


def _confidence_rank(
    reference: pa.Table, rows: Sequence[Mapping[str, Any]]
) -> Callable[[str, float], float | None]:
    """The share of cases that are less certain of a label than a given confidence."""
    known: dict[str, list[float]] = {}
    published = zip(
        reference.column("label_name").to_pylist(),
        reference.column("confidence").to_pylist(),
        strict=True,
    )
    for name, value in published:
        if value is not None:
            known.setdefault(name, []).append(value)
    for row in rows:
        if row["confidence_after"] is not None and len(known.get(row["label_name"], ())) < 10_000:
            known.setdefault(row["label_name"], []).append(row["confidence_after"])
    ordered = {name: np.sort(values) for name, values in known.items()}

    def rank(label_name: str, confidence: float) -> float | None:
        values = ordered.get(label_name)
        if values is None or len(values) < _FEWEST_FOR_RANK:
            return None
        return float(np.searchsorted(values, confidence, side="left")) / len(values)

    return rank


def _confidence_reasons(
    row: Mapping[str, Any], rank_of: Callable[[str, float], float | None]
) -> Iterable[tuple[float, str]]:
    confidence = row["confidence_after"]
    if confidence is None:
        return
    rank = rank_of(row["label_name"], confidence)
    if confidence < 0.75 or (rank is not None and rank < 0.02 and confidence < 0.95):
        words = f"confidence {confidence:.2f}"
        if rank is not None:
            words += f", lower than {1 - rank:.0%} of the archive"
        yield 0.2 + (1 - confidence), words
    before = row["confidence_before"]
    if before is not None and before - confidence > 0.1:
        yield 0.3, f"confidence fell from {before:.2f} to {confidence:.2f}"


def _add_drift(candidates: Mapping[str, _Candidate], drift: Sequence[Drift]) -> None:
    moved = {
        d.group: d
        for d in sorted(drift, key=lambda d: d.psi)
        if d.group and d.psi > _DRIFT_PSI and d.p_value < 0.01
    }
    for found in candidates.values():
        worst = moved.get(found.group)
        if worst is not None:
            words = f"{found.group} drifts: PSI {worst.psi:.2f} in {worst.quantity} of {worst.label_name}"
            found.add(0.15, words)


def _add_history(asked: Mapping[str, _Candidate], base: Night | None) -> None:
    """Volumes far from the case's own on earlier nights (robust z over 5, at least three of them)."""
    if base is None or base.number < _FEWEST_EARLIER - 1:
        return
    histories = volume_history(base, {key: found.shard_id for key, found in asked.items()})
    for case_id, past in histories.items():
        found = asked[case_id]
        for label_name, values in past.items():
            volume = found.volumes.get(label_name)
            if volume is None or len(values) < _FEWEST_EARLIER:
                continue
            middle = float(np.median(values))
            deviation = float(np.median(np.abs(np.array(values) - middle)))
            if abs(volume - middle) > _FAR * (1.4826 * deviation + 0.05 * middle + 1):
                words = (
                    f"{label_name}: {volume:,} voxels, {min(values):,} to {max(values):,} on "
                    f"{len(values)} earlier nights"
                )
                found.add(0.5, words)


def volume_history(night: Night, shard_of: Mapping[str, str]) -> dict[str, dict[str, list[int]]]:
    """Volumes (voxels) of some cases on this night and earlier kept ones, by case and label name."""
    found: dict[str, dict[str, list[int]]] = {case_id: {} for case_id in shard_of}
    oldest = oldest_kept_night(night.results)
    wanted: dict[str, set[str]] = {}
    for case_id, shard_id in shard_of.items():
        wanted.setdefault(shard_id, set()).add(case_id)
    nights = [n for n in history(night.results) if oldest <= n["night"] <= night.number]
    read: dict[str, pa.Table] = {}
    for entry in nights[:_EARLIER_NIGHTS]:
        version = entry.get("versions", {}).get("cases")
        log = (
            None
            if version is None
            else delta.open_log(storage.join(night.results, "cases"), version)
        )
        if log is None:
            continue
        for shard_id, path in zip(*log.columns("min.shard_id", "path"), strict=True):
            if shard_id not in wanted:
                continue
            if path not in read:
                read[path] = tables.read_part(
                    night.results, "cases", path, ["case_id", "label_name", "volume_px"]
                )
            for row in read[path].to_pylist():
                if row["case_id"] in wanted[shard_id] and row["volume_px"] is not None:
                    values = found[row["case_id"]].setdefault(row["label_name"], [])
                    values.append(row["volume_px"])
    return found


def review_csv(items: Sequence[ReviewItem]) -> bytes:
    """The list for a spreadsheet; no name can be run as a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "case_id", "group", "state", "score", "image_id", "reasons"])
    for rank, item in enumerate(items, start=1):
        cells = [
            item.case_id,
            item.group,
            item.state,
            item.score,
            item.image_id or "",
            "; ".join(item.reasons),
        ]
        writer.writerow([rank, *(no_formula(cell) for cell in cells)])
    return text.getvalue().encode()
