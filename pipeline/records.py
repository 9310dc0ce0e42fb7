"""The values that travel: what is listed, planned, read, predicted and received.

Array suffixes used everywhere: Z slice, H row, W column, C input channel, K output channel,
N batch. `volume_ZHWC` is one case, `mask_HW` one label map, `logits_NKHW` what a network returns.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.config import digest_json
from pipeline.errors import ErrorClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why one image is bad."""

    error_class: ErrorClass
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Locator:
    """Where encoded bytes lie: a file of the source, or a stretch of a shard file.

    path is relative to the source ("" for the source itself). offset is the first byte in it, or
    the row of a Parquet file, -1 for a whole file; item is the position in that row's lists.
    version is the file's at listing, with which it is compared when it is read.
    """

    path: str
    offset: int = -1
    size: int = 0
    version: str = ""
    item: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRef:
    """One encoded image of a case, before anything is read."""

    name: str
    image: Locator | None = None
    mask: Locator | None = None
    problem: Problem | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRef:
    """One case, listed. `version` is cheap to get and changes when the case may have changed."""

    case_id: str
    slices: tuple[SliceRef, ...]
    version: str = ""
    spacing_mm: tuple[float, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """Encoded bytes of all images and masks."""
        return sum(
            locator.size
            for item in self.slices
            for locator in (item.image, item.mask)
            if locator is not None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One unit of input. `cases` is None where only opening the shard tells them."""

    shard_id: str
    path: str
    format: str
    version: str
    size_bytes: int
    cases: tuple[CaseRef, ...] | None = None


@dataclass(slots=True, kw_only=True)
class EncodedSlice:
    """One image as stored, with its reference mask where there is one."""

    name: str
    source_uri: str
    image: bytes | None = None
    mask: bytes | None = None
    image_sha256: str | None = None
    mask_sha256: str | None = None
    problem: Problem | None = None


@dataclass(slots=True, kw_only=True)
class EncodedCase:
    """One case as stored; slices in their order."""

    case_id: str
    slices: list[EncodedSlice]
    spacing_mm: tuple[float, ...] | None = None

    def digest(self) -> str:
        """Hash of everything that decides this case's rows: names, bytes, spacing, problems."""
        return digest_json(
            [
                self.spacing_mm,
                [
                    [s.name, s.image_sha256, s.mask_sha256, s.problem and s.problem.error_class]
                    for s in self.slices
                ],
            ]
        )


def sha256_hex(data: bytes | memoryview) -> str:
    """SHA-256 of bytes, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def shard_id_of(path: str) -> str:
    """Identity of a shard: a hash of its path relative to the source, never of its place."""
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def printable(name: str) -> str:
    """A file name as valid text: bytes that are not UTF-8 become `\\xNN`, nothing else changes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def to_plain(value: Any) -> Any:
    """A dataclass tree as plain JSON values; fields at their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: to_plain(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if getattr(value, item.name) != item.default
        }
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def case_from_plain(values: Mapping[str, Any]) -> CaseRef:
    """The inverse of `to_plain` for a CaseRef."""
    return CaseRef(
        case_id=values["case_id"],
        version=values.get("version", ""),
        spacing_mm=tuple(values["spacing_mm"]) if values.get("spacing_mm") else None,
        slices=tuple(
            SliceRef(
                name=item["name"],
                image=Locator(**item["image"]) if item.get("image") else None,
                mask=Locator(**item["mask"]) if item.get("mask") else None,
                problem=_problem_from_plain(item.get("problem")),
            )
            for item in values["slices"]
        ),
    )


def _problem_from_plain(values: Mapping[str, Any] | None) -> Problem | None:
    if values is None:
        return None
    return Problem(error_class=ErrorClass(values["error_class"]), message=values["message"])


@dataclass(frozen=True, slots=True, kw_only=True)
class OldParts:
    """Where last night's rows of a shard are, by table; None: the table has none."""

    masks: str | None = None
    metrics: str | None = None
    cases: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One shard to write: cases to compute, and cases to copy from last night's parts.

    copy: (case id, its version now) pairs.
    """

    shard_id: str
    path: str
    format: str
    version: str
    size_bytes: int
    compute: tuple[CaseRef, ...]
    copy: tuple[tuple[str, str], ...] = ()
    old: OldParts = field(default_factory=OldParts)

    def key(self, bundle_digest: str, config_digest: str) -> str:
        """What this work's result depends on; equal keys give equal parts."""
        return digest_json([to_plain(self), bundle_digest, config_digest])

    def to_json(self) -> bytes:
        """Compact JSON; the inverse is `work_from_json`."""
        return json.dumps(to_plain(self), separators=(",", ":")).encode("ascii")


def work_from_json(data: bytes) -> Work:
    """The inverse of `Work.to_json`."""
    values = json.loads(data)
    return Work(
        **{
            **values,
            "compute": tuple(case_from_plain(item) for item in values["compute"]),
            "copy": tuple((case_id, version) for case_id, version in values.get("copy", ())),
            "old": OldParts(**values.get("old", {})),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFile:
    """One written Parquet part. `path` is relative to its table's folder."""

    path: str
    sha256: str
    size_bytes: int
    num_rows: int
    stats: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a writer returns for a shard, and the only thing that reaches the driver.

    seconds, num_bytes: what its stages took and moved; see `balance`. bad_by_class: of all images
    that the shard's part holds. bad_images: the first of them as (case_index, slice_index, error
    class), which name nobody and find the row in `masks`.
    """

    shard_id: str
    work_key: str
    num_cases: int
    num_images: int
    num_bad_cases: int
    num_bad: int
    num_computed: int
    num_to_retry: int
    masks: PartFile | None
    metrics: PartFile | None
    cases: PartFile | None
    seconds: dict[str, float] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)
    bad_by_class: dict[str, int] = field(default_factory=dict)
    bad_images: list[tuple[int, int, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Compact JSON; the inverse is `receipt_from_json`."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()


def receipt_from_json(data: bytes) -> Receipt:
    """The inverse of `Receipt.to_json`."""
    values = json.loads(data)
    parts = {
        table: PartFile(**values[table]) if values[table] else None
        for table in ("masks", "metrics", "cases")
    }
    return Receipt(**{**values, **parts, "notes": tuple(values["notes"])})


def row_columns(fields: Iterable[tuple[str, pa.DataType]]) -> pa.Schema:
    """An Arrow schema of nullable columns."""
    return pa.schema([pa.field(name, kind) for name, kind in fields])


_STR, _I64, _F64 = pa.string(), pa.int64(), pa.float64()

SHARD_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("shard_id", _STR),
    ("shard_version", _STR),
    ("bundle_digest", _STR),
    ("config_digest", _STR),
)
"""Equal in all rows of a part, so that the statistics of the Delta log tell them unopened."""

MASKS_SCHEMA = row_columns(
    [
        *SHARD_COLUMNS,
        ("case_index", pa.int32()),  # good cases count up from 0, bad ones down from -1
        ("image_id", _STR),
        ("case_id", _STR),
        ("slice_name", _STR),
        ("slice_index", pa.int32()),
        ("status", _STR),
        ("error_class", _STR),
        ("error", _STR),
        ("source_uri", _STR),
        ("input_sha256", _STR),
        ("reference_sha256", _STR),
        ("case_version", _STR),
        ("case_digest", _STR),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("mask", pa.binary()),
        ("mask_sha256", _STR),
        ("labels", pa.list_(pa.int16())),
        ("run_id", _STR),
        ("numerics", _STR),
    ]
)

IMAGE_IDS: tuple[tuple[str, pa.DataType], ...] = (
    *SHARD_COLUMNS,
    ("image_id", _STR),
    ("case_id", _STR),
    ("slice_index", pa.int32()),
    ("label", pa.int16()),
    ("label_name", _STR),
    ("run_id", _STR),
)

CASE_IDS: tuple[tuple[str, pa.DataType], ...] = (
    *SHARD_COLUMNS,
    ("case_id", _STR),
    ("label", pa.int16()),
    ("label_name", _STR),
    ("run_id", _STR),
    ("num_images", pa.int32()),
    ("num_bad", pa.int32()),
)

UNLABELLED = 255
"""In a target of training: pixels that no loss sees, around patches and where no reference is.

Padding that the recipe adds is background, as it is to the network at inference.
"""

STATUS_OK, STATUS_BAD, STATUS_BAD_REFERENCE = "ok", "bad", "bad_reference"
