"""Writing case shards: Parquet or tar, some 128 MB each, a case never split, deterministic.

The same source gives the same bytes: cases in order of their ids, no clock and no path in a
file. Encoded images travel as they are, so a shard holds what its source held, bad images
included, under the same ids. An interrupted run is taken up where it stopped.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import digest_json
from pipeline.errors import RETRIED_ERRORS, BadImage, ConfigError, SourceError
from pipeline.formats import FORMATS, Source
from pipeline.formats.parquet import CASE_SCHEMA
from pipeline.formats.tar import SIDECAR_SUFFIX
from pipeline.images import sniff
from pipeline.planning import check_apart
from pipeline.records import CaseRef, EncodedCase, Shard, sha256_hex, to_plain

INDEX_FILE = "reseg-shards.json"
_ROW_GROUP_BYTES = 16 << 20
_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "TIFF": "tif", "BMP": "bmp", "WEBP": "webp"}

Kind = Literal["parquet", "tar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingSummary:
    """What `reseg shard` did."""

    num_shards: int
    num_written: int
    num_cases: int
    num_images: int
    size_bytes: int


def write_shards(
    source: Source,
    destination: str,
    kind: Kind,
    shard_bytes: int = 128 << 20,
    report: Callable[[int, int, str], None] | None = None,
) -> ShardingSummary:
    """Write all cases of a source as shards `shard-NNNNN.parquet` or `.tar`.

    Raises ConfigError if the destination holds something else; SourceError if there is no case,
    or one changes while it is read.
    """
    uri = storage.resolve(destination)
    check_apart(source.uri, uri)
    storage.check_writable(uri)
    groups = list(_groups(source, shard_bytes))
    if not groups:
        raise SourceError(f"{source.uri} holds no case")
    settings = [kind, asdict(source.config)]
    digests = [digest_json([settings, [to_plain(case) for _, case in group]]) for group in groups]
    names = [f"shard-{number:05d}.{kind}" for number in range(len(groups))]
    _check_destination(uri, digest_json(digests), dict(zip(names, digests, strict=True)))
    written = size_bytes = images = cases = 0
    entries = []
    for number, (group, digest) in enumerate(zip(groups, digests, strict=True), start=1):
        name = names[number - 1]
        done = _finished(uri, name, digest)
        if done is None:
            data = _encode(source, group, kind)
            size = len(data)
            done = {"name": name, "plan": digest, "sha256": sha256_hex(data), "size_bytes": size}
            storage.write(storage.join(uri, ".reseg", f"{name}.json"), json.dumps(done).encode())
            storage.write(storage.join(uri, name), data)
            written += 1
        entries.append(done)
        size_bytes += done["size_bytes"]
        cases += len(group)
        images += sum(len(case.slices) for _, case in group)
        if report:
            report(number, len(groups), "shards")
    index = {
        "format": "reseg-shards",
        "version": 1,
        "plan": digest_json(digests),
        "shards": entries,
    }
    storage.write(storage.join(uri, INDEX_FILE), (json.dumps(index, indent=1) + "\n").encode())
    for entry in entries:
        storage.remove(storage.join(uri, ".reseg", f"{entry['name']}.json"))
    return ShardingSummary(
        num_shards=len(groups),
        num_written=written,
        num_cases=cases,
        num_images=images,
        size_bytes=size_bytes,
    )


def _groups(source: Source, shard_bytes: int) -> Iterator[list[tuple[Shard, CaseRef]]]:
    """Cases by id, cut where a shard is full."""
    reader = FORMATS[source.format]
    found = [
        (shard, case)
        for shard in reader.list_shards(source).shards
        for case in reader.list_cases(source, shard)
    ]
    group: list[tuple[Shard, CaseRef]] = []
    size = 0
    for shard, case in sorted(found, key=lambda pair: pair[1].case_id):
        if group and size + case.size_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append((shard, case))
        size += case.size_bytes
    if group:
        yield group


def _check_destination(uri: str, plan: str, shards: Mapping[str, str]) -> None:
    """Refuse a folder with other content; one of the same plan is taken up."""
    index = storage.join(uri, INDEX_FILE)
    if storage.file_info(index) is not None:
        if json.loads(storage.read(index)).get("plan") != plan:
            raise ConfigError(
                f"{uri} holds the shards of another source or of another state of it; "
                "write to a new folder"
            )
        return
    if storage.is_empty(uri):
        return
    for item in storage.list_files(uri):
        name = item.path.removeprefix(".reseg/").removesuffix(".json")
        if item.path.startswith(".tmp-") or "/.tmp-" in item.path:
            continue
        record = storage.join(uri, ".reseg", f"{name}.json")
        known = storage.file_info(record) is not None and json.loads(storage.read(record))
        if not known or shards.get(name) != known["plan"]:
            raise ConfigError(
                f"{uri} is not empty: it holds {item.path!r}, which is not of these shards; "
                "write to a new folder"
            )


def _finished(uri: str, name: str, digest: str) -> dict[str, Any] | None:
    """What is recorded of a shard, if it is of this plan and lies there whole."""
    info = storage.file_info(storage.join(uri, name))
    if info is None:
        return None
    for record in (storage.join(uri, ".reseg", f"{name}.json"), storage.join(uri, INDEX_FILE)):
        if storage.file_info(record) is None:
            continue
        values = json.loads(storage.read(record))
        entries: list[dict[str, Any]] = values.get("shards", [values])
        for entry in entries:
            if (
                entry["name"] == name
                and entry["plan"] == digest
                and entry["size_bytes"] == info.size
            ):
                return entry
    return None


def _encode(source: Source, group: Sequence[tuple[Shard, CaseRef]], kind: Kind) -> bytes:
    """A shard's bytes. The cases are read shard by shard of the source, and put in their order."""
    wanted: dict[str, tuple[Shard, list[CaseRef]]] = {}
    for shard, case in group:
        wanted.setdefault(shard.shard_id, (shard, []))[1].append(case)
    read = {
        encoded.case_id: encoded
        for shard, cases in wanted.values()
        for encoded in FORMATS[source.format].read_cases(source, shard.path, cases)
    }
    ordered = [_checked(read[case.case_id]) for _, case in group]
    return _encode_parquet(iter(ordered)) if kind == "parquet" else _encode_tar(iter(ordered))


