"""Random changes of training batches, on the device the batch is on.

Every number is a pure function of a sample's seed and of the change it belongs to: turning one
change on or off leaves the others as they were, and a resumed run sees what an unbroken one saw.
Images are interpolated bilinearly, label maps and everything else that must stay categorical by
nearest neighbour, both through the same grid; what comes in from outside repeats the border.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pipeline.config import AugmentConfig

Seeds = npt.NDArray[np.uint64]

_CHANGES = (
    *("flip", "rotation", "scale", "shift", "elastic", "gamma"),
    *("brightness", "contrast", "noise", "blur", "crop"),
)
_STREAMS = {name: np.uint64(number) for number, name in enumerate(_CHANGES, start=1)}


def sample_seeds(seed: int, epoch: int, positions_N: npt.NDArray[np.int64]) -> Seeds:
    """The seeds of samples at some positions of an epoch: a pure function of all three."""
    root = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
    return _mix(root + positions_N.astype(np.uint64))


def uniform(seeds_N: Seeds, stream: str, count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1) for each seed, shape (N, count); streams are independent.

    Counter-based: the output function of SplitMix64 (Steele, Lea, Flood 2014) over (seed, stream,
    counter), for a whole batch at once.
    """
    with np.errstate(over="ignore"):
        start_N = _mix(seeds_N + _STREAMS[stream] * np.uint64(0xD1342543DE82EF95))
        counters = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(start_N[:, None] + counters[None])
    return (bits >> np.uint64(11)).astype(np.float64) / (1 << 53)


