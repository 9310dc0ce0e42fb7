"""One U-Net family: the article's, Ronneberger 2015, milesial's, Buda's, any width and depth.

Sources: Ronneberger, Fischer, Brox 2015 (arXiv 1505.04597); milesial/Pytorch-UNet; Buda, Saha,
Mazurowski 2019 and mateuszbuda/brain-segmentation-pytorch; the seed article's listing with its
`super()` calls repaired. All return logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.models.source import MODELS, Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetOptions:
    """Everything that distinguishes the members of the family.

    up: transposed convolutions, or interpolation, which halves the bottom's width.
    concat: which half of a decoder's input comes first, "up" or "skip".
    hidden: width between a decoder block's two convolutions: its output's, or half its input's.
    norm: batch norm after each 3x3 convolution. bias: biases in the 3x3 convolutions.
    valid: unpadded convolutions, so that the output is smaller than the input (2015).
    """

    in_channels: int = 3
    out_channels: int = 1
    width: int = 32
    depth: int = 4
    up: Literal["transposed", "nearest", "bilinear"] = "transposed"
    concat: Literal["up_first", "skip_first"] = "up_first"
    hidden: Literal["output", "half_input"] = "output"
    norm: bool = True
    bias: bool = False
    valid: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "width", "depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"unet.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"unet.dropout must be in [0, 1), not {self.dropout}")
        if max(self.in_channels, self.out_channels) > 1024:
            raise ConfigError(
                f"a U-Net of {self.in_channels} input and {self.out_channels} output channels"
                " is too large"
            )
        if self.depth > 8 or self.width > 1024:
            raise ConfigError(f"a U-Net of depth {self.depth} and width {self.width} is too large")
        if self.width % 2 and self.up != "transposed":
            raise ConfigError(f"unet.width must be even to be halved, not {self.width}")

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels after each encoder stage, the bottom last."""
        widths = [self.width << level for level in range(self.depth + 1)]
        if self.up != "transposed":
            widths[-1] //= 2
        return tuple(widths)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels after each decoder stage, the topmost last."""
        skips = self.encoder_widths[-2::-1]
        if self.up == "transposed":
            return skips
        return tuple(max(skip // 2, self.width) for skip in skips)


class ConvBlock(nn.Sequential):
    """Two 3x3 convolutions, each with its norm and ReLU."""

    def __init__(self, inputs: int, hidden: int, outputs: int, options: UNetOptions) -> None:
        layers: list[nn.Module] = []
        for before, after in ((inputs, hidden), (hidden, outputs)):
            padding = 0 if options.valid else 1
            layers.append(nn.Conv2d(before, after, 3, padding=padding, bias=options.bias))
            if options.norm:
                layers.append(nn.BatchNorm2d(after))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class UNet(nn.Module):
    """The network of `options`: images NCHW to logits NKHW.

    Odd sizes are padded on the way up as milesial does; with `valid`, skips are cropped centrally
    as in 2015.
    """

    def __init__(self, options: UNetOptions) -> None:
        super().__init__()
        self.options = options
        widths = options.encoder_widths
        inputs = (options.in_channels, *widths[:-1])
        self.encoder = nn.ModuleList(
            ConvBlock(before, after, after, options)
            for before, after in zip(inputs, widths, strict=True)
        )
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        below = widths[-1]
        for skip, after in zip(widths[-2::-1], options.decoder_widths, strict=True):
            raised = skip if options.up == "transposed" else below
            self.up.append(_raise(below, raised, options))
            hidden = after if options.hidden == "output" else (raised + skip) // 2
            self.decoder.append(ConvBlock(raised + skip, hidden, after, options))
            below = after
        self.head = nn.Conv2d(below, options.out_channels, 1)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits NKHW."""
        features, skips = images_NCHW, []
        for level, block in enumerate(self.encoder):
            features = block(features if level == 0 else functional.max_pool2d(features, 2))
            skips.append(features)
        features = self.dropout(skips.pop())
        for raise_up, block in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            raised = raise_up(features)
            if self.options.valid:
                skip = _centre(skip, raised.shape)
            elif raised.shape[-2:] != skip.shape[-2:]:
                raised = _pad_to(raised, skip.shape)
            first, second = (raised, skip) if self.options.concat == "up_first" else (skip, raised)
            features = block(torch.cat([first, second], dim=1))
        logits_NKHW: torch.Tensor = self.head(features)
        return logits_NKHW


def _raise(inputs: int, outputs: int, options: UNetOptions) -> nn.Module:
    if options.up == "transposed":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
    if options.up == "nearest":
        return nn.Upsample(scale_factor=2, mode="nearest")
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)


