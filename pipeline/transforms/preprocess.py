"""Steps from a decoded volume to the network's input; each keeps the way back.

A step takes `volume_ZHWC` (NumPy or torch, any device) and a `Context`, and returns the new
volume and the geometry it changed, as entries of a `Trace`; `to_native` walks a trace backwards.
Statistics and interpolation are in float64: the published goldens ask for 1e-6.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from pipeline.errors import BadImage, ConfigError, ErrorClass
from pipeline.registry import Registry
from pipeline.transforms.arrays import (
    Array,
    as_float64,
    constant,
    namespace,
    percentiles,
    to_numpy,
    zeros,
)

PREPROCESS = Registry[type]("preprocessing step")


@dataclass(frozen=True, slots=True)
class Move:
    """One change of the grid: (z, y, x) shape before, and where the new grid starts in the old.

    kind "window": the new grid is a window of the old (start may be negative: padding);
    "resize": the new grid covers the same field of view with another number of pixels.
    """

    kind: Literal["window", "resize"]
    before: tuple[int, int, int]
    after: tuple[int, int, int]
    start: tuple[int, int, int] = (0, 0, 0)


Trace = tuple[Move, ...]


def trace_to_plain(trace: Trace) -> list[list[Any]]:
    """A trace as plain lists; the inverse is `trace_from_plain`."""
    return [[move.kind, move.before, move.after, move.start] for move in trace]


def trace_from_plain(values: Sequence[Sequence[Any]]) -> Trace:
    """The inverse of `trace_to_plain`."""
    return tuple(
        Move(kind, tuple(before), tuple(after), tuple(start))
        for kind, before, after, start in values
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a step may know beside the pixels: the full scale of the stored type, if it has one."""

    full_scale: float | None = None


def full_scale_of(dtype: np.dtype[Any]) -> float | None:
    """255 for uint8, 65535 for uint16, None for floats."""
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else None


def apply_preprocess(
    volume_ZHWC: Array, steps: Sequence[Any], context: Context
) -> tuple[Array, Trace]:
    """Run all steps in order. Raises BadImage where the volume cannot fit the recipe."""
    trace: list[Move] = []
    for step in steps:
        before = tuple(volume_ZHWC.shape[:3])
        volume_ZHWC, moves = step.apply(volume_ZHWC, context)
        trace.extend(move for move in moves if (move.before, move.start) != (move.after, (0, 0, 0)))
        if 0 in volume_ZHWC.shape:
            message = f"nothing is left of {before} after {type(step).__name__}"
            raise BadImage(ErrorClass.IMAGE_TOO_SMALL, message)
    return volume_ZHWC, tuple(trace)


def run_preprocess(
    volume_ZHWC: npt.NDArray[Any],
    steps: Sequence[Any],
    to_device: Callable[[npt.NDArray[Any]], Array] = lambda volume: volume,
) -> tuple[Array, Trace]:
    """A decoded volume (uint8, uint16 or float32) on the network's grid; the one way there.

    Training and inference both come through here, so they cannot disagree. to_device: puts the
    pixels where the steps shall run. Raises BadImage where the volume cannot fit the recipe.
    """
    full_scale = full_scale_of(volume_ZHWC.dtype)
    if volume_ZHWC.dtype != np.uint8:
        volume_ZHWC = volume_ZHWC.astype(np.float32)
    return apply_preprocess(to_device(volume_ZHWC), steps, Context(full_scale=full_scale))


def to_network(labels_ZHW: npt.NDArray[Any], trace: Trace) -> npt.NDArray[Any]:
    """Bring a label map along the trace to the network's grid: nearest for resizes, 0 outside."""
    for move in trace:
        if move.kind == "resize":
            rows = _nearest_resize(move.before[1], move.after[1])
            columns = _nearest_resize(move.before[2], move.after[2])
            labels_ZHW = labels_ZHW[:, rows][:, :, columns]
        else:
            target, source = _overlap(move)
            moved = np.zeros(move.after, labels_ZHW.dtype)
            moved[source] = labels_ZHW[target]
            labels_ZHW = moved
    return np.ascontiguousarray(labels_ZHW)


