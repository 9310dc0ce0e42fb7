"""Phantoms: deterministic volumes with known lesions, for the demo, the tests and nothing clinical.

A phantom is a stack of grey slices: a bright shell, tissue with smooth texture, dark ventricles,
up to three ellipsoid lesions, noise, and a gain that differs from case to case.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom:
    """One case: volume_ZHW uint8, mask_ZHW uint8 with 1 in lesions."""

    case_id: str
    volume_ZHW: npt.NDArray[np.uint8]
    mask_ZHW: npt.NDArray[np.uint8]


SPACING_MM = (3.0, 1.0, 1.0)
"""Of all phantoms: (z, y, x)."""


def make_phantom(index: int, *, num_slices: int = 12, side: int = 96) -> Phantom:
    """Phantom number `index`; the same number gives the same pixels on every machine."""
    rng = np.random.default_rng([20261122, index])
    grid = np.meshgrid(
        np.linspace(-1, 1, num_slices),
        np.linspace(-1, 1, side),
        np.linspace(-1, 1, side),
        indexing="ij",
    )
    head = _ellipsoid(
        grid, (0, 0, 0), (1.35, 0.85 + 0.08 * rng.random(), 0.70 + 0.08 * rng.random())
    )
    values = np.where(head < 1, 0.42, 0.0) + np.where((head > 0.86) & (head < 1), 0.38, 0.0)
    texture = ndimage.gaussian_filter(rng.standard_normal(head.shape), (1, 6, 6))
    values += np.where(head < 0.86, 0.5 * texture / max(texture.std(), 1e-9) * 0.08, 0.0)
    ventricles = _ellipsoid(grid, (0, 0, 0.12), (0.7, 0.28, 0.07)) < 1
    ventricles |= _ellipsoid(grid, (0, 0, -0.12), (0.7, 0.28, 0.07)) < 1
    values[ventricles] = 0.18
    mask = np.zeros(head.shape, bool)
    for _ in range(int(rng.integers(1, 4))):
        centre = (rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.5), rng.uniform(-0.4, 0.4))
        radii = (rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.22), rng.uniform(0.1, 0.22))
        mask |= (_ellipsoid(grid, centre, radii) < 1) & (head < 0.8)
    values += 0.30 * ndimage.gaussian_filter(mask.astype(float), (0.3, 0.7, 0.7))
    values = values * rng.uniform(0.75, 1.1) + 0.03 * rng.standard_normal(head.shape)
    return Phantom(
        case_id=f"phantom_{index:04d}",
        volume_ZHW=(np.clip(values, 0, 1) * 255).astype(np.uint8),
        mask_ZHW=mask.astype(np.uint8),
    )


def _ellipsoid(
    grid: Sequence[npt.NDArray[Any]], centre: tuple[float, ...], radii: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """Squared distance from a centre in units of the radii: below 1 is inside."""
    total = np.zeros(grid[0].shape)
    for axis, middle, radius in zip(grid, centre, radii, strict=True):
        total += ((axis - middle) / radius) ** 2
    return total


def write_phantoms(folder: Path, indices: range, *, num_slices: int = 12, side: int = 96) -> int:
    """Write phantoms as `CASE/CASE_N.png` and `CASE/CASE_N_mask.png`; the number of slices."""
    written = 0
    for index in indices:
        phantom = make_phantom(index, num_slices=num_slices, side=side)
        case = folder / phantom.case_id
        case.mkdir(parents=True, exist_ok=True)
        for z, (slice_HW, mask_HW) in enumerate(
            zip(phantom.volume_ZHW, phantom.mask_ZHW, strict=True), start=1
        ):
            (case / f"{phantom.case_id}_{z}.png").write_bytes(encode_png(slice_HW))
            (case / f"{phantom.case_id}_{z}_mask.png").write_bytes(encode_png(mask_HW * 255))
            written += 1
    return written


def encode_png(image_HW: npt.NDArray[np.uint8]) -> bytes:
    """An 8-bit grey (HW) or RGB (HWC) array as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
