"""Metrics: one file a family. A new one is a file, a `METRICS.register` and a line here."""

from typing import Any

import pyarrow as pa

from pipeline.metrics import boundary, overlap, shape, surface
from pipeline.metrics.source import METRICS, Mask, Metric, Spacing

__all__ = [
    "METRICS",
    "Metric",
    "boundary",
    "compute_metrics",
    "metric_columns",
    "overlap",
    "shape",
    "surface",
]


def metric_columns(table: str) -> list[tuple[str, pa.DataType]]:
    """Names and types of all metrics' columns in the "image" or the "case" table."""
    return [
        column
        for metric in METRICS.values()
        if table in metric.tables
        for column in metric.columns.items()
    ]


def compute_metrics(
    table: str, mask: Mask, reference: Mask | None, spacing: Spacing
) -> dict[str, Any]:
    """All metrics of one label of one image (2-D) or case (3-D), by column."""
    values: dict[str, Any] = {}
    for metric in METRICS.values():
        if table in metric.tables:
            values |= metric.compute(mask, reference, spacing)
    return values
