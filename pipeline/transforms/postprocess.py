"""Steps from logits to a label map: activation and decision on the device, shapes on the CPU.

`to_native_grid` says where the way back to the input's grid is taken: before the decision it
interpolates logits or probabilities bilinearly (milesial), after it labels by nearest (Buda).
It is appended where a recipe leaves it out, so masks always come back in native pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.errors import ConfigError
from pipeline.registry import Registry

POSTPROCESS = Registry[type]("postprocessing step")

Labels = npt.NDArray[np.uint8]


@POSTPROCESS.register("sigmoid")
@dataclass(frozen=True, slots=True, kw_only=True)
class Sigmoid:
    """Each output channel is the logit of one label of its own."""


@POSTPROCESS.register("softmax")
@dataclass(frozen=True, slots=True, kw_only=True)
class Softmax:
    """Output channel 0 is the background, channel k label k."""


@POSTPROCESS.register("threshold")
@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A pixel takes the most probable label, if its probability is above `at` (at 0.5: not equal)."""

    at: float = 0.5


@POSTPROCESS.register("argmax")
@dataclass(frozen=True, slots=True, kw_only=True)
class Argmax:
    """A pixel takes its most probable class."""


@POSTPROCESS.register("to_native_grid")
@dataclass(frozen=True, slots=True, kw_only=True)
class ToNativeGrid:
    """Here the maps go back to the grid of the input."""


def _structure(dimensions: int, connectivity: str) -> npt.NDArray[np.bool_]:
    reach = 1 if connectivity == "face" else dimensions
    return ndimage.generate_binary_structure(dimensions, reach)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What the steps on shapes share: per slice (2) or over the volume (3), and connectivity."""

    dimensions: Literal[2, 3] = 3
    connectivity: Literal["face", "full"] = "face"

    def components(
        self, mask_ZHW: npt.NDArray[np.bool_]
    ) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[Any], int]]:
        """(view of the mask, its component numbers, how many), for the volume or each slice."""
        views = [mask_ZHW] if self.dimensions == 3 else list(mask_ZHW)
        structure = _structure(self.dimensions, self.connectivity)
        return [(view, *ndimage.label(view, structure)) for view in views if view.any()]


@POSTPROCESS.register("largest_component")
@dataclass(frozen=True, slots=True, kw_only=True)
class LargestComponent(_Shape):
    """Keep each label's largest component (the first of equals); empty stays empty."""

    def apply(self, labels_ZHW: Labels) -> Labels:
        """Labels of the same shape."""
        return _for_each_label(labels_ZHW, self._keep)

    def _keep(self, mask_ZHW: npt.NDArray[np.bool_]) -> None:
        for view, numbers, count in self.components(mask_ZHW):
            if count > 1:
                sizes = np.bincount(numbers.ravel())
                view &= numbers == 1 + int(np.argmax(sizes[1:]))


@POSTPROCESS.register("minimum_size")
@dataclass(frozen=True, slots=True, kw_only=True)
class MinimumSize(_Shape):
    """Remove components with fewer than `pixels` pixels (voxels over a volume)."""

    pixels: int

    def apply(self, labels_ZHW: Labels) -> Labels:
        """Labels of the same shape."""
        return _for_each_label(labels_ZHW, self._keep)

    def _keep(self, mask_ZHW: npt.NDArray[np.bool_]) -> None:
        for view, numbers, _ in self.components(mask_ZHW):
            view &= (np.bincount(numbers.ravel()) >= self.pixels)[numbers]


@POSTPROCESS.register("fill_holes")
@dataclass(frozen=True, slots=True, kw_only=True)
class FillHoles(_Shape):
    """Fill background that a label encloses; `connectivity` is that of the background's paths."""

    def apply(self, labels_ZHW: Labels) -> Labels:
        """Labels of the same shape; other labels inside a hole stay."""
        filled = labels_ZHW.copy()
        structure = _structure(self.dimensions, self.connectivity)
        for label in _present(labels_ZHW):
            mask_ZHW = labels_ZHW == label
            views = [mask_ZHW] if self.dimensions == 3 else list(mask_ZHW)
            whole = np.stack([ndimage.binary_fill_holes(view, structure) for view in views])
            filled[whole.reshape(filled.shape) & (filled == 0)] = label
        return filled


SHAPE_STEPS = (LargestComponent, MinimumSize, FillHoles)


def _present(labels_ZHW: Labels) -> list[int]:
    return [int(v) for v in np.flatnonzero(np.bincount(labels_ZHW.ravel(), minlength=1)) if v]


def _for_each_label(labels_ZHW: Labels, keep: Any) -> Labels:
    """Apply an in-place filter to each label's mask; what it drops becomes background."""
    result = labels_ZHW.copy()
    for label in _present(labels_ZHW):
        mask_ZHW = labels_ZHW == label
        kept_ZHW = mask_ZHW.copy()
        keep(kept_ZHW)
        result[mask_ZHW & ~kept_ZHW] = 0
    return result


def check_order(steps: Sequence[Any]) -> tuple[Any, ...]:
    """The steps, completed and checked: activation, one decision, then shapes.

    Raises ConfigError for a recipe that names no activation or decision, or shapes before it.
    """
    kinds = [type(step) for step in steps]
    for choices in ((Sigmoid, Softmax), (Threshold, Argmax)):
        if sum(kind in choices for kind in kinds) != 1:
            names = " or ".join(choice.__name__.lower() for choice in choices)
            raise ConfigError(f"a recipe's postprocessing needs exactly one {names}")
    if kinds.count(ToNativeGrid) > 1:
        raise ConfigError("to_native_grid stands more than once")
    decision = next(i for i, kind in enumerate(kinds) if kind in (Threshold, Argmax))
    activation = next(i for i, kind in enumerate(kinds) if kind in (Sigmoid, Softmax))
    shapes = [i for i, kind in enumerate(kinds) if kind in SHAPE_STEPS]
    if activation > decision or any(index < decision for index in shapes):
        raise ConfigError("the order is: sigmoid or softmax, threshold or argmax, then shapes")
    if Sigmoid in kinds and Argmax in kinds:
        raise ConfigError("argmax needs softmax; sigmoid goes with threshold")
    return tuple(steps) if ToNativeGrid in kinds else (*steps, ToNativeGrid())