def to_native(labels_ZHW: npt.NDArray[Any], trace: Trace) -> npt.NDArray[Any]:
    """Bring a map on the network's grid back to the input's: nearest for resizes, 0 outside."""
    for move in reversed(trace):
        if move.kind == "resize":
            rows = _nearest(move.before[1], move.after[1])
            columns = _nearest(move.before[2], move.after[2])
            labels_ZHW = labels_ZHW[:, rows][:, :, columns]
        else:
            labels_ZHW = _undo_window(labels_ZHW, move)
    return np.ascontiguousarray(labels_ZHW)


def _nearest(size_native: int, size_network: int) -> npt.NDArray[np.intp]:
    """For each native pixel the network pixel that holds its centre."""
    centres = (np.arange(size_native) + 0.5) * size_network / size_native
    return np.minimum(centres.astype(np.intp), size_network - 1)


def _undo_window(labels_ZHW: npt.NDArray[Any], move: Move) -> npt.NDArray[Any]:
    native = np.zeros(move.before, labels_ZHW.dtype)
    target, source = _overlap(move)
    native[target] = labels_ZHW[source]
    return native


def _overlap(move: Move) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where old and new grid of a window coincide: slices into the old, slices into the new."""
    lows = [max(0, start) for start in move.start]
    highs = [
        min(size, start + new)
        for size, start, new in zip(move.before, move.start, move.after, strict=True)
    ]
    target = tuple(slice(low, high) for low, high in zip(lows, highs, strict=True))
    source = tuple(
        slice(low - start, high - start)
        for low, high, start in zip(lows, highs, move.start, strict=True)
    )
    return target, source


def _window(
    volume_ZHWC: Array, start: tuple[int, int, int], after: tuple[int, int, int]
) -> tuple[Array, list[Move]]:
    """Cut or pad (with zeros) to a window of the grid."""
    z, y, x = (int(size) for size in volume_ZHWC.shape[:3])
    move = Move("window", (z, y, x), after, start)
    target, source = _overlap(move)
    if all(s >= 0 for s in start) and all(
        s + n <= b for s, n, b in zip(start, after, move.before, strict=True)
    ):
        return volume_ZHWC[target], [move]
    padded = zeros((*after, volume_ZHWC.shape[3]), volume_ZHWC)
    padded[source] = volume_ZHWC[target]
    return padded, [move]


@PREPROCESS.register("to_channels")
@dataclass(frozen=True, slots=True, kw_only=True)
class ToChannels:
    """Grey to `count` equal channels, RGB to grey by ITU-R BT.601 luma; else ChannelMismatch."""

    count: int

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume with `count` channels; the grid does not move."""
        channels = volume_ZHWC.shape[3]
        if channels == self.count:
            return volume_ZHWC, []
        xp = namespace(volume_ZHWC)
        if channels == 1:
            return xp.concatenate([volume_ZHWC] * self.count, -1), []
        if channels == 3 and self.count == 1:
            weights = constant(np.array([0.299, 0.587, 0.114]), volume_ZHWC)
            return (as_float64(volume_ZHWC) @ weights)[..., None], []
        message = f"the image has {channels} channels, the network takes {self.count}"
        raise BadImage(ErrorClass.CHANNEL_MISMATCH, message)


@PREPROCESS.register("drop_end_slices")
@dataclass(frozen=True, slots=True, kw_only=True)
class DropEndSlices:
    """Leave out the first and the last slice, of volumes with at least three."""

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume with two slices less; single pictures stay as they are."""
        z, y, x = (int(size) for size in volume_ZHWC.shape[:3])
        if z < 3:
            return volume_ZHWC, []
        return _window(volume_ZHWC, (1, 0, 0), (z - 2, y, x))


@PREPROCESS.register("zero_below_share")
@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroBelowShare:
    """Set what is below `share` of the volume's maximum to 0: background suppression."""

    share: float

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume of the same grid and dtype."""
        limit = self.share * float(volume_ZHWC.max())
        xp = namespace(volume_ZHWC)
        return xp.where(volume_ZHWC < limit, zeros((), volume_ZHWC), volume_ZHWC), []


@PREPROCESS.register("crop_to_content")
@dataclass(frozen=True, slots=True, kw_only=True)
class CropToContent:
    """Crop z, y and x to the bounding box of what is not 0 in any channel; all zero stays whole."""

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume of the box."""
        content_ZHW = (volume_ZHWC != 0).any(-1)
        rows_ZH = content_ZHW.any(-1)
        ranges = [
            np.flatnonzero(to_numpy(rows_ZH.any(-1))),
            np.flatnonzero(to_numpy(rows_ZH.any(0))),
            np.flatnonzero(to_numpy(content_ZHW.any(0).any(0))),
        ]
        if not len(ranges[0]):
            return volume_ZHWC, []
        (z0, z1), (y0, y1), (x0, x1) = ((int(r[0]), int(r[-1]) + 1) for r in ranges)
        return _window(volume_ZHWC, (z0, y0, x0), (z1 - z0, y1 - y0, x1 - x0))


