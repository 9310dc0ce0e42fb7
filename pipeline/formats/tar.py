"""WebDataset tar shards: members are streamed, never extracted.

Key rule, where no pattern is given: the member's path without its picture suffix and without a
role word before it is the case; `.mask`, `.seg`, `.label` and `_mask` make it a mask, `.image`
and `.img` are dropped. Nothing else in a name is cut, so `1.2.840.113619.2.png` and
`1.2.840.113619.3.png` are two cases. Tars of `reseg shard` carry a `*.case.json` before each
case, which names its slices, their order and the spacing; to WebDataset readers each case is one
sample. An archive without its two closing zero blocks is reported as truncated; its whole
members are used.
"""

import gzip
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, cast

from pipeline import storage
from pipeline.errors import BadImage, ErrorClass
from pipeline.formats.patterns import (
    MISSING_MASK,
    Entry,
    Keys,
    group_cases,
    pattern_keys,
    special_file_problem,
)
from pipeline.formats.source import (
    FORMATS,
    Format,
    Listing,
    Source,
    broken_shard,
    cap_cases,
    checked_spacing,
    list_source,
    read_archive,
    read_case,
    unique_cases,
    unique_names,
)
from pipeline.images import PICTURE_SUFFIXES, REFUSED_SUFFIXES
from pipeline.records import (
    CaseRef,
    EncodedCase,
    Locator,
    Problem,
    Shard,
    SliceRef,
    printable,
    shard_id_of,
)

SIDECAR_SUFFIX = ".case.json"
_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MAX_SIDECAR_BYTES = 16 << 20
_GZIP_RATIO, _GZIP_FREE_BYTES = 1000, 1 << 30
_MASK_WORD = re.compile(r"([._](mask|seg|label|labels))$", re.IGNORECASE)
_IMAGE_WORD = re.compile(r"(\.(image|img))$", re.IGNORECASE)
_BLOCK = 512


def list_shards(source: Source, counted: Callable[[int], None] | None = None) -> Listing:
    """Each archive of the folder is a shard; a source that is one archive is one shard."""
    return list_archives(source, counted, _SUFFIXES, "tar")


def list_archives(
    source: Source,
    counted: Callable[[int], None] | None,
    suffixes: tuple[str, ...],
    format_name: str,
) -> Listing:
    """One shard for each file with one of the suffixes; the rest of the folder is ignored."""
    if source.uri.lower().endswith(suffixes):
        info = storage.file_info(source.uri)
        infos = [] if info is None else [info]
    else:
        infos = list(list_source(source, counted))
    ours: list[storage.FileInfo] = []
    ignored: list[str] = []
    for item in infos:
        if (item.path or source.uri).lower().endswith(suffixes):
            ours.append(item)
        else:
            ignored.append(printable(item.path))
    shards = tuple(
        Shard(
            shard_id=shard_id_of(item.path),
            path=item.path,
            format=format_name,
            version=item.version,
            size_bytes=item.size,
        )
        for item in sorted(ours, key=lambda item: item.path)
    )
    return Listing(shards=shards, ignored=tuple(ignored))


class _Guarded:
    """An archive's bytes, with caps: no read over a member's limit, no more than `total` in all."""

    def __init__(self, stream: BinaryIO, member: int, total: int) -> None:
        self._stream, self._member, self._total = stream, member, total

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._member:
            raise _too_large(f"a member of more than {self._member} bytes")
        self._check(self._stream.tell() + size)
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._check(offset)
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, position: int) -> None:
        if position > self._total + 2 * tarfile.RECORDSIZE:
            raise _too_large(f"more than {self._total} bytes")

    def close(self) -> None:
        self._stream.close()


def _too_large(what: str) -> BadImage:
    return BadImage(ErrorClass.ARCHIVE_TOO_LARGE, f"the archive would unpack to {what}")


def _open(source: Source, path: str) -> _Guarded:
    uri = storage.join(source.uri, path)
    info = storage.file_info(uri)
    size = info.size if info else 0
    stream = storage.open_reader(uri)
    total = source.limits.max_archive_bytes
    if stream.read(2) == b"\x1f\x8b":
        total = min(total, _GZIP_FREE_BYTES + _GZIP_RATIO * size)
        stream.seek(0)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    stream.seek(0)
    return _Guarded(stream, source.limits.max_member_bytes, total)


