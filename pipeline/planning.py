"""What has to be done tonight: the source against the published night, before any GPU second.

An unchanged shard is told by its version, unopened. In a changed one a case is unchanged if its
version is, or, failing that, if its bytes are: they are hashed, so that touching files, copying
them or writing the same shard again computes nothing.
"""

import os
import pwd
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa

import pipeline
from pipeline import results, storage, tables
from pipeline.bundle import Bundle
from pipeline.config import SegmentConfig, output_digest
from pipeline.errors import RETRIED_ERRORS, ConfigError, ErrorClass, ResultsError, SourceError
from pipeline.formats import FORMATS, Source, open_source
from pipeline.records import STATUS_OK, CaseRef, OldParts, Problem, Shard, Work
from pipeline.results import Night, PublishedShard
from pipeline.runs import RunPlan

Progress = Callable[[int, int, str], None]

_STATES = ("new", "changed", "stale", "removed", "unchanged")
_HASHING_THREADS = 8
_READERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OldCase:
    """What the published night knows of a case."""

    version: str
    digest: str
    num_images: int
    num_bad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Some cases of a source, by shard id, where it is cut into shards as for other results."""

    cases: Mapping[str, Set[str]]
    num_buckets: int


class Counts:
    """Cases and images by what happens to them."""

    def __init__(self) -> None:
        self.cases = dict.fromkeys(_STATES, 0)
        self.images = dict.fromkeys(_STATES, 0)
        self.bad = {"cases": 0, "images": 0}

    def add(self, state: str, num_images: int, *, cases: int = 1) -> None:
        """Count cases and their images under a state."""
        self.cases[state] += cases
        self.images[state] += num_images

    def to_plain(self) -> dict[str, dict[str, int]]:
        """For `--json`, the plan and the history."""
        return {
            "cases": {**self.cases, "bad": self.bad["cases"]},
            "images": {**self.images, "bad": self.bad["images"]},
        }


def new_run_id() -> str:
    """A run id that sorts by time; nothing relies on the clock."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def check_run_id(run_id: str) -> str:
    """A user's run id, if it can name a folder. Raises ConfigError."""
    allowed = run_id and len(run_id) <= 128 and not run_id.startswith(".") and run_id != "open"
    if not allowed or not all(c.isalnum() or c in "-_.:+" for c in run_id):
        raise ConfigError(f"--run-id {run_id!r}: letters, digits and -_.:+ are possible")
    return run_id


def _tell_files(progress: Progress, number: int) -> None:
    progress(number, 0, "files listed")


def make_plan(
    location: str,
    results_location: str,
    bundle: Bundle,
    config: SegmentConfig,
    *,
    run_id: str | None = None,
    limit: int | None = None,
    only: Selection | None = None,
    progress: Progress | None = None,
) -> RunPlan:
    """Compare source, bundle and configuration with the published night.

    limit: stop planning after so many cases; published shards are planned whole or left alone.
    only: plan as if the source had these cases and no others.
    Reads listings, and the bytes of what may have changed; writes nothing. Raises SourceError or ResultsError.
    """
    results_uri = storage.resolve(results_location)
    results.check_place(results_uri)
    night = results.open_night(results_uri)
    source = open_source(location, config.source, config.limits)
    check_apart(source.uri, results_uri)
    if night is not None:
        _check_same_source(source, night)
        source = replace(source, num_buckets=night.metadata["source"]["num_buckets"])
    elif only is not None:
        source = replace(source, num_buckets=only.num_buckets)
    counted = None if progress is None else partial(_tell_files, progress)
    listing = FORMATS[source.format].list_shards(source, counted)
    source = replace(source, num_buckets=listing.num_buckets)
    if not any(shard.cases is None or shard.cases for shard in listing.shards):
        raise SourceError(_nothing_found(source, listing.ignored))
    planner = _Planner(source, night, bundle.digest, output_digest(config), progress, limit, only)
    works = tuple(planner.plan_shards(listing.shards))
    return RunPlan(
        run_id=run_id or new_run_id(),
        base_night=None if night is None else night.number,
        bundle={
            "uri": bundle.uri,
            "name": bundle.name,
            "digest": bundle.digest,
            "labels": list(bundle.labels),
        },
        config=asdict(config),
        config_digest=output_digest(config),
        source=_describe(source),
        works=works,
        removed=tuple(planner.removed),
        counts=planner.counts.to_plain(),
        code=code_version(),
    )


def check_apart(source_uri: str, results_uri: str) -> None:
    """Refuse results inside their own source, which would be read as images next night, and a source
    inside the results, which `reseg vacuum` looks through."""
    if results_uri == source_uri or results_uri.startswith(f"{source_uri}/"):
        raise ConfigError(f"the results {results_uri} would lie inside the source {source_uri}")
    if source_uri.startswith(f"{results_uri}/"):
        raise ConfigError(f"the source {source_uri} lies inside the results {results_uri}")


