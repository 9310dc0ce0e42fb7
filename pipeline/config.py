"""Configuration: frozen dataclasses, decoded strictly from TOML, `--set` and named options.

Precedence: defaults < file < `--set a.b=c` < named options. An unknown key, a wrong type or a
value outside its choices is an error that names the table, the key and what is known.
"""

import dataclasses
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.errors import ConfigError

T = TypeVar("T")


def parse_mask_values(text: str) -> dict[int, int]:
    """`"0=0,255=1"` as {0: 0, 255: 1}; raises ValueError."""
    return {int(k): int(v) for k, _, v in (item.partition("=") for item in text.split(",") if item)}


_MOST = 100_000_000
"""Of anything that is counted in a configuration: more is a slip of the finger."""
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_KEY = re.compile(rf"([A-Za-z0-9.-]{{1,253}}/)?{_LABEL.pattern}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """How files become cases. Part of what decides the output."""

    format: Literal["auto", "folder", "tar", "parquet"] = "auto"
    images: str = ""
    """Pattern of the image files, as `{case}/{case}_{slice}.tif`; empty: each file is a case."""
    masks: str = ""
    """Pattern of the reference masks, with the same fields."""
    references: Literal["auto", "optional", "ignore"] = "auto"
    """auto: where a source has reference masks, an image without one is reported."""
    mask_values: str = ""
    """What the grey values of a reference mean, as `0=0,255=1`; empty: by the stated rule."""
    spacing_mm: tuple[float, ...] = ()
    """(z, y, x) or (y, x) of every case that does not carry its own; empty: unknown."""

    def __post_init__(self) -> None:
        try:
            labels = parse_mask_values(self.mask_values).values()
        except ValueError:
            raise ConfigError(
                f"source.mask_values {self.mask_values!r} is not of the form 0=0,255=1"
            ) from None
        if not all(0 <= label <= 254 for label in labels):
            raise ConfigError(f"source.mask_values {self.mask_values!r}: labels are 0 to 254")
        if len(self.spacing_mm) not in (0, 2, 3) or any(not 0 < s < 1e6 for s in self.spacing_mm):
            raise ConfigError(
                f"source.spacing_mm is (z, y, x) or (y, x) in mm, not {list(self.spacing_mm)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """Caps that hostile or broken input runs into before it costs anything."""

    max_pixels: int = 1 << 26
    max_file_bytes: int = 1 << 30
    max_archive_bytes: int = 64 << 30
    max_member_bytes: int = 256 << 20
    max_case_bytes: int = 4 << 30
    """Of all files of a case, as they are stored: a case is held in memory whole."""
    max_case_pixels: int = 1 << 29
    """Of all slices of a case, decoded."""
    decode_timeout_s: float = 30.0
    decode_memory_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if not 0 < getattr(self, item.name) < math.inf:
                raise ConfigError(
                    f"limits.{item.name} must be above 0, not {getattr(self, item.name)}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceConfig:
    """How the network is run. `batch_size`, `threads` and `forward_batch` change no label."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    tta: bool = False
    """Average over horizontal and vertical flips (four passes)."""
    window: int = 1024
    """Images with a longer side are predicted in overlapping windows; 0: never."""
    overlap: float = 0.25
    batch_size: int = 32
    """Slices handed to the network at once; padded to whole forward passes."""
    forward_batch: int = 0
    """Slices of one forward pass, always exactly this many; 0: 2 on CPU, 16 on a GPU."""
    threads: int = 0
    """CPU threads of one actor; 0: one, so that bits do not depend on the number of actors."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"inference.batch_size must be at least 1, not {self.batch_size}")
        if self.forward_batch < 0 or self.threads < 0 or self.window < 0:
            raise ConfigError("inference.forward_batch, threads and window cannot be negative")
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"inference.overlap must be in [0, 1), not {self.overlap}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceConfig:
    """Who computes. Never part of what decides the output."""

    actors: int = 0
    """Processes that hold the network; 0: one a GPU, or one a CPU core where there are none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_gpus: int = 0
    """At most so many GPUs of a cluster; 0: all of them."""
    nodes_like: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes that may hold the network, as accelerator-type = "A10G"."""
    wait_for_nodes_s: float = 900.0
    """How long an autoscaling cluster may take until its first node for the network is up."""
    decoders: int = 1
    """Sandboxed decoder processes beside each actor."""
    read_tasks_cpus: float = 0.25
    finish_tasks_cpus: float = 0.5
    object_store_bytes: int = 0
    stall_timeout_s: float = 1800.0
    max_retries: int = 3
    straggler_factor: float = 5.0
    """The last shards are computed again elsewhere after so many times the median shard; 0: never."""
    straggler_floor_s: float = 120.0
    """... but never before so many seconds in which no shard was done."""

    def __post_init__(self) -> None:
        if self.actors < 0 or self.max_gpus < 0 or self.decoders < 1:
            raise ConfigError(
                "resources.actors and resources.max_gpus cannot be negative, resources.decoders is >= 1"
            )
        for key, value in self.nodes_like.items():
            if not (_LABEL_KEY.fullmatch(key) and _LABEL.fullmatch(str(value))):
                raise ConfigError(
                    f"resources.nodes_like: {f'{key}={value}'!r} is no label of a node: letters, "
                    "digits and . _ - inside, at most 63, as market-type=spot"
                )
        if self.stall_timeout_s <= 0:
            raise ConfigError("resources.stall_timeout_s must be above 0")
        if min(self.wait_for_nodes_s, self.straggler_factor, self.straggler_floor_s) < 0:
            raise ConfigError(
                "resources.wait_for_nodes_s, straggler_factor and straggler_floor_s cannot be negative"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentConfig:
    """Everything `reseg plan` and `reseg segment` can be told."""

    source: SourceConfig = field(default_factory=SourceConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"max_bad_share must be between 0 and 1, not {self.max_bad_share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """Who trains, who judges: whole patients, by hash of the patient, or by name."""

    patient: str = "{patient}"
    """Which part of a case id is the patient, as `{patient}_*`; as much as fits is taken."""
    validation: float = 0.2
    test: float = 0.0
    """Shares of patients; test patients are neither trained on nor looked at."""
    folds: int = 0
    fold: int = 0
    """With folds > 0 the patients of fold number `fold` (from 0) validate, all others train."""
    validation_patients: tuple[str, ...] = ()
    test_patients: tuple[str, ...] = ()
    """Patients by name; where given, they replace the share."""

    def __post_init__(self) -> None:
        if not (
            0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1
        ):
            raise ConfigError(
                f"split.validation {self.validation} and split.test {self.test} are shares of the "
                "patients and leave nothing to train on"
            )
        if self.folds and not (self.folds > 1 and 0 <= self.fold < self.folds):
            raise ConfigError(
                f"split.fold {self.fold} of split.folds {self.folds}: at least 2 folds, counted from 0"
            )
        if self.folds and self.validation_patients:
            raise ConfigError("split.folds and split.validation_patients exclude each other")
        if self.patient.count("{patient}") != 1:
            raise ConfigError(
                f"split.patient {self.patient!r} has no {{patient}}, or more than one"
            )
        both = sorted(set(self.validation_patients) & set(self.test_patients))
        if both:
            raise ConfigError(f"patient {both[0]!r} is in validation_patients and in test_patients")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The network to train, from scratch or from a bundle's weights."""

    architecture: str = ""
    """Empty: the one of `init`, else unet."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the architecture; channels follow from the recipe, the labels and the images."""
    init: str = ""
    """A bundle whose weights training starts from; with other labels the head starts anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeConfig:
    """What happens to a volume before and after the network; goes into the bundle as it is."""

    ready: str = ""
    """Name of a ready recipe; empty: that of `model.init`, else `zscore`."""
    side: int = 0
    """Height and width that the recipe's resize step makes instead of its own; 0: its own."""
    preprocess: tuple[Mapping[str, Any], ...] = ()
    postprocess: tuple[Mapping[str, Any], ...] = ()
    """Steps in full, instead of those of the ready recipe."""

    def __post_init__(self) -> None:
        if self.side < 0:
            raise ConfigError(f"recipe.side cannot be negative, it is {self.side}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Which slices make an epoch, and in which order."""

    by: Literal["uniform", "foreground"] = "uniform"
    """uniform: each slice once; foreground: drawn, patients evenly, slices by lesion area."""
    slices_per_epoch: int = 0
    """0: as many as there are."""
    patch: int = 0
    """Side of random square crops; 0: whole slices, which must then be of one size."""
    cache_bytes: int = 4 << 30
    """Memory for decoded volumes in each worker; slices are shuffled among those that fit."""

    def __post_init__(self) -> None:
        if self.slices_per_epoch < 0 or self.patch < 0 or self.cache_bytes < 1:
            raise ConfigError(
                "sampling.slices_per_epoch and patch cannot be negative, cache_bytes is above 0"
            )
        if self.slices_per_epoch > _MOST or self.patch > 1 << 15:
            raise ConfigError(
                f"sampling.slices_per_epoch {self.slices_per_epoch} or patch {self.patch} is absurd"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """Ranges of random changes; 0 turns one off. Geometry always, intensity by `probability`."""

    flip_horizontal: float = 0.5
    flip_vertical: float = 0.0
    """Probabilities."""
    rotation_deg: float = 15.0
    scale: float = 0.05
    """A factor between 1 - scale and 1 + scale."""
    shift: float = 0.0
    """Share of the side."""
    elastic_px: float = 0.0
    """Standard deviation of the displacement at the knots of a coarse grid."""
    elastic_knots: int = 6
    gamma: float = 0.0
    """The exponent is between exp(-gamma) and exp(gamma)."""
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    """Greatest standard deviation; images have one of about 1 after a z-score."""
    blur_px: float = 0.0
    """Greatest sigma."""
    probability: float = 0.3
    """Of each intensity change, for each image."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if not 0 <= getattr(self, item.name) < 1e4:
                raise ConfigError(f"augment.{item.name} cannot be {getattr(self, item.name)}")
        if max(self.flip_horizontal, self.flip_vertical, self.probability) > 1:
            raise ConfigError("augment: flips and probability are probabilities, at most 1")
        if self.scale >= 1 or self.contrast >= 1 or self.shift >= 1 or self.rotation_deg > 180:
            raise ConfigError("augment: scale, contrast and shift are below 1, rotation up to 180")
        if self.elastic_knots < 3:
            raise ConfigError(f"augment.elastic_knots is at least 3, not {self.elastic_knots}")


Activation = Literal["sigmoid", "softmax"]
"""What a recipe makes of logits: one probability a label, or one of background and labels."""

LossTerm = Literal["cross_entropy", "bce", "dice", "focal", "tversky", "boundary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """A weighted sum of losses; formulas and sources in `pipeline/losses.py`."""

    terms: Mapping[str, float] = field(default_factory=dict)
    """Weights by name; empty: dice = 1 and, by the recipe's activation, bce or cross_entropy = 1."""
    class_weights: tuple[float, ...] = ()
    """Of background, label 1, label 2, …, for cross_entropy and boundary; empty: equal."""
    dice_over: Literal["batch", "image"] = "batch"
    smooth: float = 1.0
    focal_gamma: float = 2.0
    tversky_alpha: float = 0.3
    tversky_beta: float = 0.7
    """Weights of false positives and of false negatives."""
    boundary_weight: float = 10.0
    boundary_sigma_px: float = 5.0

    def __post_init__(self) -> None:
        known = typing.get_args(LossTerm)
        for name, weight in self.terms.items():
            if name not in known:
                raise ConfigError(
                    f"[loss.terms] unknown loss {name!r}; known are: {', '.join(known)}"
                )
            if not 0 <= weight < math.inf:
                raise ConfigError(f"[loss.terms] {name} = {weight} is not a weight")
        if self.terms and not any(self.terms.values()):
            raise ConfigError("[loss.terms] all weights are 0")
        if any(not 0 <= weight < math.inf for weight in self.class_weights):
            raise ConfigError(f"loss.class_weights {list(self.class_weights)} are not weights")
        if self.boundary_sigma_px <= 0:
            raise ConfigError(f"loss.boundary_sigma_px is above 0, not {self.boundary_sigma_px}")
        for name in ("smooth", "focal_gamma", "tversky_alpha", "tversky_beta", "boundary_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name} cannot be negative, it is {getattr(self, name)}")


def loss_terms(config: LossConfig, activation: Activation) -> dict[str, float]:
    """The weights of the terms in use. Raises ConfigError for one that the activation excludes."""
    entropy = "cross_entropy" if activation == "softmax" else "bce"
    terms = {k: v for k, v in config.terms.items() if v} or {"dice": 1.0, entropy: 1.0}
    other = "bce" if activation == "softmax" else "cross_entropy"
    if other in terms:
        raise ConfigError(
            f"[loss.terms] {other} does not go with a recipe that ends in {activation}: "
            f"take {entropy}, or another recipe"
        )
    if config.class_weights and not terms.keys() & {"cross_entropy", "boundary"}:
        raise ConfigError("loss.class_weights: no term of the loss uses them")
    if config.class_weights and activation == "sigmoid":
        raise ConfigError("loss.class_weights need a recipe that ends in softmax")
    return terms


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """How weights move."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.99
    """Of sgd, in Nesterov's form."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    accumulate: int = 1
    """Forward passes that a worker's share of a batch is cut into."""
    ema: float = 0.99
    """Decay of the averaged weights, which are validated and exported; 0: no averaging."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or self.weight_decay < 0 or self.clip_norm < 0:
            raise ConfigError(
                "optimizer: lr is above 0, weight_decay and clip_norm are not negative"
            )
        if not 0 <= self.momentum < 1 or not 0 <= self.ema < 1:
            raise ConfigError("optimizer: momentum and ema are in [0, 1)")
        if self.accumulate < 1:
            raise ConfigError(f"optimizer.accumulate is at least 1, not {self.accumulate}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate changes: a warm-up, then one of four courses."""

    name: Literal["constant", "cosine", "poly", "plateau"] = "cosine"
    warmup_steps: int = 50
    """At most a tenth of all updates."""
    final_share: float = 0.01
    """Of lr, at the end of cosine and poly, and the least of plateau."""
    power: float = 0.9
    """Of poly: (1 - progress) ^ power."""
    patience: int = 5
    factor: float = 0.5
    """Of plateau: after `patience` validations without a better score lr is multiplied by this."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.patience < 1 or not 0 <= self.final_share <= 1:
            raise ConfigError("schedule: warmup_steps >= 0, patience >= 1, final_share in [0, 1]")
        if not 0 < self.factor < 1 or self.power <= 0:
            raise ConfigError("schedule: factor is in (0, 1), power is above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsConfig:
    """How the network is run while it learns."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    channels_last: bool = True
    compile: bool = False
    activation_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResourceConfig:
    """Who computes. May differ when a training is taken up again."""

    workers: int = 0
    """0: one a GPU, or one on CPUs."""
    min_workers: int = 0
    """Go on with as few as this when machines are lost; 0: always `workers`."""
    threads: int = 0
    """CPU threads of one worker; 0: all cores, shared out among the workers of a machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    readers: int = 2
    """Decoding threads of each worker, each with a sandboxed decoder process."""
    max_failures: int = 3
    """How often workers may die before training ends; it can then still be resumed."""
    stall_timeout_s: float = 1800.0
    """How long workers wait for one of them, before all are started anew."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.threads < 0 or self.readers < 1 or self.max_failures < 0:
            raise ConfigError("resources: workers, threads, max_failures >= 0, readers >= 1")
        if not 1 <= self.stall_timeout_s < math.inf:
            raise ConfigError(
                f"resources.stall_timeout_s must be 1 or more, not {self.stall_timeout_s:g}"
            )
        if self.threads > 1024 or self.readers > 256:
            raise ConfigError(
                f"resources: {self.threads} threads or {self.readers} readers is absurd"
            )
        if self.min_workers < 0 or (self.workers and self.min_workers > self.workers):
            raise ConfigError(
                f"resources.min_workers {self.min_workers} is more than workers {self.workers}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything `reseg train` can be told."""

    name: str = ""
    """Of the bundle; empty: that of its folder."""
    labels: tuple[str, ...] = ("foreground",)
    """Names of the labels 1, 2, …; 0 is background."""
    epochs: int = 50
    batch_size: int = 16
    """Slices of one update, over all workers."""
    seed: int = 0
    validate_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    early_stop: int = 0
    """Validations without a better score after which training ends; 0: never."""
    checkpoint_steps: int = 0
    """Updates between checkpoints within an epoch; 0: only at the end of each."""
    calibrate_threshold: bool = False
    """Choose the exported recipe's threshold by validation Dice."""
    max_bad_share: float = 0.05
    tensorboard: bool = False
    also: tuple[str, ...] = ()
    """Files with lists of more labelled cases; a case of the same id replaces the source's."""
    source: SourceConfig = field(default_factory=SourceConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    resources: TrainResourceConfig = field(default_factory=TrainResourceConfig)

    def __post_init__(self) -> None:
        if not 1 <= len(self.labels) <= 254 or len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"labels {list(self.labels)}: 1 to 254 different names")
        for name in (*self.labels, self.name or "x"):
            if not name.strip() or not name.isprintable() or "/" in name:
                raise ConfigError(f"{name!r} cannot be a name: printable text without a slash")
        for key in ("epochs", "batch_size", "validate_every"):
            if not 1 <= getattr(self, key) <= _MOST:
                raise ConfigError(f"{key} must be at least 1 and sane, not {getattr(self, key)}")
        if min(self.early_stop, self.checkpoint_steps) < 0 or not 0 <= self.seed < 1 << 31:
            raise ConfigError(
                "early_stop and checkpoint_steps cannot be negative, seed is between 0 and 2^31"
            )
        if self.resources.workers > self.batch_size:
            raise ConfigError(
                f"{self.resources.workers} workers cannot share a batch of {self.batch_size} slices"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"max_bad_share must be between 0 and 1, not {self.max_bad_share}")
        if self.loss.class_weights and len(self.loss.class_weights) != len(self.labels) + 1:
            raise ConfigError(
                f"loss.class_weights has {len(self.loss.class_weights)} weights; background and "
                f"{len(self.labels)} labels need {len(self.labels) + 1}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceList:
    """What `reseg train --also` takes beside its source: cases with corrected masks, in a file."""

    uri: str
    """Where they are; a relative path counts from the list's own folder."""
    source: SourceConfig = field(default_factory=SourceConfig)
    cases: tuple[str, ...] = ()
    """Of these ids only; empty: all."""


_MAY_CHANGE = ("resources", "max_bad_share", "tensorboard")


def training_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], where: str = ""
) -> list[str]:
    """What differs between two resolved training configurations and would change the weights."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        if not where and key in _MAY_CHANGE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += training_differences(old, new, f"{where}{key}.")
        elif old != new:
            found.append(f"{where}{key}: {old!r} there, {new!r} now")
    return found


_LAYOUT_ONLY = {
    "source": ("format",),
    "limits": ("decode_timeout_s", "decode_memory_bytes"),
    "inference": ("batch_size", "forward_batch", "threads"),
    "resources": None,
}


def output_digest(config: SegmentConfig) -> str:
    """Hash of the settings that can change a published mask or metric, and of nothing else.

    The number of actors, the batch size and the allowed share of bad images are left out: the
    network always runs the same padded shape, so they do not reach a mask.
    """
    values = dataclasses.asdict(config)
    values.pop("max_bad_share")
    for table, keys in _LAYOUT_ONLY.items():
        if keys is None:
            values.pop(table)
        else:
            for key in keys:
                values[table].pop(key)
    return digest_json(values)


def digest_json(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def decode(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `kind` from plain values, strictly.

    Raises ConfigError for an unknown key, a wrong type or a value outside a Literal.
    """
    hints = typing.get_type_hints(kind)
    known = {item.name for item in dataclasses.fields(typing.cast(Any, kind))}
    for key in values:
        if key not in known:
            label = f"[{where}] " if where else ""
            raise ConfigError(f"{label}unknown key {key!r}; known are: {', '.join(sorted(known))}")
    decoded = {
        key: _decode_value(hints[key], value, f"{where}.{key}" if where else key)
        for key, value in values.items()
    }
    return kind(**decoded)


def _decode_value(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), _table(value, where), where)
    if origin is Literal:
        return _decode_choice(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(hint, value, where)
    if origin is Mapping:
        inner = typing.get_args(hint)[1]
        items = _table(value, where).items()
        return {key: _decode_value(inner, item, f"{where}.{key}") for key, item in items}
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{where} is a list, not {value!r}")
        inner = typing.get_args(hint)[0]
        return tuple(_decode_value(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    return _decode_plain(hint, value, where)


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is a table, not {value!r}")
    return value


def _decode_choice(hint: Any, value: Any, where: str) -> Any:
    choices = typing.get_args(hint)
    if value not in choices or isinstance(value, bool) != any(
        isinstance(choice, bool) for choice in choices if choice == value
    ):
        raise ConfigError(f"{where} = {value!r} is not one of {', '.join(map(repr, choices))}")
    return value


def _decode_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value} is not a finite number")
    if not isinstance(hint, type) or type(value) is not hint:
        name = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{where} = {value!r} is of type {type(value).__name__}, not {name}")
    return value


def _decode_union(hint: Any, value: Any, where: str) -> Any:
    choices = typing.get_args(hint)
    if value is None and type(None) in choices:
        return None
    for choice in choices:
        if choice is not type(None):
            return _decode_value(choice, value, where)
    raise ConfigError(f"{where} = {value!r} does not fit {hint}")


def load_config(
    kind: type[T],
    path: str | Path | None = None,
    assignments: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> T:
    """Merge file, `--set` assignments and named options into one checked `kind`.

    path: TOML file, or None. assignments: `table.key=value` with a TOML value (a bare word is a
    string). options: dotted keys to values; a value of None means "not given".
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {text!r} is not of the form table.key=value")
        _assign(values, key.strip(), _parse_toml_value(value.strip()))
    for key, value in (options or {}).items():
        if value is not None:
            _assign(values, key, value)
    try:
        return decode(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path is not None else str(error)) from None


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *tables, key = dotted.split(".")
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {table!r} is not a table")
        values = inner
    values[key] = value


def _parse_toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