def _checked(case: EncodedCase) -> EncodedCase:
    """The case, unless it cannot be written as it is now. Raises SourceError."""
    for item in case.slices:
        if item.problem is not None and item.problem.error_class in RETRIED_ERRORS:
            raise SourceError(
                f"{case.case_id!r}, slice {item.name!r}: {item.problem.error_class}: "
                f"{item.problem.message}; nothing is lost, run the command again"
            )
    return case


def _encode_parquet(cases: Iterator[EncodedCase]) -> bytes:
    """One row a case; a row group ends after some 16 MiB; checksums on all pages."""
    sink = pa.BufferOutputStream()
    options = {"compression": "zstd", "compression_level": 1, "write_page_checksum": True}
    with pq.ParquetWriter(sink, CASE_SCHEMA, use_dictionary=False, **options) as writer:
        rows: list[dict[str, Any]] = []
        size = 0
        for case in cases:
            rows.append(_parquet_row(case))
            size += sum(len(s.image or b"") + len(s.mask or b"") for s in case.slices)
            if size >= _ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema=CASE_SCHEMA))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=CASE_SCHEMA))
    return bytes(sink.getvalue())


def _parquet_row(case: EncodedCase) -> dict[str, Any]:
    return {
        "case_id": case.case_id,
        "slice_names": [item.name for item in case.slices],
        "images": [item.image for item in case.slices],
        "masks": [item.mask for item in case.slices],
        "spacing_mm": case.spacing_mm,
        "image_sha256": [item.image_sha256 for item in case.slices],
        "mask_sha256": [item.mask_sha256 for item in case.slices],
    }


def _encode_tar(cases: Iterator[EncodedCase]) -> bytes:
    """A sidecar, then the images and masks of its case; to WebDataset readers one sample a case."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, case in enumerate(cases):
            stem = f"{number:06d}"
            described: list[dict[str, Any]] = []
            members: list[tuple[str, bytes]] = []
            for index, item in enumerate(case.slices):
                entry: dict[str, Any] = {"name": item.name}
                for role, data in (("image", item.image), ("mask", item.mask)):
                    if data is not None:
                        entry[role] = f"{index:04d}.{role}.{_extension(data)}"
                        members.append((entry[role], data))
                described.append(entry)
            sidecar = {"case_id": case.case_id, "slices": described, "spacing_mm": case.spacing_mm}
            _add(tar, stem + SIDECAR_SUFFIX, json.dumps(sidecar).encode())
            for name, data in members:
                _add(tar, f"{stem}.{name}", data)
    return buffer.getvalue()


def _extension(data: bytes) -> str:
    try:
        return _EXTENSIONS[sniff(data)]
    except BadImage:
        return "bin"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