def _nothing_found(source: Source, ignored: tuple[str, ...]) -> str:
    found = f"{len(ignored)} other files, as {ignored[0]!r}" if ignored else "no file at all"
    hint = ""
    if source.config.images:
        hint = f"; does the pattern {source.config.images!r} fit them?"
    return f"{source.uri} holds no image: there is {found}{hint}"


def code_version() -> dict[str, str]:
    """What produced a run: versions of what decides bits and rows."""
    return {
        "reseg": pipeline.__version__,
        "pyarrow": pa.__version__,
        "operator": operator(),
        "host": socket.gethostname(),
    }


def operator() -> str:
    """Who runs this process, for the record."""
    try:
        name = os.environ.get("USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = f"uid {os.getuid()}"
    return name


def _describe(source: Source) -> dict[str, Any]:
    return {
        "uri": source.uri,
        "format": source.format,
        "images": source.config.images,
        "masks": source.config.masks,
        "num_buckets": source.num_buckets,
    }


def _check_same_source(source: Source, night: Night) -> None:
    """Results belong to one source; another one would look like everything removed."""
    old = night.metadata["source"]
    now = _describe(source)
    for key in ("uri", "format", "images"):
        if old[key] != now[key]:
            raise ResultsError(
                f"{night.results} holds the results of {key} = {old[key]!r}, not {now[key]!r}; "
                "use another results folder"
            )


class _Planner:
    """Goes through the shards once; keeps only counts, works and removed parts."""

    def __init__(
        self,
        source: Source,
        night: Night | None,
        bundle_digest: str,
        config_digest: str,
        progress: Progress | None,
        limit: int | None,
        only: Selection | None = None,
    ) -> None:
        self.source, self.night, self.only = source, night, only
        self.bundle_digest, self.config_digest = bundle_digest, config_digest
        self.progress, self.remaining = progress, limit
        self.counts = Counts()
        self.removed: list[OldParts] = []
        self._format = FORMATS[source.format]
        self._seen: dict[str, str] = {}
        self._shards: tuple[Shard, ...] = ()
        self._has_remembered = False

    def plan_shards(self, shards: tuple[Shard, ...]) -> Iterator[Work]:
        """Yield the work of each shard that has any."""
        published = dict(self.night.shards) if self.night else {}
        self._shards = shards
        for number, shard in enumerate(shards, start=1):
            work = self._plan_shard(shard, published.pop(shard.shard_id, None))
            if work is not None:
                yield work
            if self.progress:
                self.progress(number, len(shards), "planning")
        for old in published.values():
            if self.remaining is not None:
                break
            self.counts.add("removed", old.num_images, cases=old.num_cases)
            self.removed.append(old.parts)

    def _is_unchanged(self, shard: Shard, old: PublishedShard | None) -> bool:
        return (
            old is not None
            and self._same_model(old)
            and old.version == shard.version
            and not self._retry_needed(old)
        )

    def _same_model(self, old: PublishedShard) -> bool:
        return (old.bundle_digest, old.config_digest) == (self.bundle_digest, self.config_digest)

    def _remember_unchanged(self) -> None:
        """Case ids of unchanged shards, so that another shard cannot bring one a second time.

        Asked for only when a shard has a case that it did not have last night.
        """
        if self._has_remembered or self.night is None or self.source.format == "folder":
            return
        self._has_remembered = True
        published = self.night.shards
        unchanged = [
            published[s.shard_id]
            for s in self._shards
            if self._is_unchanged(s, published.get(s.shard_id))
        ]
        with ThreadPoolExecutor(_READERS) as pool:
            for shard, case_ids in zip(unchanged, pool.map(self._case_ids, unchanged), strict=True):
                for case_id in case_ids:
                    self._seen.setdefault(case_id, shard.shard_id)

    def _case_ids(self, old: PublishedShard) -> list[str]:
        if old.parts.masks is None or self.night is None:
            return []
        rows = tables.read_part(self.night.results, "masks", old.parts.masks, ["case_id"])
        found: list[str] = rows.column("case_id").unique().to_pylist()
        return found

    def _plan_shard(self, shard: Shard, old: PublishedShard | None) -> Work | None:
        if old is not None and self._is_unchanged(shard, old):
            self.counts.add("unchanged", old.num_images, cases=old.num_cases)
            self.counts.bad["images"] += old.num_bad
            self.counts.bad["cases"] += old.num_bad_cases
            return None
        if self.remaining is not None and self.remaining <= 0:
            return None
        listed = self._list_cases(shard)
        old_cases = self._old_cases(old) if old is not None else {}
        if any(case.case_id not in old_cases for case in listed):
            self._remember_unchanged()
        cases = [self._once(case, shard) for case in listed]
        version = shard.version
        if self.remaining is not None:
            if old is None and len(cases) > self.remaining:
                cases, version = cases[: self.remaining], f"{shard.version}-partial"
            self.remaining -= len(cases)
        compute: list[CaseRef] = []
        copy: list[tuple[str, str]] = []
        fresh = old is not None and self._same_model(old)
        for case, state in zip(
            cases, self._states(shard, cases, old_cases, fresh=fresh), strict=True
        ):
            self._count(state, case, old_cases.get(case.case_id))
            if state == "unchanged":
                copy.append((case.case_id, case.version or version))
            else:
                compute.append(replace(case, version=case.version or version))
        gone = old_cases.keys() - {case.case_id for case in cases}
        for case_id in gone:
            self.counts.add("removed", old_cases[case_id].num_images)
        if not compute and not gone:
            return None
        return Work(
            shard_id=shard.shard_id,
            path=shard.path,
            format=shard.format,
            version=version,
            size_bytes=sum(case.size_bytes for case in compute) or shard.size_bytes,
            compute=tuple(compute),
            copy=tuple(copy),
            old=old.parts if old is not None else OldParts(),
        )

    def _list_cases(self, shard: Shard) -> list[CaseRef]:
        """The cases of a shard that this plan is about."""
        if self.only is None:
            return self._format.list_cases(self.source, shard)
        wanted = self.only.cases.get(shard.shard_id)
        if not wanted:
            return []
        listed = self._format.list_cases(self.source, shard)
        return [case for case in listed if case.case_id in wanted]

    def _once(self, case: CaseRef, shard: Shard) -> CaseRef:
        """The case, or a case of one bad row where another shard has its id already."""
        first = self._seen.setdefault(case.case_id, shard.shard_id)
        if first == shard.shard_id:
            return case
        message = "another shard of the source has the same case id"
        problem = Problem(error_class=ErrorClass.DUPLICATE_KEY, message=message)
        slices = tuple(replace(item, problem=problem) for item in case.slices)
        return replace(case, case_id=f"{case.case_id}~{shard.shard_id[:8]}", slices=slices)

    def _count(self, state: str, case: CaseRef, old: OldCase | None) -> None:
        self.counts.add(state, old.num_images if old and state == "unchanged" else len(case.slices))
        if state == "unchanged" and old is not None:
            self.counts.bad["images"] += old.num_bad
            self.counts.bad["cases"] += bool(old.num_bad)

    def _states(
        self,
        shard: Shard,
        cases: list[CaseRef],
        old_cases: Mapping[str, OldCase],
        *,
        fresh: bool,
    ) -> list[str]:
        """For each case: new, changed, stale or unchanged."""
        suspects = [
            case
            for case in cases
            if case.case_id in old_cases
            and old_cases[case.case_id].version != (case.version or shard.version)
        ]
        changed = {
            case_id
            for case_id, digest in self._digests(shard, suspects)
            if digest != old_cases[case_id].digest
        }
        states = []
        for case in cases:
            if case.case_id not in old_cases:
                states.append("new")
            elif case.case_id in changed:
                states.append("changed")
            else:
                states.append("unchanged" if fresh else "stale")
        return states

    def _digests(self, shard: Shard, cases: list[CaseRef]) -> Iterator[tuple[str, str]]:
        """Content digests of cases, by reading them; several at once where files are apart."""

        def digest(group: list[CaseRef]) -> list[tuple[str, str]]:
            read = self._format.read_cases(self.source, shard.path, group)
            return [(encoded.case_id, encoded.digest()) for encoded in read]

        if self.source.format != "folder":
            yield from digest(cases) if cases else []
            return
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            for pairs in pool.map(digest, [[case] for case in cases]):
                yield from pairs

    def _retry_needed(self, old: PublishedShard) -> bool:
        """Whether bad rows of an unchanged shard have causes that may have passed elsewhere."""
        if not old.num_bad or self.night is None or old.parts.masks is None:
            return False
        rows = tables.read_part(self.night.results, "masks", old.parts.masks, ["error_class"])
        causes = set(rows.column("error_class").to_pylist())
        return bool(causes & (RETRIED_ERRORS | {ErrorClass.DUPLICATE_KEY}))

    def _old_cases(self, old: PublishedShard) -> dict[str, OldCase]:
        """The cases of a published shard, from the small columns of its part."""
        if old.parts.masks is None or self.night is None:
            return {}
        columns = ["case_id", "case_version", "case_digest", "status", "error_class"]
        found: dict[str, OldCase] = {}
        table = tables.read_part(self.night.results, "masks", old.parts.masks, columns)
        for row in table.to_pylist():
            before = found.get(row["case_id"])
            retry = row["error_class"] in RETRIED_ERRORS or (before and not before.version)
            found[row["case_id"]] = OldCase(
                version="" if retry else row["case_version"],
                digest="" if retry else row["case_digest"],
                num_images=(before.num_images if before else 0) + 1,
                num_bad=(before.num_bad if before else 0) + (row["status"] != STATUS_OK),
            )
        return found
