"""Whether a staged night may be published: each limit with its value, and pass or fail."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from pipeline.compare import Comparison
from pipeline.drift import Drift
from pipeline.policy import GateConfig

_RESAMPLES = 5_000
_OFF = -1
_FEWEST_FOR_CHANCE = 10
"""A paired test over fewer cases cannot excuse a drop: it would excuse nearly any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit: what was measured, what is allowed. passed None: not judged, `note` says why."""

    name: str
    what: str
    value: float | None
    limit: float
    passed: bool | None
    note: str = ""

    @property
    def failure(self) -> str:
        """What is wrong, once it failed; what must be measured fails also where it cannot be."""
        if self.value is None:
            return f"{self.what} cannot be judged: {self.note}"
        return f"{self.what} is {self.value:.3g}, allowed is {self.limit:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All limits of a night. Judged are those that could be."""

    limits: tuple[Limit, ...]

    @property
    def passed(self) -> bool:
        """Whether no limit failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Limit, ...]:
        """The limits that failed."""
        return tuple(limit for limit in self.limits if limit.passed is False)

    @property
    def sentence(self) -> str:
        """What failed, in words."""
        if self.passed:
            judged = sum(limit.passed is not None for limit in self.limits)
            return f"all {judged} limits that could be judged are kept"
        return "; ".join(limit.failure for limit in self.failed)

    def to_plain(self) -> dict[str, Any]:
        """For `--json`, the record of the commit and the report."""
        return {"passed": self.passed, "limits": [asdict(limit) for limit in self.limits]}


def verdict_from_plain(values: Mapping[str, Any]) -> Verdict:
    """The inverse of `Verdict.to_plain`."""
    return Verdict(limits=tuple(Limit(**item) for item in values["limits"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedScores:
    """Dice of two bundles on the same labelled cases, each the mean over its labels.

    p_value: of the drop, one-sided, paired. low, high: 95 % interval of the mean drop (bootstrap over
    cases). by_label: the mean drop of each label.
    """

    num_cases: int
    mean_before: float
    mean_after: float
    drop: float
    low: float
    high: float
    p_value: float
    by_label: Mapping[str, float]
    worst: tuple[tuple[str, float, float], ...]


def pair_scores(
    before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]
) -> PairedScores | None:
    """Compare the Dice of two `cases` tables, case by case; None where one of them has no score at all.

    A label that is empty in reference and prediction has no Dice; where one bundle has one and the
    other has not, the empty prediction was right and counts as 1. A case that the second bundle has no
    score for, though the first had one, counts as 0. The p-value is that of Wilcoxon's
    signed-rank test (1945) that the second bundle is worse.
    """
    first, second = _scores(before), _scores(after)
    values: dict[str, dict[str, tuple[float, float]]] = {}
    for case_id, label_name in sorted(first):
        old, new = first[case_id, label_name], second.get((case_id, label_name), 0.0)
        if old is not None or new is not None:
            pair = (1.0 if old is None else old, 1.0 if new is None else new)
            values.setdefault(case_id, {})[label_name] = pair
    if not values or not second:
        return None
    names = sorted({name for labels in values.values() for name in labels})
    case_ids = list(values)
    means = np.array([np.mean(list(labels.values()), axis=0) for labels in values.values()])
    drops = means[:, 0] - means[:, 1]
    low, high = _interval(drops)
    return PairedScores(
        num_cases=len(case_ids),
        mean_before=float(means[:, 0].mean()),
        mean_after=float(means[:, 1].mean()),
        drop=float(drops.mean()),
        low=low,
        high=high,
        p_value=float(stats.wilcoxon(drops, alternative="greater").pvalue) if drops.any() else 1.0,
        by_label={
            name: float(np.mean([v[name][0] - v[name][1] for v in values.values() if name in v]))
            for name in names
        },
        worst=tuple(
            (case_ids[i], float(means[i, 0]), float(means[i, 1])) for i in np.argsort(-drops)[:5]
        ),
    )


def _scores(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float | None]:
    """Dice by (case, label), None for empty against empty; rows without a reference are left out."""
    return {
        (row["case_id"], row["label_name"]): row["dice"]
        for row in rows
        if row["dice"] is not None or row["both_empty"]
    }


def _interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def judge(
    config: GateConfig,
    comparison: Comparison,
    drift: Sequence[Drift],
    *,
    num_images: int,
    num_bad: int,
    scores: PairedScores | None,
    why_no_scores: str,
    must_score: bool = False,
) -> Verdict:
    """Hold a night against the policy. num_images, num_bad: of the whole night.

    must_score: there is a labelled set and another network, so that no scores are a failure.
    """
    limits = [
        _limit(
            "max_bad_share",
            "the share of bad images",
            num_bad / num_images if num_images else None,
            config.max_bad_share,
            f"{num_bad:,} of {num_images:,} images",
        )
    ]
    if comparison.before is not None:
        limits += [
            _missing(config, comparison),
            _low_dice(config, comparison),
            *_volume_changes(config, comparison),
            *_drift_limits(config, drift),
        ]
    limits += _dice_drops(config, scores, why_no_scores, must_score=must_score)
    return Verdict(limits=tuple(limits))


def _limit(
    name: str, what: str, value: float | None, limit: float, note: str = "", *, judged: bool = True
) -> Limit:
    passed = None if limit == _OFF or value is None or not judged else value <= limit
    if limit == _OFF:
        note = "turned off"
    return Limit(name=name, what=what, value=value, limit=limit, passed=passed, note=note)


def _missing(config: GateConfig, comparison: Comparison) -> Limit:
    missing, total = comparison.case_states["removed"], comparison.num_cases_before
    return _limit(
        "max_missing_share",
        "the share of cases that are gone from the source",
        missing / total if total else None,
        config.max_missing_share,
        f"{missing:,} of {total:,} cases",
    )


def _is_enough(config: GateConfig, number: int, comparison: Comparison) -> bool:
    return number >= config.min_cases or 2 * number >= comparison.num_cases_before


def _low_dice(config: GateConfig, comparison: Comparison) -> Limit:
    worst: dict[str, float] = {}
    again: set[str] = set()
    columns = ["case_id", "state", "dice", "volume_px_before", "volume_px_after"]
    for row in comparison.cases.select(columns).to_pylist():
        before, after = row["volume_px_before"], row["volume_px_after"]
        if row["state"] not in ("changed", "recomputed") or before is None:
            continue  # new, or all bad last night: there is nothing to be like
        again.add(row["case_id"])
        dice = row["dice"]
        if dice is None and after is None:
            dice = 0.0  # it had masks, and has none any more
        if dice is None and (before or after):
            continue  # of another size now: nothing says that it is like it was
        worst[row["case_id"]] = min(1.0 if dice is None else dice, worst.get(row["case_id"], 1.0))
    unlike = len(again - worst.keys())
    low = sum(dice < config.low_dice for dice in worst.values()) + unlike
    judged = _is_enough(config, len(again), comparison)
    note = f"{low:,} of {len(again):,} cases computed again"
    if unlike:
        note += f", {unlike:,} of them of another size and not comparable"
    return _limit(
        "max_low_dice_share",
        f"the share of cases with a Dice under {config.low_dice:g} to last night",
        low / len(again) if again else None,
        config.max_low_dice_share,
        note if judged or not again else f"{note}: too few to judge",
        judged=judged,
    )


def _volume_changes(config: GateConfig, comparison: Comparison) -> list[Limit]:
    """Change of each label's mean volume, over cases that were computed again."""
    sums: dict[str, list[int]] = {}
    columns = ["label_name", "state", "volume_px_before", "volume_px_after"]
    for row in comparison.cases.select(columns).to_pylist():
        before, after = row["volume_px_before"], row["volume_px_after"]
        if row["state"] in ("changed", "recomputed") and None not in (before, after):
            total = sums.setdefault(row["label_name"], [0, 0, 0])
            total[0] += 1
            total[1] += before
            total[2] += after
    limits = []
    for name, (count, before, after) in sorted(sums.items()):
        value = abs(after - before) / before if before else (1.0 if after else 0.0)
        judged = _is_enough(config, count, comparison)
        direction = f"{before / count:,.0f} to {after / count:,.0f} voxels over {count:,} cases"
        limits.append(
            _limit(
                "max_volume_change",
                f"the relative change of the mean volume of {name}",
                value,
                config.max_volume_change,
                direction if judged else f"{direction}: too few to judge",
                judged=judged,
            )
        )
    return limits