def list_cases(source: Source, shard: Shard) -> list[CaseRef]:
    """The cases of an archive by its headers; what is wrong with it is a case of its own."""
    entries: list[Entry] = []
    cases: list[CaseRef] = []
    try:
        archive = _open(source, shard.path)
    except OSError as error:
        message = f"reading failed: {error.strerror or type(error).__name__}"
        return [broken_shard(_name(source, shard.path), ErrorClass.UNREADABLE_FILE, message)]
    try:
        entries.extend(_entries(source, shard, archive, cases))
    except BadImage as error:
        cases.append(broken_shard(_name(source, shard.path), error.error_class, error.message))
    except (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError) as error:
        message = f"the archive cannot be read on ({type(error).__name__})"
        broken = (EOFError, gzip.BadGzipFile)
        kind = (
            ErrorClass.TRUNCATED_ARCHIVE
            if isinstance(error, broken) or "end of" in str(error)
            else ErrorClass.CORRUPT_ARCHIVE
        )
        cases.append(broken_shard(_name(source, shard.path), kind, message))
    finally:
        archive.close()
    config = source.config
    keys_of = pattern_keys(config.images, config.masks) if config.images else _webdataset_keys
    expected = None if config.references == "auto" else False
    grouped, _ = group_cases(entries, keys_of, masks_expected=expected)
    return cap_cases(source, unique_cases([*cases, *grouped]))


def _name(source: Source, path: str) -> str:
    return printable(path or source.uri.rsplit("/", 1)[-1])


def _entries(
    source: Source, shard: Shard, archive: _Guarded, cases: list[CaseRef]
) -> Iterator[Entry]:
    """Yield the members that are not part of a sidecar's case; append those cases to `cases`."""
    sidecars: list[tuple[dict[str, Any], dict[str, Locator]]] = []
    current: dict[str, dict[str, Locator]] = {}
    try:
        with tarfile.open(fileobj=cast(BinaryIO, archive), mode="r:", errorlevel=2) as tar:
            for member in _members(tar):
                problem = _member_problem(source, member)
                if member.name.endswith(SIDECAR_SUFFIX) and problem is None:
                    stem, case = _sidecar(archive, member)
                    current[stem] = {}
                    sidecars.append((case, current[stem]))
                    continue
                locator = Locator(
                    path=shard.path,
                    offset=member.offset_data,
                    size=member.size,
                    version=shard.version,
                )
                stem, _, rest = member.name.partition(".")
                if stem in current and problem is None and rest in _listed(sidecars, current[stem]):
                    current[stem][rest] = locator
                    continue
                if problem is None and _ends_before(archive, locator):
                    message = "the archive ends inside it"
                    problem = Problem(error_class=ErrorClass.TRUNCATED_IMAGE, message=message)
                yield Entry(path=member.name, locator=locator, problem=problem)
            if not _has_end_mark(archive, tar.offset):
                message = "the archive has no end mark: members may be missing behind its last one"
                raise BadImage(ErrorClass.TRUNCATED_ARCHIVE, message)
    finally:
        cases.extend(_sidecar_case(case, members) for case, members in sidecars)


def _listed(
    sidecars: list[tuple[dict[str, Any], dict[str, Locator]]], members: dict[str, Locator]
) -> set[str]:
    """The member names that the sidecar of `members` lists; the last sidecars are the likely ones."""
    case = next(case for case, found in reversed(sidecars) if found is members)
    listed: set[str] = case["listed"]
    return listed


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members but folders; the archive's own list of them is kept empty, so memory is flat."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]
        if not member.isdir():
            yield member


def _ends_before(archive: _Guarded, locator: Locator) -> bool:
    """Whether the last byte of a member is missing."""
    if locator.size == 0:
        return False
    archive.seek(locator.offset + locator.size - 1)
    return not archive.read(1)


def _has_end_mark(archive: _Guarded, offset: int) -> bool:
    archive.seek(offset)
    return archive.read(2 * _BLOCK) == bytes(2 * _BLOCK)


