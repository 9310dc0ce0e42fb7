"""Configuration: frozen dataclasses, decoded strictly from TOML, `--set` and named options.

Precedence: defaults < file < `--set a.b=c` < named options. An unknown key, a wrong type or a
value outside its choices is an error that names the table, the key and what is known.
"""

import dataclasses
import hashlib
import json
import math
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
            parse_mask_values(self.mask_values)
        except ValueError:
            raise ConfigError(
                f"source.mask_values {self.mask_values!r} is not of the form 0=0,255=1"
            ) from None
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
    decoders: int = 1
    """Sandboxed decoder processes beside each actor."""
    read_tasks_cpus: float = 0.25
    finish_tasks_cpus: float = 0.5
    object_store_bytes: int = 0
    stall_timeout_s: float = 1800.0
    max_retries: int = 3

    def __post_init__(self) -> None:
        if self.actors < 0 or self.decoders < 1:
            raise ConfigError("resources.actors cannot be negative, resources.decoders is >= 1")
        if self.stall_timeout_s <= 0:
            raise ConfigError("resources.stall_timeout_s must be above 0")


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
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a table, not {value!r}")
        return decode(typing.cast(type, hint), value, where)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices or isinstance(value, bool) != any(
            isinstance(choice, bool) for choice in choices if choice == value
        ):
            raise ConfigError(f"{where} = {value!r} is not one of {', '.join(map(repr, choices))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_union(hint, value, where)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{where} is a list, not {value!r}")
        inner = typing.get_args(hint)[0]
        return tuple(_decode_value(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
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
