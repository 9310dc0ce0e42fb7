"""Recipes: what happens to a volume before the network, and to its logits and labels after.

A recipe is data: two lists of named steps with their options, stored in the bundle, so that
training and inference cannot disagree and a job cannot change it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import decode
from pipeline.errors import BundleError, ConfigError
from pipeline.transforms import postprocess, preprocess
from pipeline.transforms.postprocess import POSTPROCESS
from pipeline.transforms.preprocess import PREPROCESS

__all__ = [
    "READY_RECIPES",
    "Recipe",
    "postprocess",
    "preprocess",
    "recipe_from_plain",
    "with_decision",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps in order; each is an options dataclass of one registered step."""

    preprocess: tuple[Any, ...]
    postprocess: tuple[Any, ...]

    def to_plain(self) -> dict[str, Any]:
        """Plain values for `bundle.json`; the inverse is `recipe_from_plain`."""
        return {
            "preprocess": [_step_to_plain(step, PREPROCESS) for step in self.preprocess],
            "postprocess": [_step_to_plain(step, POSTPROCESS) for step in self.postprocess],
        }


def _step_to_plain(step: Any, registry: Any) -> dict[str, Any]:
    name = next(name for name, kind in registry.items() if kind is type(step))
    return {"step": name, **dataclasses.asdict(step)}


def recipe_from_plain(values: Mapping[str, Any]) -> Recipe:
    """Decode and check a recipe. Raises BundleError naming the step that does not fit."""
    try:
        unknown = set(values) - {"preprocess", "postprocess"}
        if unknown:
            raise ConfigError(f"unknown part {sorted(unknown)[0]!r}")
        before = _steps(values.get("preprocess", []), PREPROCESS)
        after = postprocess.check_order(_steps(values.get("postprocess", []), POSTPROCESS))
        return Recipe(preprocess=before, postprocess=after)
    except (ConfigError, TypeError, AttributeError, KeyError) as error:
        raise BundleError(f"the recipe cannot be used: {error}") from None


def _steps(items: Sequence[Mapping[str, Any]], registry: Any) -> tuple[Any, ...]:
    return tuple(
        decode(registry[item["step"]], {k: v for k, v in item.items() if k != "step"}, item["step"])
        for item in items
    )


def with_decision(steps: Sequence[Mapping[str, Any]], num_channels: int) -> list[dict[str, Any]]:
    """Plain postprocessing steps with the activation and the decision that a head needs.

    One output channel: sigmoid and threshold; more: softmax and argmax. Steps that are right
    already keep their options.
    """
    one = num_channels == 1
    activation, decision = ("sigmoid", "threshold") if one else ("softmax", "argmax")
    wanted = {
        "sigmoid": activation,
        "softmax": activation,
        "threshold": decision,
        "argmax": decision,
    }
    return [
        dict(step)
        if wanted.get(step["step"], step["step"]) == step["step"]
        else {"step": wanted[step["step"]]}
        for step in steps
    ]


READY_RECIPES: dict[str, dict[str, Any]] = {
    "buda-lgg": {
        "preprocess": [
            {"step": "to_channels", "count": 3},
            {"step": "drop_end_slices"},
            {"step": "zero_below_share", "share": 0.1},
            {"step": "crop_to_content"},
            {"step": "pad_to_square"},
            {"step": "scale_to_range"},
            {"step": "resize", "height": 256, "width": 256, "order": 2},
            {"step": "percentile_rescale", "low": 10.0, "high": 99.0},
            {"step": "zscore", "over": "volume"},
        ],
        "postprocess": [
            {"step": "sigmoid"},
            {"step": "threshold", "at": 0.5},
            {"step": "largest_component", "dimensions": 3, "connectivity": "face"},
            {"step": "to_native_grid"},
        ],
    },
    "milesial": {
        "preprocess": [
            {"step": "to_channels", "count": 3},
            {"step": "scale_by", "factor": 0.5},
            {"step": "unit_if_above_one"},
        ],
        "postprocess": [{"step": "to_native_grid"}, {"step": "softmax"}, {"step": "argmax"}],
    },
    "zscore": {
        "preprocess": [
            {"step": "to_channels", "count": 3},
            {"step": "percentile_rescale", "low": 0.5, "high": 99.5},
            {"step": "zscore", "over": "volume"},
            {"step": "pad_to_multiple", "of": 16},
        ],
        "postprocess": [
            {"step": "sigmoid"},
            {"step": "threshold", "at": 0.5},
            {"step": "to_native_grid"},
        ],
    },
    "unit-range": {
        "preprocess": [
            {"step": "to_channels", "count": 3},
            {"step": "scale_to_range"},
            {"step": "pad_to_multiple", "of": 32},
        ],
        "postprocess": [
            {"step": "sigmoid"},
            {"step": "threshold", "at": 0.5},
            {"step": "to_native_grid"},
        ],
    },
}
"""Recipes by name; `reseg bundle import --recipe` takes one. Numbers of channels are adapted."""
