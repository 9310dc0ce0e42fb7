"""Parquet case shards, as `reseg shard` writes them, and plain tables of images.

A case shard has one row a case: `case_id`, `slice_names`, `images` (encoded), `masks` (encoded,
null where there is none), `spacing_mm`, `image_sha256`, `mask_sha256`. A plain table has one row
an image: `key` (or `case_id`), `image` and, if there are references, `mask`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import BadImage, ErrorClass
from pipeline.formats.patterns import MISSING_MASK, natural_key
from pipeline.formats.source import (
    FORMATS,
    Format,
    Listing,
    Source,
    broken_shard,
    cap_cases,
    checked_spacing,
    read_archive,
    read_case,
    unique_cases,
    unique_names,
)
from pipeline.formats.tar import list_archives
from pipeline.records import CaseRef, EncodedCase, Locator, Problem, Shard, SliceRef, sha256_hex

_SUFFIXES = (".parquet",)

CASE_SCHEMA = pa.schema(
    [
        ("case_id", pa.string()),
        ("slice_names", pa.list_(pa.string())),
        ("images", pa.list_(pa.large_binary())),
        ("masks", pa.list_(pa.large_binary())),
        ("spacing_mm", pa.list_(pa.float64())),
        ("image_sha256", pa.list_(pa.string())),
        ("mask_sha256", pa.list_(pa.string())),
    ]
)
_KEY_COLUMNS = ("key", "case_id")


def list_shards(source: Source, counted: Callable[[int], None] | None = None) -> Listing:
    """Each Parquet file is a shard."""
    return list_archives(source, counted, _SUFFIXES, "parquet")


def _open(source: Source, path: str) -> pq.ParquetFile:
    """Open a shard with its page checksums verified. Raises BadImage."""
    uri = storage.join(source.uri, path)
    try:
        file = pq.ParquetFile(
            pa.PythonFile(storage.open_reader(uri), mode="r"), page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        message = f"it is not a whole Parquet file ({type(error).__name__})"
        raise BadImage(ErrorClass.CORRUPT_PARQUET, message) from None
    return file


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list_of(kind: pa.DataType, test: Any) -> bool:
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and test(kind.value_type))


def _layout(schema: pa.Schema) -> str:
    """ "cases" or the name of the key column of a plain table. Raises BadImage."""
    kinds = {field.name: field.type for field in schema}
    if (
        _is_text(kinds.get("case_id", pa.null()))
        and _is_list_of(kinds.get("slice_names", pa.null()), _is_text)
        and _is_list_of(kinds.get("images", pa.null()), _is_binary)
        and _is_list_of(kinds.get("masks", pa.list_(pa.binary())), _is_binary)
        and _is_list_of(kinds.get("spacing_mm", pa.list_(pa.float64())), pa.types.is_floating)
    ):
        return "cases"
    masks_fit = "mask" not in kinds or _is_binary(kinds["mask"])
    for name in _KEY_COLUMNS:
        if (
            _is_text(kinds.get(name, pa.null()))
            and masks_fit
            and _is_binary(kinds.get("image", pa.null()))
        ):
            return name
    found = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
    raise BadImage(
        ErrorClass.SCHEMA_MISMATCH,
        "wanted are case_id: string, slice_names: list<string>, images: list<binary>, or "
        f"key: string, image: binary, mask: binary; found are {found[:300]}",
    )


def list_cases(source: Source, shard: Shard) -> list[CaseRef]:
    """The cases of a shard by its id columns; no pixel is read."""
    name = shard.path or source.uri.rsplit("/", 1)[-1]
    try:
        with _open(source, shard.path) as file:
            layout = _layout(file.schema_arrow)
            return _cases(source, file, layout, shard)
    except BadImage as error:
        return [broken_shard(name, error.error_class, error.message)]
    except (pa.ArrowException, OSError) as error:
        message = f"its columns cannot be read ({type(error).__name__})"
        return [broken_shard(name, ErrorClass.CORRUPT_PARQUET, message)]


def _cases(source: Source, file: pq.ParquetFile, layout: str, shard: Shard) -> list[CaseRef]:
    names = file.schema_arrow.names
    wanted = ["case_id", "slice_names", "spacing_mm"] if layout == "cases" else [layout]
    rows = file.read(columns=[name for name in wanted if name in names]).to_pylist()
    masks = _masks_present(file, layout)
    expected = source.config.references == "auto" and any(any(row) for row in masks)
    cases = []
    for number, row in enumerate(rows):
        case_id = row[layout if layout != "cases" else "case_id"]
        spacing_mm, problem = checked_spacing(row.get("spacing_mm"))
        has_mask = dict(enumerate(masks[number] if masks else []))
        slices = [
            SliceRef(
                name=name,
                image=_locator(shard, number, index),
                mask=_locator(shard, number, -1 - index) if has_mask.get(index) else None,
                problem=problem or (MISSING_MASK if expected and not has_mask.get(index) else None),
            )
            for index, name in enumerate(unique_names(row.get("slice_names") or ["0"]))
        ]
        cases.append(
            CaseRef(
                case_id=f"row {number}" if case_id is None else case_id,
                slices=tuple(sorted(slices, key=lambda item: natural_key(item.name))),
                spacing_mm=spacing_mm,
            )
        )
    return cap_cases(source, unique_cases(cases))


def _locator(shard: Shard, row: int, item: int) -> Locator:
    """Where an image is, or, with -1 minus its position as item, its mask."""
    return Locator(path=shard.path, offset=row, version=shard.version, item=item)


def _masks_present(file: pq.ParquetFile, layout: str) -> list[list[bool]]:
    """For each row and slice, whether it has a reference mask."""
    names = file.schema_arrow.names
    if layout == "cases":
        column = next((name for name in ("mask_sha256", "masks") if name in names), None)
        if column is None:
            return []
        return [
            [item.is_valid for item in row] if row.is_valid else []
            for batch in file.iter_batches(batch_size=16, columns=[column])
            for row in batch.column(0)
        ]
    if "mask" not in names:
        return []
    return [
        [bool(valid)]
        for batch in file.iter_batches(batch_size=64, columns=["mask"])
        for valid in batch.column(0).is_valid().to_pylist()
    ]


def read_cases(source: Source, path: str, cases: Sequence[CaseRef]) -> Iterator[EncodedCase]:
    """Read the rows of the cases, a row group at a time, each row once."""
    return read_archive(source, path, cases, lambda readable: _read_rows(source, path, readable))


def _read_rows(source: Source, path: str, readable: list[CaseRef]) -> Iterator[EncodedCase]:
    by_row = {_row_of(case): case for case in readable}
    with _open(source, path) as file:
        layout = _layout(file.schema_arrow)
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            rows = [row for row in range(start, stop) if row in by_row]
            if rows:
                yield from _read_group(source, file, group, start, layout, by_row)
            start = stop


def _row_of(case: CaseRef) -> int:
    locator = case.slices[0].image
    return locator.offset if locator else -1


def _read_group(
    source: Source,
    file: pq.ParquetFile,
    group: int,
    start: int,
    layout: str,
    by_row: dict[int, CaseRef],
) -> Iterator[EncodedCase]:
    names = file.schema_arrow.names
    plain = layout != "cases"
    wanted = ["image", "mask"] if plain else ["images", "masks", "image_sha256", "mask_sha256"]
    try:
        table = file.read_row_group(group, columns=[name for name in wanted if name in names])
    except (pa.ArrowException, OSError):
        table = None

    def fetch(locator: Locator) -> bytes | Problem:
        if table is None:
            message = "the pages of its row group fail their checksums"
            return Problem(error_class=ErrorClass.CORRUPT_PARQUET, message=message)
        return _cell(table, locator, start, plain=plain)

    for index in range(file.metadata.row_group(group).num_rows):
        if start + index in by_row:
            yield read_case(source, by_row[start + index], fetch)


def _cell(table: pa.Table, locator: Locator, start: int, *, plain: bool) -> bytes | Problem:
    """The encoded bytes that a locator means, checked against their digest where there is one."""
    is_mask = locator.item < 0
    position = -1 - locator.item if is_mask else locator.item

    def value(column: str) -> Any:
        cell = (
            table.column(column)[locator.offset - start] if column in table.column_names else None
        )
        if cell is None or not cell.is_valid:
            return None
        if plain:
            return cell.as_py()
        return cell[position].as_py() if position < len(cell) else None

    role = "mask" if is_mask else "image"
    data = value(role if plain else f"{role}s")
    if data is None:
        message = f"the row has no {role}"
        return Problem(error_class=ErrorClass.MISSING_IMAGE, message=message)
    expected = None if plain else value(f"{role}_sha256")
    if expected is not None and sha256_hex(data) != expected:
        message = "its bytes do not have the SHA-256 that the shard says"
        return Problem(error_class=ErrorClass.CHECKSUM_MISMATCH, message=message)
    return bytes(data)


FORMATS.register("parquet")(
    Format(
        suffixes=_SUFFIXES, list_shards=list_shards, list_cases=list_cases, read_cases=read_cases
    )
)
