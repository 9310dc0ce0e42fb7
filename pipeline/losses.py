"""Losses of segmentation networks: plain functions of logits and a label map.

Shapes: logits_NKHW are float, target_NHW is an integer label map, 0 background, UNLABELLED where a
pixel does not count. A network ends in one of two activations, as its recipe says: "softmax"
(channel 0 background, channel k label k) or "sigmoid" (channel k - 1 is the logit of label k).
All is computed in float32, whatever autocast made of the logits. Where no pixel counts, a loss
is 0 and has gradients of 0, never NaN.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch.nn import functional

from pipeline.config import Activation, LossConfig, loss_terms
from pipeline.records import UNLABELLED

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(logits_NKHW, target_NHW, boundary weights NHW or None) to a scalar."""


def cross_entropy(
    logits_NKHW: torch.Tensor,
    target_NHW: torch.Tensor,
    class_weights_K: torch.Tensor | None = None,
    pixel_weights_NHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax cross-entropy: sum(w_t * -log p_t) / sum(w_t) over the pixels that count.

    The average of torch's `CrossEntropyLoss(weight, ignore_index)`, except that it is 0 where
    torch's is 0/0. With pixel weights, w_t is the product of both, and the sum is divided by the
    sum of class weights alone (Ronneberger 2015, eq. 1, normalised).
    """
    target = target_NHW.long()
    counted = target != UNLABELLED
    losses = functional.cross_entropy(
        logits_NKHW.float(),
        target,
        weight=class_weights_K,
        ignore_index=UNLABELLED,
        reduction="none",
    )
    if pixel_weights_NHW is not None:
        losses = losses * pixel_weights_NHW
    share = counted.float()
    if class_weights_K is not None:
        share = share * class_weights_K[target.where(counted, 0)]
    return losses.sum() / _at_least_one(share.sum())


def binary_cross_entropy(
    logits_NKHW: torch.Tensor,
    target_NHW: torch.Tensor,
    pixel_weights_NHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over labels and counted pixels of log(1 + e^z) - y z, one sigmoid a label."""
    labels_NKHW, counted_N1HW = one_hot(target_NHW, logits_NKHW.shape[1], "sigmoid")
    losses = functional.binary_cross_entropy_with_logits(
        logits_NKHW.float(), labels_NKHW, reduction="none"
    )
    if pixel_weights_NHW is not None:
        losses = losses * pixel_weights_NHW[:, None]
    total = counted_N1HW.sum() * logits_NKHW.shape[1]
    return (losses * counted_N1HW).sum() / _at_least_one(total)


def soft_dice(
    logits_NKHW: torch.Tensor,
    target_NHW: torch.Tensor,
    activation: Activation,
    *,
    over: Literal["batch", "image"] = "batch",
    smooth: float = 1.0,
) -> torch.Tensor:
    """1 - (2 sum(p y) + s) / (sum(p) + sum(y) + s), averaged over labels; background left out.

    Source: Milletari 2016 (arXiv 1606.04797) without the squares, as Buda 2019 uses it: sums over
    the whole batch. over "image": sums over each image, then the average of images.
    """
    p_NKHW, y_NKHW, counts = _overlap_inputs(logits_NKHW, target_NHW, activation)
    axes = (0, 2, 3) if over == "batch" else (2, 3)
    overlap = (p_NKHW * y_NKHW).sum(axes)
    total = p_NKHW.sum(axes) + y_NKHW.sum(axes)
    dice = (2 * overlap + smooth) / (total + smooth).clamp_min(1e-6)
    return _average(1 - dice, counts, over)


def tversky(
    logits_NKHW: torch.Tensor,
    target_NHW: torch.Tensor,
    activation: Activation,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 1.0,
) -> torch.Tensor:
    """1 - (tp + s) / (tp + alpha fp + beta fn + s) with soft counts over the batch.

    Source: Salehi 2017 (arXiv 1706.05721). alpha = beta = 1/2 with half of the smoothing is
    `soft_dice`.
    """
    p_NKHW, y_NKHW, counts = _overlap_inputs(logits_NKHW, target_NHW, activation)
    tp = (p_NKHW * y_NKHW).sum((0, 2, 3))
    fp = p_NKHW.sum((0, 2, 3)) - tp
    fn = y_NKHW.sum((0, 2, 3)) - tp
    index = (tp + smooth) / (tp + alpha * fp + beta * fn + smooth).clamp_min(1e-6)
    return _average(1 - index, counts, "batch")


def focal(
    logits_NKHW: torch.Tensor,
    target_NHW: torch.Tensor,
    activation: Activation,
    *,
    gamma: float = 2.0,
) -> torch.Tensor:
    """Mean of -(1 - p_t)^gamma log p_t over counted pixels (and labels, with sigmoid).

    Source: Lin 2017 (arXiv 1708.02002), without its alpha. gamma = 0 is cross-entropy.
    """
    logits = logits_NKHW.float()
    counted = target_NHW != UNLABELLED
    if activation == "softmax":
        target = target_NHW.long().where(counted, 0)
        log_p_NHW = torch.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
        losses = -_power(1 - log_p_NHW.exp(), gamma) * log_p_NHW * counted
        return losses.sum() / _at_least_one(counted.sum())
    labels_NKHW, counted_N1HW = one_hot(target_NHW, logits.shape[1], "sigmoid")
    log_p_NKHW = functional.logsigmoid(torch.where(labels_NKHW > 0, logits, -logits))
    losses = -_power(1 - log_p_NKHW.exp(), gamma) * log_p_NKHW * counted_N1HW
    return losses.sum() / _at_least_one(counted_N1HW.sum() * logits.shape[1])


def _power(distance: torch.Tensor, gamma: float) -> torch.Tensor:
    """distance^gamma, whose slope stays finite at 0 also for gamma below 1."""
    return distance.clamp_min(1e-6) ** gamma


def one_hot(
    target_NHW: torch.Tensor, num_channels: int, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """The target as float maps NKHW, one a channel, and which pixels count, N1HW (float)."""
    counted_N1HW = (target_NHW != UNLABELLED)[:, None]
    first = 1 if activation == "sigmoid" else 0
    labels_K = torch.arange(first, first + num_channels, device=target_NHW.device)
    maps_NKHW = target_NHW[:, None] == labels_K[None, :, None, None]
    return maps_NKHW.float(), counted_N1HW.float()


def _overlap_inputs(
    logits_NKHW: torch.Tensor, target_NHW: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities and targets of the labels (no background), 0 where ignored; pixels an image."""
    logits = logits_NKHW.float()
    maps_NKHW, counted_N1HW = one_hot(target_NHW, logits.shape[1], activation)
    if activation == "softmax":
        p_NKHW, maps_NKHW = torch.softmax(logits, 1)[:, 1:], maps_NKHW[:, 1:]
    else:
        p_NKHW = torch.sigmoid(logits)
    return p_NKHW * counted_N1HW, maps_NKHW * counted_N1HW, counted_N1HW.sum((1, 2, 3))


def _average(losses: torch.Tensor, counts_N: torch.Tensor, over: str) -> torch.Tensor:
    """The mean over labels, and over the images that have a counted pixel; 0 if none has."""
    seen_N = (counts_N > 0).float()
    if over == "batch":
        return losses.mean() * seen_N.max()
    return (losses.mean(1) * seen_N).sum() / _at_least_one(seen_N.sum())


def _at_least_one(total: torch.Tensor) -> torch.Tensor:
    """A divisor that is 1 where the sum over it is empty."""
    return torch.where(total > 0, total, torch.ones_like(total))


def boundary_weights(
    mask_HW: npt.NDArray[np.uint8], weight: float = 10.0, sigma_px: float = 5.0
) -> npt.NDArray[np.float32]:
    """1 + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) on background: gaps between close objects count more.

    d1, d2: distances of a pixel to the nearest and second nearest object, objects being the
    components of the foreground. Source: Ronneberger 2015 (arXiv 1505.04597), eq. 2; w0 = 10 and
    sigma = 5 px there. The class balance of the paper is left to class weights.
    """
    objects_HW, count = ndimage.label((mask_HW > 0) & (mask_HW != UNLABELLED))
    if count < 2:
        return np.ones(mask_HW.shape, np.float32)
    nearest = np.full(mask_HW.shape, np.inf)
    second = nearest.copy()
    for number in range(1, count + 1):
        distance = ndimage.distance_transform_edt(objects_HW != number)
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    gap = np.exp(-((nearest + second) ** 2) / (2 * sigma_px**2))
    weights_HW: npt.NDArray[np.float32] = (1 + weight * gap * (objects_HW == 0)).astype(np.float32)
    return weights_HW


def make_loss(config: LossConfig, activation: Activation) -> Loss:
    """The configured sum as one function. Raises ConfigError for terms that do not fit."""
    terms = loss_terms(config, activation)
    weights = torch.tensor(config.class_weights) if config.class_weights else None

    def balance(logits: torch.Tensor) -> torch.Tensor | None:
        return None if weights is None else weights.to(logits.device)

    def boundary(
        logits: torch.Tensor, target: torch.Tensor, pixels: torch.Tensor | None
    ) -> torch.Tensor:
        if activation == "sigmoid":
            return binary_cross_entropy(logits, target, pixels)
        return cross_entropy(logits, target, balance(logits), pixels)

    functions: dict[str, Loss] = {
        "cross_entropy": lambda z, t, _: cross_entropy(z, t, balance(z)),
        "bce": lambda z, t, _: binary_cross_entropy(z, t),
        "dice": lambda z, t, _: soft_dice(
            z, t, activation, over=config.dice_over, smooth=config.smooth
        ),
        "tversky": lambda z, t, _: tversky(
            z,
            t,
            activation,
            alpha=config.tversky_alpha,
            beta=config.tversky_beta,
            smooth=config.smooth,
        ),
        "focal": lambda z, t, _: focal(z, t, activation, gamma=config.focal_gamma),
        "boundary": boundary,
    }

    def loss(
        logits_NKHW: torch.Tensor, target_NHW: torch.Tensor, pixels_NHW: torch.Tensor | None = None
    ) -> torch.Tensor:
        values = [
            weight * functions[name](logits_NKHW, target_NHW, pixels_NHW)
            for name, weight in terms.items()
        ]
        return torch.stack(values).sum()

    return loss
