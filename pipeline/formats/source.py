"""What a format must offer, and what all of them share: reading one slice's bytes safely."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from pipeline import storage
from pipeline.config import LimitsConfig, SourceConfig
from pipeline.errors import REFERENCE_ERRORS, ErrorClass
from pipeline.records import (
    CaseRef,
    EncodedCase,
    EncodedSlice,
    Locator,
    Problem,
    Shard,
    SliceRef,
    printable,
    sha256_hex,
)
from pipeline.registry import Registry

ARCHIVE_SLICE = "(shard)"
"""Slice name of the row that stands for a whole shard that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A resolved source: where, how its files become cases, and how it is cut into shards.

    num_buckets: of a folder; 0 lets the first listing choose, results keep it from then on.
    """

    uri: str
    format: str
    config: SourceConfig
    limits: LimitsConfig
    num_buckets: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All shards of a source, and the files in it that are not images."""

    shards: tuple[Shard, ...]
    ignored: tuple[str, ...] = ()
    num_buckets: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One container. `suffixes` tell it apart when a source's format is detected.

    list_shards(source) lists without opening shards; list_cases(source, shard) opens one but
    reads no pixels; read_cases(source, path, cases) reads the encoded bytes of some cases of the
    shard at `path`. All give the same cases in the same order every time; what cannot be read is
    a problem in a row, not an exception.
    """

    suffixes: tuple[str, ...]
    list_shards: "ListShards"
    list_cases: Callable[[Source, Shard], list[CaseRef]]
    read_cases: Callable[[Source, str, Sequence[CaseRef]], Iterator[EncodedCase]]


class ListShards(Protocol):
    """How a format lists its source; `counted` is told how many files were seen so far."""

    def __call__(self, source: Source, counted: Callable[[int], None] | None = None) -> Listing:
        """All shards. Raises SourceError."""


FORMATS = Registry[Format]("source format")


def list_source(
    source: Source, counted: Callable[[int], None] | None = None
) -> Iterator[storage.FileInfo]:
    """All files below a source, told of by the thousand: of an archive in a store there are millions."""
    for number, info in enumerate(storage.list_files(source.uri), start=1):
        if counted is not None and number % 1000 == 0:
            counted(number)
        yield info


def broken_shard(path: str, error_class: ErrorClass, message: str) -> CaseRef:
    """The case that stands for a shard, or the rest of one, that cannot be read."""
    problem = Problem(error_class=error_class, message=message)
    locator = Locator(path=path)
    return CaseRef(
        case_id=path, slices=(SliceRef(name=ARCHIVE_SLICE, image=locator, problem=problem),)
    )


def wanted_files(source: Source, case: CaseRef) -> Iterator[Locator]:
    """What `read_case` will fetch, in its order."""
    for ref in case.slices:
        if is_usable(ref.problem):
            if ref.mask is not None and source.config.references != "ignore":
                yield ref.mask
            if ref.image is not None:
                yield ref.image


def read_case(
    source: Source, case: CaseRef, fetch: Callable[[Locator], bytes | Problem]
) -> EncodedCase:
    """Read the slices of one case through `fetch`, turning each failure into its row's problem."""
    slices = []
    for ref in case.slices:
        item = EncodedSlice(
            name=ref.name,
            source_uri=_slice_uri(source, ref),
            problem=ref.problem,
        )
        if is_usable(ref.problem):
            if source.config.references != "auto" and item.problem is not None:
                item.problem = None
            if ref.mask is not None and source.config.references != "ignore":
                item.mask, item.mask_sha256, problem = _fetch(ref.mask, fetch)
                item.problem = _of_mask(problem) or item.problem
            if ref.image is not None:
                item.image, item.image_sha256, problem = _fetch(ref.image, fetch)
                item.problem = problem or item.problem
        slices.append(item)
    return EncodedCase(
        case_id=case.case_id,
        slices=slices,
        spacing_mm=case.spacing_mm or source.config.spacing_mm or None,
    )


def is_usable(problem: Problem | None) -> bool:
    """Whether an image with this problem can still be read: only its reference is amiss."""
    return problem is None or problem.error_class in REFERENCE_ERRORS


def _slice_uri(source: Source, ref: SliceRef) -> str:
    locator = ref.image or ref.mask
    return storage.join(source.uri, printable(locator.path)) if locator else source.uri


def _fetch(
    locator: Locator, fetch: Callable[[Locator], bytes | Problem]
) -> tuple[bytes | None, str | None, Problem | None]:
    """Bytes and their digest, or why there are none."""
    data = fetch(locator)
    if isinstance(data, Problem):
        return None, None, data
    return data, sha256_hex(data), None


def _of_mask(problem: Problem | None) -> Problem | None:
    """A mask that cannot be read costs the reference, not the image."""
    if problem is None:
        return None
    message = f"the reference mask: {problem.error_class}: {problem.message}"
    return Problem(error_class=ErrorClass.BAD_MASK, message=message)