def _mix(values: Seeds) -> Seeds:
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def augment(
    images_NCHW: torch.Tensor,
    labels_NHW: torch.Tensor,
    seeds_N: Seeds,
    config: AugmentConfig,
    weights_NHW: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A changed batch: images float32, labels as they came in, pixel weights where there are any.

    seeds: one a sample, from `sample_seeds`.
    """
    if _bends(config):
        grid_NHW2 = _grid(seeds_N, config, images_NCHW)
        images_NCHW = _sample(images_NCHW, grid_NHW2, "bilinear")
        labels_NHW = _sample(labels_NHW[:, None].float(), grid_NHW2, "nearest")[:, 0].to(
            labels_NHW.dtype
        )
        if weights_NHW is not None:
            weights_NHW = _sample(weights_NHW[:, None], grid_NHW2, "bilinear")[:, 0]
    else:
        flips = _flips(seeds_N, config)
        images_NCHW = _flip(images_NCHW, flips)
        labels_NHW = _flip(labels_NHW, flips)
        weights_NHW = None if weights_NHW is None else _flip(weights_NHW, flips)
    return _change_intensity(images_NCHW, seeds_N, config), labels_NHW, weights_NHW


# Geometry


def _bends(config: AugmentConfig) -> bool:
    return any((config.rotation_deg, config.scale, config.shift, config.elastic_px))


def _flips(seeds_N: Seeds, config: AugmentConfig) -> npt.NDArray[np.bool_]:
    """(N, 2): whether to mirror rows (vertically) and columns (horizontally)."""
    return uniform(seeds_N, "flip", 2) < np.array([config.flip_vertical, config.flip_horizontal])


def _flip(values: torch.Tensor, flips_N2: npt.NDArray[np.bool_]) -> torch.Tensor:
    for axis, chosen_N in zip((-2, -1), flips_N2.T, strict=True):
        if chosen_N.any():
            chosen = torch.from_numpy(chosen_N).to(values.device)
            shape = (-1, *[1] * (values.ndim - 1))
            values = torch.where(chosen.reshape(shape), values.flip(axis), values)
    return values


def _between(values: npt.NDArray[np.float64], reach: float) -> npt.NDArray[np.float64]:
    """[0, 1) to [-reach, reach)."""
    return (2 * values - 1) * reach


def _grid(seeds_N: Seeds, config: AugmentConfig, images_NCHW: torch.Tensor) -> torch.Tensor:
    """Where each output pixel comes from, as `grid_sample` wants it: x, y in -1 … 1.

    Rotation and scale are about the centre and in pixels, so that a circle stays one in images
    that are not square.
    """
    height, width = images_NCHW.shape[-2:]
    angle_N = np.deg2rad(_between(uniform(seeds_N, "rotation", 1)[:, 0], config.rotation_deg))
    factor_N = 1 + _between(uniform(seeds_N, "scale", 1)[:, 0], config.scale)
    shift_N2 = _between(uniform(seeds_N, "shift", 2), config.shift)
    mirror_N2 = 1 - 2.0 * _flips(seeds_N, config)
    cos_N, sin_N = np.cos(angle_N) / factor_N, np.sin(angle_N) / factor_N
    ratio = height / width
    rows = [
        np.stack([cos_N, -sin_N * ratio, 2 * shift_N2[:, 1]], axis=1) * mirror_N2[:, 1:],
        np.stack([sin_N / ratio, cos_N, 2 * shift_N2[:, 0]], axis=1) * mirror_N2[:, :1],
    ]
    matrices_N23 = torch.from_numpy(np.stack(rows, axis=1)).float().to(images_NCHW.device)
    grid = functional.affine_grid(matrices_N23, list(images_NCHW.shape), align_corners=False)
    if config.elastic_px:
        grid = grid + _elastic(seeds_N, config, images_NCHW)
    return grid


def _elastic(seeds_N: Seeds, config: AugmentConfig, images_NCHW: torch.Tensor) -> torch.Tensor:
    """Displacements NHW2: Gaussian at the knots of a coarse grid, bicubic in between.

    The deformation of Ronneberger 2015, who used a 3 x 3 grid and 10 px.
    """
    height, width = images_NCHW.shape[-2:]
    knots = config.elastic_knots
    flat = uniform(seeds_N, "elastic", 4 * knots * knots)
    radius = np.sqrt(-2 * np.log(1 - flat[:, : 2 * knots * knots]))
    gauss = radius * np.cos(2 * math.pi * flat[:, 2 * knots * knots :])
    coarse = torch.from_numpy(gauss.reshape(-1, 2, knots, knots)).float().to(images_NCHW.device)
    fine_N2HW = functional.interpolate(
        coarse, size=(height, width), mode="bicubic", align_corners=True
    )
    to_grid = torch.tensor([2 / width, 2 / height], device=fine_N2HW.device)
    return fine_N2HW.permute(0, 2, 3, 1) * (config.elastic_px * to_grid)


def _sample(values_NCHW: torch.Tensor, grid_NHW2: torch.Tensor, mode: str) -> torch.Tensor:
    return functional.grid_sample(
        values_NCHW.float(), grid_NHW2, mode=mode, padding_mode="border", align_corners=False
    )


# Intensity


def _change_intensity(
    images_NCHW: torch.Tensor, seeds_N: Seeds, config: AugmentConfig
) -> torch.Tensor:
    device = images_NCHW.device

    def strengths(stream: str, reach: float, both_ways: bool = True) -> torch.Tensor | None:
        """(N, 1, 1, 1) strengths, 0 for samples that are left alone; None if all are."""
        if not reach:
            return None
        chance_N, amount_N = uniform(seeds_N, stream, 2).T
        amount_N = _between(amount_N, reach) if both_ways else amount_N * reach
        amount_N = np.where(chance_N < config.probability, amount_N, 0.0)
        if not amount_N.any():
            return None
        return torch.from_numpy(amount_N).float().to(device)[:, None, None, None]

    if (amount := strengths("blur", config.blur_px, both_ways=False)) is not None:
        images_NCHW = _blur(images_NCHW, amount, config.blur_px)
    if (amount := strengths("gamma", config.gamma)) is not None:
        images_NCHW = _gamma(images_NCHW, amount)
    if (amount := strengths("contrast", config.contrast)) is not None:
        mean = images_NCHW.mean((2, 3), keepdim=True)
        images_NCHW = (images_NCHW - mean) * (1 + amount) + mean
    if (amount := strengths("brightness", config.brightness)) is not None:
        images_NCHW = images_NCHW + amount
    if (amount := strengths("noise", config.noise, both_ways=False)) is not None:
        images_NCHW = images_NCHW + amount * _noise(images_NCHW, seeds_N)
    return images_NCHW


def _gamma(images_NCHW: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """x^exp(amount) over each image's own range, which it keeps."""
    low = images_NCHW.amin((1, 2, 3), keepdim=True)
    extent = (images_NCHW.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-6)
    changed = ((images_NCHW - low) / extent) ** amount.exp() * extent + low
    return torch.where(amount != 0, changed, images_NCHW)


def _noise(images_NCHW: torch.Tensor, seeds_N: Seeds) -> torch.Tensor:
    """Standard normal noise, each image from a generator of its own."""
    noise = torch.empty_like(images_NCHW)
    for image_CHW, seed in zip(noise, _mix(seeds_N + _STREAMS["noise"]), strict=True):
        generator = torch.Generator(images_NCHW.device).manual_seed(int(seed >> np.uint64(1)))
        image_CHW.normal_(generator=generator)
    return noise


def _blur(images_NCHW: torch.Tensor, sigma: torch.Tensor, greatest: float) -> torch.Tensor:
    """A Gaussian of each image's own sigma, separable, mirrored at the borders."""
    n, c, height, width = images_NCHW.shape
    reach = min(math.ceil(3 * greatest), height - 1, width - 1)
    offsets = torch.arange(-reach, reach + 1, device=sigma.device, dtype=torch.float32)
    exponent = -0.5 * (offsets[None] / sigma.reshape(n, 1).clamp_min(1e-3)) ** 2
    kernel_NR = torch.softmax(exponent, dim=1)
    kernels = kernel_NR.repeat_interleave(c, dim=0)[:, None]
    flat = functional.pad(images_NCHW.reshape(1, n * c, height, width), [reach] * 4, mode="reflect")
    flat = functional.conv2d(flat, kernels[:, :, None, :], groups=n * c)
    flat = functional.conv2d(flat, kernels[:, :, :, None], groups=n * c)
    return torch.where(sigma > 0, flat.reshape(n, c, height, width), images_NCHW)


def crop_corners(
    seeds_N: Seeds, sizes_N2: npt.NDArray[np.int64], side: int
) -> npt.NDArray[np.int64]:
    """Top left corners (N, 2) of random square crops; negative where an image is smaller."""
    room_N2 = sizes_N2 - side
    chosen = np.floor(uniform(seeds_N, "crop", 2) * (np.maximum(room_N2, 0) + 1)).astype(np.int64)
    return np.where(room_N2 >= 0, chosen, -((-room_N2) // 2))


__all__ = ["augment", "crop_corners", "sample_seeds", "uniform"]
