"""Distances between surfaces, in mm where the spacing is known, else in pixels.

A mask's surface is its pixels with a neighbour (across a face, or the border of the image)
outside the mask, as in MONAI's `get_mask_edges`; both masks must have one.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import ndimage

from pipeline.metrics.source import METRICS, Mask, Metric, Spacing

_COLUMNS = {"hd95": pa.float64(), "assd": pa.float64()}


def surface(mask: Mask, reference: Mask | None, spacing: Spacing) -> dict[str, Any]:
    """HD95: the larger of the two 95th percentiles of directed surface distances (MONAI's
    `compute_hausdorff_distance(percentile=95)`); ASSD: the mean of all distances of both
    directions. Null where either mask is empty: no distance exists.
    """
    if reference is None or not mask.any() or not reference.any():
        return dict.fromkeys(_COLUMNS)
    box = _bounding_box(mask | reference)
    there = _distances(mask[box], reference[box], spacing)
    back = _distances(reference[box], mask[box], spacing)
    return {
        "hd95": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "assd": float((there.sum() + back.sum()) / (len(there) + len(back))),
    }


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box of the mask; distances inside it are those of the whole image."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)


def _edges(mask: Mask) -> Mask:
    return mask & ~ndimage.binary_erosion(mask)


def _distances(source: Mask, target: Mask, spacing: Spacing) -> npt.NDArray[np.float64]:
    """From each surface pixel of `source` to the nearest of `target`."""
    to_target = ndimage.distance_transform_edt(~_edges(target), sampling=spacing)
    distances: npt.NDArray[np.float64] = to_target[_edges(source)]
    return distances


METRICS.register("surface")(Metric(columns=_COLUMNS, compute=surface))
