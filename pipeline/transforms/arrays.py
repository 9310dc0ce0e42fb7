"""The few operations that NumPy and torch spell differently.

Recipes run on whatever device the volume is on, and this folder must not import torch: each
function here asks the array where it comes from.
"""

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Array = Any
"""A NumPy array or a torch tensor."""


def namespace(array: Array) -> Any:
    """The module, `numpy` or `torch`, that the array belongs to."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def as_float64(array: Array) -> Array:
    """The same values as float64, on the same device."""
    xp = namespace(array)
    return xp.asarray(array, dtype=xp.float64)


def constant(values: npt.NDArray[np.float64], like: Array) -> Array:
    """A NumPy matrix as an array of the kind and on the device of `like`."""
    if namespace(like) is np:
        return values
    return namespace(like).asarray(values, device=like.device)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of the dtype and on the device of `like`."""
    return np.zeros(shape, like.dtype) if namespace(like) is np else like.new_zeros(shape)


def to_numpy(array: Array) -> npt.NDArray[Any]:
    """The values as a NumPy array in main memory."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def percentiles(array: Array, shares: tuple[float, ...]) -> list[float]:
    """Percentiles (0 to 100) with linear interpolation, as `numpy.percentile` gives them."""
    if namespace(array) is np or array.device.type == "cpu":
        return [float(value) for value in np.percentile(np.asarray(array), shares)]
    flat = array.reshape(-1)
    return [_interpolate(flat, share / 100 * (len(flat) - 1)) for share in shares]


def _interpolate(flat: Array, position: float) -> float:
    low = int(position)
    value = float(flat.kthvalue(low + 1).values)
    if position == low:
        return value
    above = float(flat.kthvalue(low + 2).values)
    return value + (above - value) * (position - low)
