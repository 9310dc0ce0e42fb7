"""What an architecture offers to bundles and to the predictor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """options: a frozen dataclass type; build(options) gives a module from NCHW to logits NKHW.

    channels(options): how many the input and the output have. input_padding(options, height,
    width): (top, bottom, left, right) pixels to add so that the output covers height x width from
    its top left corner, and whether they are mirrored pixels (else zeros).
    """

    options: type
    build: Callable[[Any], nn.Module]
    channels: Callable[[Any], tuple[int, int]]
    input_padding: Callable[[Any, int, int], tuple[tuple[int, int, int, int], bool]]


MODELS = Registry[Architecture]("architecture")
