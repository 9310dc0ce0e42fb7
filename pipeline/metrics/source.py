"""What a metric is: columns it fills, and a function of a mask, a reference and a spacing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.registry import Registry

Mask = npt.NDArray[np.bool_]
Spacing = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One family of figures of one label, in 2-D (an image) or 3-D (a case).

    compute(mask, reference, spacing): boolean arrays of equal shape, reference None where there
    is none, spacing in mm along each axis (1.0 where unknown); returns a value for each column,
    None where it is not defined. columns: names with Arrow types. tables: where it is measured.
    """

    columns: Mapping[str, pa.DataType]
    compute: Callable[[Mask, Mask | None, Spacing], dict[str, Any]]
    tables: tuple[str, ...] = ("image", "case")


METRICS = Registry[Metric]("metric")