def _drift_limits(config: GateConfig, drift: Sequence[Drift]) -> list[Limit]:
    """The worst drift of all, or the ten worst that are over the limit.

    PSI of small samples is large by chance (about 9 / n + 9 / m over deciles), so it counts only
    where the Kolmogorov-Smirnov test agrees, at alpha shared out among all comparisons.
    """
    enough = [d for d in drift if min(d.num_before, d.num_after) >= config.min_cases]
    if not enough:
        note = f"no population of {config.min_cases} cases to compare"
        return [_limit("max_drift_psi", "drift (PSI)", None, config.max_drift_psi, note)]
    by_chance = config.alpha / len(enough)
    over = [d for d in enough if d.psi > config.max_drift_psi != _OFF and d.p_value < by_chance]
    chosen = sorted(over, key=lambda d: -d.psi)[:10] or [max(enough, key=lambda d: d.psi)]
    limits = []
    for d in chosen:
        note = (
            f"{d.population}: mean {d.mean_before:.4g} to {d.mean_after:.4g} over "
            f"{d.num_after:,} cases, KS {d.ks:.2f}, p = {d.p_value:.2g}"
        )
        excused = d.psi > config.max_drift_psi and d.p_value >= by_chance
        limits.append(
            _limit(
                "max_drift_psi",
                f"drift (PSI) of the {d.quantity} of {d.label_name}"
                + (f" in {d.group}" if d.group else ""),
                d.psi,
                config.max_drift_psi,
                f"{note}: over the limit, but as likely by chance" if excused else note,
                judged=not excused,
            )
        )
    return limits


def _dice_drops(
    config: GateConfig, scores: PairedScores | None, why_not: str, *, must_score: bool
) -> list[Limit]:
    """The mean drop on the labelled set; with several labels also that of each."""
    what = "the drop of the mean Dice on the labelled set"
    if scores is None:
        limit = _limit("max_dice_drop", what, None, config.max_dice_drop, why_not)
        if must_score and config.max_dice_drop != _OFF:
            limit = replace(limit, passed=False)
        return [limit]
    note = (
        f"{scores.mean_before:.4f} to {scores.mean_after:.4f} over {scores.num_cases} cases, 95 % "
        f"interval of the drop {scores.low:.4f} to {scores.high:.4f}, p = {scores.p_value:.3g}"
    )
    limit = _limit("max_dice_drop", what, scores.drop, config.max_dice_drop, note)
    by_chance = scores.num_cases >= _FEWEST_FOR_CHANCE and scores.p_value >= config.alpha
    if limit.passed is False and by_chance:
        limit = replace(limit, passed=None, note=f"{note}: over the limit, but as likely by chance")
    if len(scores.by_label) < 2:
        return [limit]
    return [
        limit,
        *(
            _limit("max_dice_drop", f"{what}, of {name}", drop, config.max_dice_drop)
            for name, drop in scores.by_label.items()
        ),
    ]