def _centre(skip: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    top, left = (skip.shape[-2] - shape[-2]) // 2, (skip.shape[-1] - shape[-1]) // 2
    return skip[..., top : top + shape[-2], left : left + shape[-1]]


def _pad_to(raised: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    down, right = shape[-2] - raised.shape[-2], shape[-1] - raised.shape[-1]
    return functional.pad(raised, [right // 2, right - right // 2, down // 2, down - down // 2])


def input_padding(
    options: UNetOptions, height: int, width: int
) -> tuple[tuple[int, int, int, int], bool]:
    """Padding (top, bottom, left, right) under which the output covers height x width.

    Padded networks take any size of at least 2^depth, and get zeros at the bottom and right up to
    that; valid ones get mirrored pixels around, the overlap-tile strategy of 2015.
    """
    if not options.valid:
        least = 1 << options.depth
        return (0, max(0, least - height), 0, max(0, least - width)), False
    needed = [_valid_input(options, size) for size in (height, width)]
    top, left = (_valid_margin(options),) * 2
    return (top, needed[0] - height - top, left, needed[1] - width - left), True


def valid_output(options: UNetOptions, size: int) -> int:
    """Side of the output of a valid network for an input side, 0 if it cannot be run."""
    for _ in range(options.depth):
        size -= 4
        if size < 2 or size % 2:
            return 0
        size //= 2
    size -= 4
    for _ in range(options.depth):
        size = 2 * size - 4
    return max(size, 0)


def _valid_margin(options: UNetOptions) -> int:
    """How far the output lies inside the input, on each side."""
    size = next(s for s in range(1, 1 << 16) if valid_output(options, s) > 0)
    return (size - valid_output(options, size)) // 2


def _valid_input(options: UNetOptions, size: int) -> int:
    """The smallest side that can be run and whose output is at least `size`."""
    side = size + 2 * _valid_margin(options)
    while valid_output(options, side) < size:
        side += 1
    return side


MODELS.register("unet")(
    Architecture(
        options=UNetOptions,
        build=UNet,
        channels=lambda options: (options.in_channels, options.out_channels),
        input_padding=input_padding,
    )
)


# Published layouts: the same network under other names of tensors.

_SLOTS = {"conv1": "0", "norm1": "1", "conv2": "3", "norm2": "4"}
"""A block's layers by role, as positions in a conv-norm-relu-conv-norm-relu sequence."""

LAYOUTS = ("buda", "milesial", "article")


def layout_names(layout: str, depth: int) -> dict[str, str]:
    """Published module names to ours, for a network of the family with batch norm."""
    names = {}
    for level in range(depth + 1):
        for role, slot in _SLOTS.items():
            names[_encoder_name(layout, level, depth, role, slot)] = f"encoder.{level}.{slot}"
    for step in range(depth):
        if layout == "buda":
            names[f"upconv{depth - step}"] = f"up.{step}"
        elif layout == "milesial":
            names[f"up{step + 1}.up"] = f"up.{step}"
        for role, slot in _SLOTS.items():
            names[_decoder_name(layout, step, depth, role, slot)] = f"decoder.{step}.{slot}"
    names[{"buda": "conv", "milesial": "outc.conv", "article": "outcoming"}[layout]] = "head"
    return names


def _encoder_name(layout: str, level: int, depth: int, role: str, slot: str) -> str:
    if layout == "buda":
        stage = "bottleneck" if level == depth else f"encoder{level + 1}"
        short = "bottleneck" if level == depth else f"enc{level + 1}"
        return f"{stage}.{short}{role}"
    if layout == "milesial":
        stage = "inc" if level == 0 else f"down{level}.maxpool_conv.1"
        return f"{stage}.double_conv.{slot}"
    return f"incoming.{slot}" if level == 0 else f"down{level}.conv.{slot}"


def _decoder_name(layout: str, step: int, depth: int, role: str, slot: str) -> str:
    if layout == "buda":
        return f"decoder{depth - step}.dec{depth - step}{role}"
    if layout == "milesial":
        return f"up{step + 1}.conv.double_conv.{slot}"
    return f"up{step + 1}.conv.{slot}"


def _split(key: str) -> tuple[str, str]:
    module, _, tensor = key.rpartition(".")
    return module, tensor


def from_published(
    state: Mapping[str, torch.Tensor], layout: str, depth: int
) -> dict[str, torch.Tensor]:
    """A published state dict under our names; unknown names are kept, for the error to show."""
    names = layout_names(layout, depth)
    return {
        ".".join([names.get(module, module), tensor]): value
        for (module, tensor), value in ((_split(key), value) for key, value in state.items())
    }


def to_published(
    state: Mapping[str, torch.Tensor], layout: str, depth: int
) -> dict[str, torch.Tensor]:
    """Our state dict under a published layout's names."""
    names = {ours: theirs for theirs, ours in layout_names(layout, depth).items()}
    return {
        ".".join([names[module], tensor]): value
        for (module, tensor), value in ((_split(key), value) for key, value in state.items())
    }


def published_options(state: Mapping[str, torch.Tensor], layout: str) -> UNetOptions | None:
    """The options that a published state dict was made with, or None if it is of another kind."""
    first = {
        "buda": "encoder1.enc1conv1.weight",
        "milesial": "inc.double_conv.0.weight",
        "article": "incoming.0.weight",
    }[layout]
    last = {"buda": "conv.weight", "milesial": "outc.conv.weight", "article": "outcoming.weight"}
    if first not in state or last[layout] not in state:
        return None
    if state[first].ndim != 4 or state[last[layout]].ndim != 4:
        return None
    width, in_channels = int(state[first].shape[0]), int(state[first].shape[1])
    out_channels = int(state[last[layout]].shape[0])
    common: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "width": width,
    }
    if layout == "buda":
        return UNetOptions(**common, depth=4, up="transposed", concat="up_first")
    if layout == "article":
        return UNetOptions(**common, depth=5, up="nearest", concat="up_first", bias=True)
    if any(key.startswith("up1.up.") for key in state):
        return UNetOptions(**common, depth=4, up="transposed", concat="skip_first")
    return UNetOptions(**common, depth=4, up="bilinear", concat="skip_first", hidden="half_input")


def swap_decoder_halves(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict with the input halves of each decoder's first convolution exchanged.

    What one network reads as (upsampled, skip) another reads as (skip, upsampled): with the swap
    both give the same logits. Only for transposed up-convolutions, where the halves are equal.
    """
    swapped = dict(state)
    for key, value in state.items():
        if key.startswith("decoder.") and key.endswith(".0.weight"):
            first, second = value.chunk(2, dim=1)
            swapped[key] = torch.cat([second, first], dim=1)
    return swapped
