"""Metrics of the ISBI 2012 challenge, for images of cells that membranes keep apart.

Truth and segmentation are boolean images HW, True inside cells (255 in the challenge's files),
False on membranes. They judge single images, so they are functions and not columns of a table.
Sources: Arganda-Carreras 2015 (Frontiers in Neuroanatomy 9:142) for V_Rand and V_Info; Jain 2010
(CVPR) for the warping error.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse

from pipeline.metrics.source import Mask

_ACROSS = ndimage.generate_binary_structure(2, 1)
_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """split: 1 where no true cell is cut; merge: 1 where no two are joined; score: both in one."""

    split: float
    merge: float
    score: float


def thinned_cells(cells_HW: Mask) -> npt.NDArray[np.int32]:
    """Cells as numbers 1, 2, … (components across faces), membranes given to the nearest cell.

    The border thinning of the challenge, taken to its end: how thick a membrane was drawn does
    not count.
    """
    numbers_HW, count = ndimage.label(cells_HW, _ACROSS)
    if not count:
        return np.zeros(cells_HW.shape, np.int32)
    nearest = ndimage.distance_transform_edt(
        numbers_HW == 0, return_distances=False, return_indices=True
    )
    thinned: npt.NDArray[np.int32] = numbers_HW[tuple(nearest)].astype(np.int32)
    return thinned


def _joint(cells_HW: Mask, truth_HW: Mask) -> Any:
    """Shares of the pixels inside true cells, by segment and true cell; a sparse matrix."""
    inside = truth_HW
    true_numbers = ndimage.label(truth_HW, _ACROSS)[0][inside]
    segments = thinned_cells(cells_HW)[inside]
    ones = np.ones(len(segments))
    counts = sparse.coo_array((ones, (segments, true_numbers))).tocsr()
    return counts / max(1, len(segments))


def v_rand(cells_HW: Mask, truth_HW: Mask) -> Agreement:
    """Foreground-restricted Rand score after border thinning.

    With p_ij the share of pixels in segment i and true cell j, s_i and t_j its sums: split =
    sum p^2 / sum t^2, merge = sum p^2 / sum s^2, score = 2 sum p^2 / (sum s^2 + sum t^2).
    """
    joint = _joint(cells_HW, truth_HW)
    together = float((joint.data**2).sum())
    s_squared = float((np.asarray(joint.sum(1)) ** 2).sum())
    t_squared = float((np.asarray(joint.sum(0)) ** 2).sum())
    return Agreement(
        split=_ratio(together, t_squared),
        merge=_ratio(together, s_squared),
        score=_ratio(2 * together, s_squared + t_squared),
    )


def v_info(cells_HW: Mask, truth_HW: Mask) -> Agreement:
    """Foreground-restricted information score after border thinning.

    With I the mutual information of segment and true cell and H their entropies: split = I / H(S),
    merge = I / H(T), score = 2 I / (H(S) + H(T)). Where nothing can be told apart, 1.
    """
    joint = _joint(cells_HW, truth_HW)
    h_joint = _entropy(joint.data)
    h_s, h_t = _entropy(np.asarray(joint.sum(1))), _entropy(np.asarray(joint.sum(0)))
    mutual = max(0.0, h_s + h_t - h_joint)
    return Agreement(
        split=_ratio(mutual, h_s), merge=_ratio(mutual, h_t), score=_ratio(2 * mutual, h_s + h_t)
    )


def _entropy(shares: npt.NDArray[Any]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 1e-12 else 1.0


def pixel_error(cells_HW: Mask, truth_HW: Mask) -> float:
    """Share of the pixels that differ."""
    return float(np.mean(cells_HW != truth_HW))


def warping_error(cells_HW: Mask, truth_HW: Mask) -> float:
    """Share of pixels that still differ after the truth was warped towards the segmentation.

    A warp flips one simple point after the other, so no cell is joined, cut, made or lost by it:
    what stays different are errors of topology, not of where a border runs. Cells connect across
    faces, membranes also across corners; outside the image is membrane. Flips are taken in order
    of their distance to the true border, which bounds the least error from above (as Jain 2010).
    """
    height, width = truth_HW.shape
    warped = np.zeros((height + 2, width + 2), np.uint8)
    warped[1:-1, 1:-1] = truth_HW
    target = np.zeros_like(warped)
    target[1:-1, 1:-1] = cells_HW
    depth = ndimage.distance_transform_edt(warped) + ndimage.distance_transform_edt(1 - warped)
    rows, columns = np.nonzero(warped != target)
    order = np.argsort(depth[rows, columns], kind="stable")
    waiting = list(zip(rows[order].tolist(), columns[order].tolist(), strict=True))
    simple = _simple_points()
    while waiting:
        left = [(y, x) for y, x in waiting if not _flip_if_simple(warped, y, x, simple)]
        if len(left) == len(waiting):
            break
        waiting = left
    return float(len(waiting) / (height * width))


def _flip_if_simple(image: npt.NDArray[np.uint8], y: int, x: int, simple: list[bool]) -> bool:
    code = 0
    for bit, (down, right) in enumerate(_RING):
        code |= int(image[y + down, x + right]) << bit
    if simple[code]:
        image[y, x] ^= 1
        return True
    return False


@lru_cache(maxsize=1)
def _simple_points() -> list[bool]:
    """For each ring of eight neighbours whether its centre can flip without changing topology.

    That is so if exactly one face-connected piece of foreground touches the centre across a face,
    and exactly one corner-connected piece of background touches it (Bertrand 1994).
    """
    table = []
    for code in range(256):
        ring = np.zeros((3, 3), bool)
        for bit, (down, right) in enumerate(_RING):
            ring[1 + down, 1 + right] = bool(code >> bit & 1)
        pieces, _ = ndimage.label(ring, _ACROSS)
        touching = {int(v) for v in pieces[_ACROSS] if v} - {0}
        background = ~ring
        background[1, 1] = False
        _, outside = ndimage.label(background, np.ones((3, 3)))
        table.append(len(touching) == 1 and outside == 1)
    return table
