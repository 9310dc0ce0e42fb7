"""Size, pieces and place of a label."""

from typing import Any

import numpy as np
import pyarrow as pa
from scipy import ndimage

from pipeline.metrics.source import METRICS, Mask, Metric, Spacing

_IMAGE = {
    "area_px": pa.int64(),
    "reference_area_px": pa.int64(),
    "components": pa.int32(),
    "bbox": pa.list_(pa.int32()),
}
_CASE = {
    "volume_px": pa.int64(),
    "reference_volume_px": pa.int64(),
    "components_3d": pa.int32(),
}


def image_shape(mask: Mask, reference: Mask | None, spacing: Spacing) -> dict[str, Any]:
    """Pixels, components (full connectivity) and bounding box [y0, x0, y1, x1), null if empty."""
    area = int(np.count_nonzero(mask))
    return {
        "area_px": area,
        "reference_area_px": None if reference is None else int(np.count_nonzero(reference)),
        "components": _num_components(mask) if area else 0,
        "bbox": _bbox(mask) if area else None,
    }


def case_shape(mask: Mask, reference: Mask | None, spacing: Spacing) -> dict[str, Any]:
    """Voxels and components (full connectivity) of a label over the volume."""
    volume = int(np.count_nonzero(mask))
    return {
        "volume_px": volume,
        "reference_volume_px": None if reference is None else int(np.count_nonzero(reference)),
        "components_3d": _num_components(mask) if volume else 0,
    }


def _num_components(mask: Mask) -> int:
    structure = ndimage.generate_binary_structure(mask.ndim, mask.ndim)
    return int(ndimage.label(mask, structure)[1])


def _bbox(mask_HW: Mask) -> list[int]:
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return [int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1]


METRICS.register("shape")(Metric(columns=_IMAGE, compute=image_shape, tables=("image",)))
METRICS.register("shape_3d")(Metric(columns=_CASE, compute=case_shape, tables=("case",)))