def _member_problem(source: Source, member: tarfile.TarInfo) -> Problem | None:
    if not member.isreg():
        return special_file_problem()
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\x00" in member.name:
        message = "its name leads out of the archive"
        return Problem(error_class=ErrorClass.UNSAFE_PATH, message=message)
    if member.size > source.limits.max_member_bytes:
        message = f"{member.size} bytes are over the limit of {source.limits.max_member_bytes}"
        return Problem(error_class=ErrorClass.ARCHIVE_TOO_LARGE, message=message)
    return None


def _webdataset_keys(path: str) -> Keys:
    """The key rule of the module's docstring; unsafe names are kept whole."""
    lowered = path.lower()
    suffix = next((s for s in PICTURE_SUFFIXES + REFUSED_SUFFIXES if lowered.endswith(s)), None)
    if suffix is None:
        unsafe = path.startswith("/") or ".." in path.split("/")
        return ((printable(path), "0"), None) if unsafe else (None, None)
    stem = path[: -len(suffix)]
    if _MASK_WORD.search(stem):
        return None, (printable(_MASK_WORD.sub("", stem)), "0")
    return (printable(_IMAGE_WORD.sub("", stem)), "0"), None


def _sidecar(archive: _Guarded, member: tarfile.TarInfo) -> tuple[str, dict[str, Any]]:
    """The checked content of a `*.case.json`."""
    if member.size > _MAX_SIDECAR_BYTES:
        raise _too_large(f"a case description of {member.size} bytes")
    archive.seek(member.offset_data)
    try:
        case = json.loads(archive.read(member.size))
        names = unique_names([item["name"] for item in case["slices"]])
        case = {
            "case_id": str(case["case_id"]),
            "slices": [
                {"name": name, "image": item.get("image"), "mask": item.get("mask")}
                for name, item in zip(names, case["slices"], strict=True)
            ],
            "spacing_mm": case.get("spacing_mm"),
            "listed": {item.get(r) for item in case["slices"] for r in ("image", "mask")} - {None},
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadImage(
            ErrorClass.CORRUPT_ARCHIVE, f"{printable(member.name)} does not describe a case"
        ) from None
    return member.name.removesuffix(SIDECAR_SUFFIX), case


def _sidecar_case(case: dict[str, Any], members: dict[str, Locator]) -> CaseRef:
    any_mask = any(item["mask"] for item in case["slices"])
    spacing_mm, problem = checked_spacing(case["spacing_mm"])
    slices = [_sidecar_slice(item, members, any_mask) for item in case["slices"]]
    if problem is not None:
        slices = [replace(item, problem=problem) for item in slices]
    return CaseRef(case_id=case["case_id"], spacing_mm=spacing_mm, slices=tuple(slices))


def _sidecar_slice(
    item: dict[str, Any], members: dict[str, Locator], masks_expected: bool
) -> SliceRef:
    image, mask = members.get(item["image"] or ""), members.get(item["mask"] or "")
    problem = None
    if image is None:
        kind = ErrorClass.TRUNCATED_ARCHIVE if item["image"] else ErrorClass.MISSING_IMAGE
        problem = Problem(error_class=kind, message="the archive does not hold the image")
    elif mask is None and masks_expected:
        problem = MISSING_MASK
    return SliceRef(name=item["name"], image=image, mask=mask, problem=problem)


def read_cases(source: Source, path: str, cases: Sequence[CaseRef]) -> Iterator[EncodedCase]:
    """Read the members of the cases by their offsets, in the order of the cases."""
    return read_archive(source, path, cases, lambda readable: _read_members(source, path, readable))


def _read_members(source: Source, path: str, cases: list[CaseRef]) -> Iterator[EncodedCase]:
    archive = _open(source, path)

    def fetch(locator: Locator) -> bytes | Problem:
        archive.seek(locator.offset)
        data = archive.read(locator.size)
        if len(data) != locator.size:
            message = "the archive ends inside it"
            return Problem(error_class=ErrorClass.TRUNCATED_IMAGE, message=message)
        return data

    try:
        for case in cases:
            yield read_case(source, case, fetch)
    finally:
        archive.close()


FORMATS.register("tar")(
    Format(
        suffixes=_SUFFIXES, list_shards=list_shards, list_cases=list_cases, read_cases=read_cases
    )
)
