"""Folders of pictures: cases by file-name pattern, shards by a stable hash of the case id."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from pipeline import storage
from pipeline.config import digest_json
from pipeline.errors import ErrorClass
from pipeline.formats.patterns import (
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
    cap_cases,
    list_source,
    read_case,
    read_file,
    wanted_files,
)
from pipeline.images import PICTURE_SUFFIXES, REFUSED_SUFFIXES
from pipeline.records import CaseRef, EncodedCase, Locator, Problem, Shard, printable, shard_id_of


def list_shards(source: Source, counted: Callable[[int], None] | None = None) -> Listing:
    """All cases of the folder, in `source.num_buckets` shards; a new case moves no other."""
    config = source.config
    keys_of = pattern_keys(config.images, config.masks) if config.images else _each_file_a_case
    entries = [_entry(info) for info in list_source(source, counted)]
    expected = bool(config.masks) and config.references == "auto"
    grouped, ignored = group_cases(entries, keys_of, masks_expected=expected)
    cases = cap_cases(source, grouped)
    num_buckets = source.num_buckets or _choose_buckets(cases)
    buckets: dict[int, list[CaseRef]] = defaultdict(list)
    for case in cases:
        number = int.from_bytes(hashlib.sha256(case.case_id.encode()).digest()[:8], "big")
        buckets[number % num_buckets].append(replace(case, version=_case_version(case)))
    shards = tuple(
        _bucket(index, num_buckets, tuple(members)) for index, members in sorted(buckets.items())
    )
    return Listing(shards=shards, ignored=tuple(map(printable, ignored)), num_buckets=num_buckets)


_IMAGES_PER_BUCKET, _BYTES_PER_BUCKET = 64, 32 << 20
_MIN_BUCKETS, _MAX_BUCKETS = 16, 65536


def _choose_buckets(cases: list[CaseRef]) -> int:
    """A power of two: some 64 images or 32 MiB a bucket.

    A bucket is what one actor takes at a time: the smaller, the less the others wait for the last.
    """
    images = sum(len(case.slices) for case in cases)
    size_bytes = sum(case.size_bytes for case in cases)
    wanted = max(images / _IMAGES_PER_BUCKET, size_bytes / _BYTES_PER_BUCKET)
    buckets = _MIN_BUCKETS
    while buckets < min(wanted, _MAX_BUCKETS):
        buckets *= 2
    return buckets


def _entry(info: storage.FileInfo) -> Entry:
    problem = None
    if info.special:
        problem = special_file_problem()
    elif info.version == "unreadable":
        message = "the link leads nowhere, or its file cannot be looked at"
        problem = Problem(error_class=ErrorClass.UNREADABLE_FILE, message=message)
    locator = Locator(path=info.path, size=info.size, version=info.version)
    return Entry(path=info.path, locator=locator, problem=problem)


def _each_file_a_case(path: str) -> Keys:
    if path.lower().endswith(PICTURE_SUFFIXES + REFUSED_SUFFIXES):
        return (printable(path), "0"), None
    return None, None


def _case_version(case: CaseRef) -> str:
    return digest_json(
        [
            [
                item.name,
                item.image and [printable(item.image.path), item.image.version],
                item.mask and [printable(item.mask.path), item.mask.version],
                item.problem and item.problem.error_class,
            ]
            for item in case.slices
        ]
    )[:32]


def _bucket(index: int, count: int, cases: tuple[CaseRef, ...]) -> Shard:
    path = f"bucket-{index:05d}-of-{count:05d}"
    return Shard(
        shard_id=shard_id_of(path),
        path=path,
        format="folder",
        version=digest_json([[case.case_id, case.version] for case in cases]),
        size_bytes=sum(case.size_bytes for case in cases),
        cases=cases,
    )


def list_cases(source: Source, shard: Shard) -> list[CaseRef]:
    """The cases of a bucket, known since the listing."""
    return list(shard.cases or ())


def read_cases(source: Source, path: str, cases: Sequence[CaseRef]) -> Iterator[EncodedCase]:
    """Read each file of each case; a file that is not as listed is a problem of its slice."""
    tasks = (
        partial(read_file, source, locator)
        for case in cases
        for locator in wanted_files(source, case)
    )
    fetched = storage.read_ahead(source.uri, tasks)
    for case in cases:
        yield read_case(source, case, lambda _: next(fetched))


FORMATS.register("folder")(
    Format(
        suffixes=PICTURE_SUFFIXES,
        list_shards=list_shards,
        list_cases=list_cases,
        read_cases=read_cases,
    )
)