@PREPROCESS.register("pad_to_square")
@dataclass(frozen=True, slots=True, kw_only=True)
class PadToSquare:
    """Pad the shorter in-plane side with zeros: floor of half the difference before, rest after."""

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume with equal height and width."""
        z, y, x = (int(size) for size in volume_ZHWC.shape[:3])
        side = max(y, x)
        return _window(volume_ZHWC, (0, -((side - y) // 2), -((side - x) // 2)), (z, side, side))


@PREPROCESS.register("pad_to_multiple")
@dataclass(frozen=True, slots=True, kw_only=True)
class PadToMultiple:
    """Pad height and width at their ends with zeros to a multiple of `of`."""

    of: int

    def __post_init__(self) -> None:
        if self.of < 1:
            raise ConfigError(f"pad_to_multiple.of must be at least 1, not {self.of}")

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume with both sides a multiple of `of`."""
        z, y, x = (int(size) for size in volume_ZHWC.shape[:3])
        return _window(
            volume_ZHWC, (0, 0, 0), (z, -(-y // self.of) * self.of, -(-x // self.of) * self.of)
        )


@PREPROCESS.register("resize")
@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """Resize each slice by splines of order 0, 1 or 2, zero outside, clipped to the volume's range.

    Equal to scikit-image's `resize(..., mode="constant", anti_aliasing=False)` of the whole
    volume. Spline interpolation is linear and separable, so it is two small matrix products a
    plane, on the device, instead of an 81-tap loop a voxel.
    """

    height: int
    width: int
    order: Literal[0, 1, 2] = 1

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ConfigError(f"resize to {self.height} x {self.width} pixels")

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume of `height` x `width`, float64 unless nothing had to change."""
        z, y, x = (int(size) for size in volume_ZHWC.shape[:3])
        move = Move("resize", (z, y, x), (z, self.height, self.width))
        if (y, x) == (self.height, self.width):
            return volume_ZHWC, []
        if self.order == 0:
            rows = _nearest_resize(y, self.height)
            columns = _nearest_resize(x, self.width)
            return volume_ZHWC[:, rows][:, :, columns], [move]
        xp = namespace(volume_ZHWC)
        volume = as_float64(volume_ZHWC)
        down_HY = constant(_spline_matrix(y, self.height, self.order), volume)
        across_XW = constant(_spline_matrix(x, self.width, self.order).T.copy(), volume)
        planes_ZCYX = volume.swapaxes(2, 3).swapaxes(1, 2)
        resized_ZCHW = down_HY @ (planes_ZCYX @ across_XW)
        resized = xp.clip(resized_ZCHW, float(volume.min()), float(volume.max()))
        return resized.swapaxes(1, 2).swapaxes(2, 3), [move]


def _nearest_resize(size_in: int, size_out: int) -> npt.NDArray[np.intp]:
    return ndimage.zoom(
        np.arange(size_in), size_out / size_in, order=0, mode="grid-constant", grid_mode=True
    ).astype(np.intp)


@lru_cache(maxsize=64)
def _spline_matrix(size_in: int, size_out: int, order: Literal[1, 2]) -> npt.NDArray[np.float64]:
    """The matrix (size_out, size_in) of a one-dimensional spline resize, prefilter included."""
    matrix = ndimage.zoom(
        np.eye(size_in),
        (size_out / size_in, 1.0),
        order=order,
        mode="grid-constant",
        grid_mode=True,
    )
    return np.ascontiguousarray(matrix)


@PREPROCESS.register("scale_by")
@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleBy:
    """Resize each slice by a factor with Pillow's bicubic filter (milesial's `scale`), antialiased.

    New sides are the old ones times the factor, rounded down, at least one pixel.
    """

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 8:
            raise ConfigError(f"scale_by.factor must be in (0, 8], not {self.factor}")

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume of the scaled grid, of the same dtype."""
        z, y, x = (int(size) for size in volume_ZHWC.shape[:3])
        after = (z, max(1, int(self.factor * y)), max(1, int(self.factor * x)))
        if after == (z, y, x):
            return volume_ZHWC, []
        slices = [_pillow_resize(item, after[1:]) for item in to_numpy(volume_ZHWC)]
        xp = namespace(volume_ZHWC)
        stacked = np.stack(slices)
        scaled = stacked if xp is np else xp.asarray(stacked, device=volume_ZHWC.device)
        return scaled, [Move("resize", (z, y, x), after)]


def _pillow_resize(slice_HWC: npt.NDArray[Any], size: tuple[int, ...]) -> npt.NDArray[Any]:
    shape = (size[1], size[0])
    if slice_HWC.dtype == np.uint8 and slice_HWC.shape[2] in (1, 3):
        picture = Image.fromarray(slice_HWC[:, :, 0] if slice_HWC.shape[2] == 1 else slice_HWC)
        resized = np.asarray(picture.resize(shape, Image.Resampling.BICUBIC))
        return resized[:, :, None] if resized.ndim == 2 else resized
    channels = [
        np.asarray(
            Image.fromarray(channel_HW.astype(np.float32)).resize(shape, Image.Resampling.BICUBIC)
        )
        for channel_HW in np.moveaxis(slice_HWC, 2, 0)
    ]
    return np.stack(channels, axis=2)


@PREPROCESS.register("unit_if_above_one")
@dataclass(frozen=True, slots=True, kw_only=True)
class UnitIfAboveOne:
    """Divide a slice by 255 if any of its values is above 1 (milesial's rule)."""

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume in float64."""
        volume = as_float64(volume_ZHWC)
        above_Z = (volume > 1).any(-1).any(-1).any(-1)
        return namespace(volume).where(above_Z[:, None, None, None], volume / 255.0, volume), []


@PREPROCESS.register("scale_to_range")
@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleToRange:
    """Bring values to [low, high]: from the stored type's range, or from the volume's own.

    of "dtype": 0..255 or 0..65535 map to the range; floats have no such range and use their own.
    """

    of: Literal["dtype", "volume"] = "dtype"
    low: float = 0.0
    high: float = 1.0

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume in float64; a constant volume becomes `low`."""
        volume = as_float64(volume_ZHWC)
        if self.of == "dtype" and context.full_scale is not None:
            bottom, extent = 0.0, context.full_scale
        else:
            bottom = float(volume.min())
            extent = float(volume.max()) - bottom
        unit = (volume - bottom) / extent if extent > 0 else volume * 0.0
        return (
            unit if (self.low, self.high) == (0, 1) else self.low + unit * (self.high - self.low)
        ), []


@PREPROCESS.register("percentile_rescale")
@dataclass(frozen=True, slots=True, kw_only=True)
class PercentileRescale:
    """Map the volume's `low` and `high` percentile (all channels together) to 0 and 1, clipped."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise ConfigError(f"percentile_rescale from {self.low} to {self.high}")

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume in float64; where both percentiles are equal, 0."""
        volume = as_float64(volume_ZHWC)
        bottom, top = percentiles(volume, (self.low, self.high))
        if top <= bottom:
            return volume * 0.0, []
        return namespace(volume).clip((volume - bottom) / (top - bottom), 0.0, 1.0), []


@PREPROCESS.register("zscore")
@dataclass(frozen=True, slots=True, kw_only=True)
class ZScore:
    """Per channel subtract the mean and divide by the population deviation; constant gives 0."""

    over: Literal["volume", "image"] = "volume"

    def apply(self, volume_ZHWC: Array, context: Context) -> tuple[Array, list[Move]]:
        """Volume in float64."""
        volume = as_float64(volume_ZHWC)
        axes = (0, 1, 2) if self.over == "volume" else (1, 2)
        centred = volume - _keep(volume.mean(axes), self.over)
        deviation = _keep((centred * centred).mean(axes) ** 0.5, self.over)
        xp = namespace(volume)
        return centred / xp.where(deviation > 0, deviation, deviation * 0 + 1), []


def _keep(values: Array, over: str) -> Array:
    """(C,) or (Z, C) statistics in a shape that broadcasts over ZHWC."""
    return values if over == "volume" else values[:, None, None, :]