def unique_cases(cases: Sequence[CaseRef]) -> list[CaseRef]:
    """The cases of a shard, with every later case of a taken id as DuplicateKey, `ID~2`."""
    seen: dict[str, int] = {}
    unique = []
    for case in cases:
        seen[case.case_id] = seen.get(case.case_id, 0) + 1
        if seen[case.case_id] > 1:
            message = "an earlier case of the shard has the same id"
            problem = Problem(error_class=ErrorClass.DUPLICATE_KEY, message=message)
            slices = tuple(replace(item, problem=problem) for item in case.slices)
            case = replace(case, case_id=f"{case.case_id}~{seen[case.case_id]}", slices=slices)
        unique.append(case)
    return unique


def cap_cases(source: Source, cases: Sequence[CaseRef]) -> list[CaseRef]:
    """The cases, with every slice of one that would not fit into memory as CaseTooLarge."""
    return [_capped(case, source.limits.max_case_bytes) for case in cases]


def _capped(case: CaseRef, max_bytes: int) -> CaseRef:
    if case.size_bytes <= max_bytes:
        return case
    message = (
        f"the {len(case.slices)} slices of its case have {case.size_bytes} bytes, over the limit of "
        f"{max_bytes}; is one case really one image or volume?"
    )
    problem = Problem(error_class=ErrorClass.CASE_TOO_LARGE, message=message)
    slices = tuple(
        replace(item, problem=problem) if is_usable(item.problem) else item for item in case.slices
    )
    return replace(case, slices=slices)


def checked_spacing(values: object) -> tuple[tuple[float, ...] | None, Problem | None]:
    """A stored spacing as (z, y, x) or (y, x) in mm; what is wrong with it, where it is not one."""
    if not values:
        return None, None
    fits = isinstance(values, (list, tuple)) and len(values) in (2, 3)
    if fits and all(
        isinstance(v, (int, float)) and 0 < v < 1e6 for v in cast(Sequence[Any], values)
    ):
        return tuple(float(v) for v in cast(Sequence[Any], values)), None
    message = "spacing_mm is not (z, y, x) or (y, x) in mm"
    return None, Problem(error_class=ErrorClass.SCHEMA_MISMATCH, message=message)


def unique_names(stored: Sequence[object]) -> list[str]:
    """Slice names that are there, differ, and hold no `/`."""
    names: list[str] = []
    for index, name in enumerate(stored):
        text = str(index) if name is None else printable(str(name)).replace("/", "_")
        names.append(text if text not in names else f"{text}~{index}")
    return names


def read_file(source: Source, locator: Locator) -> bytes | Problem:
    """Fetch a whole file, refusing what is too large or no longer what was listed."""
    uri = storage.join(source.uri, locator.path)
    if locator.size > source.limits.max_file_bytes:
        message = f"{locator.size} bytes are over the limit of {source.limits.max_file_bytes}"
        return Problem(error_class=ErrorClass.IMAGE_TOO_LARGE, message=message)
    try:
        data = storage.read_version(uri, locator.version)
    except storage.Changed as error:
        return _changed(str(error))
    except OSError as error:
        message = f"reading failed: {error.strerror or type(error).__name__}"
        return Problem(error_class=ErrorClass.UNREADABLE_FILE, message=message)
    if len(data) != locator.size:
        return _changed("another size")
    return data


def read_archive(
    source: Source,
    path: str,
    cases: Sequence[CaseRef],
    read: Callable[[list[CaseRef]], Iterator[EncodedCase]],
) -> Iterator[EncodedCase]:
    """Read cases of one archive: `read` gets those of which bytes are needed and can be had.

    Cases without a usable slice need none; if the archive is gone or no longer the one that was
    listed, no case gets any, and each says so.
    """
    readable = [case for case in cases if any(is_usable(item.problem) for item in case.slices)]
    needed = {id(case) for case in readable}
    for case in cases:
        if id(case) not in needed:
            yield read_case(source, case, _never_fetched)
    if not readable:
        return
    problem = _archive_problem(source, path, readable)
    if problem is None:
        yield from read(readable)
    else:
        yield from (read_case(source, case, lambda _: problem) for case in readable)


def _archive_problem(source: Source, path: str, cases: Sequence[CaseRef]) -> Problem | None:
    listed = next((s.image.version for c in cases for s in c.slices if s.image), "")
    try:
        info = storage.file_info(storage.join(source.uri, path))
    except OSError as error:
        message = f"reading failed: {error.strerror or type(error).__name__}"
        return Problem(error_class=ErrorClass.UNREADABLE_FILE, message=message)
    if info is None or info.version != listed:
        return _changed("gone" if info is None else "another version")
    return None


def _never_fetched(locator: Locator) -> bytes | Problem:
    raise AssertionError(f"{locator} belongs to an unusable slice")


def _changed(what: str) -> Problem:
    message = f"the file is not what was planned: {what}; the next run takes it up"
    return Problem(error_class=ErrorClass.CHANGED_DURING_RUN, message=message)
