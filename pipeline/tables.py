"""The three tables: their columns, and their Parquet parts.

A part holds the rows of one shard, is named by its content and never changes.
"""

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ResultsError
from pipeline.metrics import metric_columns
from pipeline.records import (
    CASE_IDS,
    IMAGE_IDS,
    MASKS_SCHEMA,
    SHARD_COLUMNS,
    PartFile,
    row_columns,
    sha256_hex,
)

TABLES = ("metrics", "cases", "masks")
"""In the order in which a night commits them; the last one publishes."""

_PART_NAME = re.compile(
    r"part-[0-9a-f]{16}-([0-9a-f]{40})(?:-([0-9a-f]{16}))?(?:-[0-9a-f]{8})?\.parquet"
)
_TAIL_BYTES = 64 << 10  # one request; the footer of a part takes 5 to 20 KB
_END_BYTES = 8  # of the footer: its length, and the magic number


@cache
def table_schema(table: str) -> pa.Schema:
    """The Arrow schema of "masks", "metrics" or "cases"."""
    if table == "masks":
        return MASKS_SCHEMA
    certainty = [("confidence", pa.float64()), ("entropy", pa.float64())]
    if table == "metrics":
        size = [("area_mm2", pa.float64())]
        return row_columns([*IMAGE_IDS, *size, *certainty, *metric_columns("image")])
    size = [("volume_ml", pa.float64())]
    return row_columns([*CASE_IDS, *size, *certainty, *metric_columns("case")])


# Parts


def part_prefix(shard_id: str) -> str:
    """How the names of all parts of a shard begin."""
    return f"part-{shard_id[:16]}-"


def content_digest(part_name: str) -> str:
    """The first 40 digits of the SHA-256 of a part, which its name holds; "" for another name."""
    match = _PART_NAME.fullmatch(part_name)
    return match.group(1) if match else ""


def write_part(
    results: str, table: str, rows: pa.Table, shard_id: str, run_id: str
) -> PartFile | None:
    """Write the rows of one shard as an immutable part; None for no rows.

    Its name tells shard, content, footer and run. The footer, since Parquet has no checksum over
    it, and a reader of a few columns does not read the content. The run, so that no run ever writes
    a part that another one left behind, which a vacuum may be about to collect.
    """
    if not rows.num_rows:
        return None
    data = encode_part(rows)
    digest = sha256_hex(data)
    run = sha256_hex(run_id.encode())[:8]
    footer = sha256_hex(_footer(io.BytesIO(data), len(data)))
    name = f"{part_prefix(shard_id)}{digest[:40]}-{footer[:16]}-{run}.parquet"
    storage.write(storage.join(results, table, name), data)
    return PartFile(
        path=name,
        sha256=digest,
        size_bytes=len(data),
        num_rows=rows.num_rows,
        stats=_statistics(rows),
    )


def encode_part(rows: pa.Table) -> bytes:
    """Parquet: zstd, a checksum on every page, the binary column without a dictionary."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows,
        sink,
        compression="zstd",
        use_dictionary=[
            name for name in rows.schema.names if name not in ("mask", "labels", "bbox")
        ],
        write_page_checksum=True,
        row_group_size=512,
        data_page_size=256 << 10,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def decode_part(data: bytes, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of a part's bytes, as rows."""
    rows: list[dict[str, Any]] = pq.ParquetFile(pa.BufferReader(data)).read(columns).to_pylist()
    return rows


def _statistics(rows: pa.Table) -> dict[str, Any]:
    """Delta statistics: what is equal in all rows of the part, and the counts a plan needs."""
    constants = {name: rows.column(name)[0].as_py() for name, _ in SHARD_COLUMNS}
    bounds: list[dict[str, Any]] = [dict(constants), dict(constants)]
    nulls = dict.fromkeys(constants, 0)
    if "case_index" in rows.schema.names:
        for bound, value in zip(
            bounds, pc.min_max(rows.column("case_index")).as_py().values(), strict=True
        ):
            bound["case_index"] = value
        nulls["error_class"] = rows.column("error_class").null_count
    return {
        "numRecords": rows.num_rows,
        "minValues": bounds[0],
        "maxValues": bounds[1],
        "nullCount": nulls,
    }


def read_part(
    results: str, table: str, path: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read one part with its page checksums verified. Raises ResultsError if it is damaged."""
    with _opened(results, table, path) as file:
        return file.read(columns)


def read_masks(
    results: str, path: str, rows: Sequence[int]
) -> dict[int, npt.NDArray[np.uint8] | None]:
    """The label maps (HW) of some rows of a part of `masks`, by row; None where an image has none.

    Only the row groups that hold them are read. Raises ResultsError if the part is damaged.
    """
    wanted, found = set(rows), {}
    columns = ["height", "width", "mask", "mask_sha256"]
    with _opened(results, "masks", path) as file:
        start = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            here = sorted(row for row in wanted if start <= row < start + size)
            if here:
                table = file.read_row_group(group, columns)
                for row in here:
                    found[row] = _label_map(table.slice(row - start, 1).to_pylist()[0])
            start += size
    return found


def _label_map(row: dict[str, Any]) -> npt.NDArray[np.uint8] | None:
    if row["mask"] is None:
        return None
    return np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"])


@contextmanager
def _opened(results: str, table: str, path: str) -> Iterator[pq.ParquetFile]:
    """A part, its footer checked and the page checksums verified as it is read.

    What is wrong with it is a ResultsError.
    """
    uri = storage.join(results, table, path)
    try:
        with storage.open_reader(uri) as reader:
            metadata = _checked_metadata(reader, path, uri)
            with pa.PythonFile(reader, mode="r") as file:
                yield pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)
    except FileNotFoundError:
        raise ResultsError(f"the part {uri} of a published night is gone") from None
    except (pa.ArrowException, OSError) as error:
        raise ResultsError(f"the part {uri} is damaged ({type(error).__name__}: {error})") from None


def _checked_metadata(reader: BinaryIO, name: str, uri: str) -> pq.FileMetaData:
    """What the footer says, if it has the digest that is in the part's name.

    Of single-bit flips in an unchecked footer, one in 24 reads silently wrong: most of them rename
    a column.
    """
    footer = _footer(reader, reader.seek(0, os.SEEK_END))
    match = _PART_NAME.fullmatch(name)
    if match and match.group(2) and sha256_hex(footer)[:16] != match.group(2):
        raise ResultsError(f"the part {uri} is damaged (its footer is not as it was written)")
    return pq.read_metadata(pa.BufferReader(footer))


def _footer(reader: BinaryIO, size_bytes: int) -> bytes:
    """The footer of a Parquet file with its length and magic number; less if it is cut."""

    def last(length: int) -> bytes:
        reader.seek(size_bytes - length)
        return reader.read(length)  # without a length it would be read in many small requests

    tail = last(min(_TAIL_BYTES, size_bytes))
    length = int.from_bytes(tail[-_END_BYTES:][:4], "little") + _END_BYTES
    if len(tail) < length <= size_bytes:
        tail = last(length)
    return tail[-length:]
