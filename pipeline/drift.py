"""Whether populations of cases moved: between two nights, or what arrived against the archive."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import stats

from pipeline import tables
from pipeline.results import Night

_READERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How far the values of one population are from those of another.

    population: "recomputed" compares the cases computed again with themselves, "arrived" what is new or
    changed with the published archive. group: "" for all. quantity: volume or confidence.
    ks: largest distance of the two distribution functions (Kolmogorov-Smirnov) with its p-value.
    psi: population stability index over the reference's deciles.
    """

    population: str
    group: str
    label_name: str
    quantity: str
    num_before: int
    num_after: int
    mean_before: float
    mean_after: float
    ks: float
    p_value: float
    psi: float


_BINS = 10
_FEWEST_FOR_TEST = 5
"""Fewer values than this prove nothing: their p-value is 1."""


def measure_drift(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]
) -> dict[str, float]:
    """KS statistic, its p-value, and PSI of two samples, neither of them empty.

    PSI (Siddiqi, Credit Risk Scorecards, 2006) = sum of (a - b) ln(a / b) over the deciles of `before`,
    where a and b are the shares of the two samples; half an observation is added to each bin, so
    that an empty one does not make it infinite. Under 0.1 is usually called stable, over 0.25 moved.
    """
    if min(len(before), len(after)) >= _FEWEST_FOR_TEST:
        test = stats.ks_2samp(before, after, method="asymp")
        ks, p_value = float(test.statistic), float(test.pvalue)
    else:
        both = np.concatenate([before, after])
        shares = [
            np.searchsorted(np.sort(values), both, side="right") / len(values)
            for values in (before, after)
        ]
        ks, p_value = float(np.abs(shares[0] - shares[1]).max()), 1.0
    edges = np.unique(np.quantile(before, np.linspace(0, 1, _BINS + 1)[1:-1]))
    tied = np.array([edge for edge in edges if np.count_nonzero(before == edge) > 1])
    counts = [_bin(values, edges, tied) + 0.5 for values in (before, after)]
    expected, found = (count / count.sum() for count in counts)
    psi = float(np.sum((found - expected) * np.log(found / expected)))
    return {"ks": ks, "p_value": p_value, "psi": psi}


def _bin(
    values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64], tied: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Values by decile; those that many share, as a volume of 0, in bins of their own."""
    bins = np.searchsorted(edges, values, side="left")
    for number, edge in enumerate(tied, start=len(edges) + 1):
        bins[values == edge] = number
    return np.bincount(bins, minlength=len(edges) + 1 + len(tied)).astype(np.float64)


_SMALLEST_GROUP = 10
"""Groups with fewer cases on either side are not looked at by themselves."""


def find_drift(cases: pa.Table, reference: pa.Table) -> list[Drift]:
    """Drift of each label, over all cases and in each group, of volume and of confidence.

    cases: of CASES_SCHEMA. reference: a sample of what was published before (`reference_cases`).
    """
    states = cases.column("state").to_numpy(zero_copy_only=False)
    again = np.isin(states, ("changed", "recomputed"))
    arrived = np.isin(states, ("new", "changed"))
    found: list[Drift] = []
    for quantity, column in (("volume", "volume_px"), ("confidence", "confidence")):
        now = _Sample.of(cases, f"{column}_after")
        populations = (
            ("recomputed", _Sample.of(cases, f"{column}_before").where(again), now.where(again)),
            ("arrived", _Sample.of(reference, column), now.where(arrived)),
        )
        for population, before, after in populations:
            groups = sorted(set(after.groups.tolist()) & set(before.groups.tolist()) - {""})
            for group in ("", *groups):
                for label_name in sorted(set(after.labels.tolist())):
                    first, second = (side.values_of(group, label_name) for side in (before, after))
                    fewest = _SMALLEST_GROUP if group else 1
                    if min(len(first), len(second)) >= fewest:
                        found.append(
                            Drift(
                                population=population,
                                group=group,
                                label_name=label_name,
                                quantity=quantity,
                                num_before=len(first),
                                num_after=len(second),
                                mean_before=float(first.mean()),
                                mean_after=float(second.mean()),
                                **measure_drift(first, second),
                            )
                        )
    return found


@dataclass(frozen=True, slots=True)
class _Sample:
    """Values of one quantity with the label and the group of each; NaN where there is none."""

    values: npt.NDArray[np.float64]
    labels: npt.NDArray[Any]
    groups: npt.NDArray[Any]

    @classmethod
    def of(cls, rows: pa.Table, column: str) -> "_Sample":
        values = rows.column(column).cast(pa.float64()).to_numpy(zero_copy_only=False)
        names = (rows.column(name).to_pylist() for name in ("label_name", "group"))
        return cls(np.asarray(values, np.float64), *(np.array(name, dtype=str) for name in names))

    def where(self, chosen: npt.NDArray[np.bool_]) -> "_Sample":
        return _Sample(self.values[chosen], self.labels[chosen], self.groups[chosen])

    def values_of(self, group: str, label_name: str) -> npt.NDArray[np.float64]:
        chosen = (self.labels == label_name) & np.isfinite(self.values)
        if group:
            chosen &= self.groups == group
        found: npt.NDArray[np.float64] = self.values[chosen]
        return found


_REFERENCE_SHARDS = 256


def reference_cases(night: Night | None, group_of: Callable[[str], str]) -> pa.Table:
    """Cases of a night to compare arrivals with: all, or those of 256 shards chosen by their hash."""
    columns = ["case_id", "label_name", "volume_px", "confidence"]
    schema = pa.schema(
        [*(tables.table_schema("cases").field(n) for n in columns), ("group", pa.string())]
    )
    if night is None:
        return schema.empty_table()
    chosen = sorted(night.shards)[:_REFERENCE_SHARDS]  # ids are hashes: the first are a fair sample
    paths = [night.shards[key].parts.cases for key in chosen]
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(
            pool.map(
                lambda path: tables.read_part(night.results, "cases", path, columns),
                [path for path in paths if path is not None],
            )
        )
    table = pa.concat_tables([schema.empty_table().select(columns), *parts])
    groups = pa.array(
        [group_of(case_id) for case_id in table.column("case_id").to_pylist()], pa.string()
    )
    return table.append_column("group", groups)
