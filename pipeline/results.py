"""Nights: what is published, and the one commit that publishes, replaces or takes back a night.

`masks`, `metrics` and `cases` are Parquet files plus an open transaction log. The commit of
`masks` is the publication: its metadata name the versions of the other two that belong to it, so
a reader through here always sees one whole night. The number of a night is the version of
`masks`.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import delta, storage
from pipeline.delta import AddedPart, TableLog
from pipeline.errors import (
    CommitConflict,
    ConfigError,
    ResultsError,
    StoreFailed,
    VerificationError,
)
from pipeline.records import OldParts, PartFile, Receipt
from pipeline.runs import RunPlan, all_receipts, load_plan
from pipeline.tables import TABLES, read_part, table_schema

Changes = Mapping[str, tuple[Sequence[AddedPart], Sequence[str]]]
"""For each table the parts that a commit adds, and the paths of those that it removes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedShard:
    """What a night holds of one shard."""

    shard_id: str
    version: str
    bundle_digest: str
    config_digest: str
    num_cases: int
    num_images: int
    num_bad_cases: int
    num_bad: int
    parts: OldParts


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What the commit of a night recorded; costs one small file, however large the night."""

    number: int
    metadata: Mapping[str, Any]
    published_ms: int

    def version_of(self, table: str) -> int | None:
        """The version of a table that belongs to this night."""
        version: int | None = self.metadata["versions"][table] if table != "masks" else self.number
        return version


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """One published version of the results, or (`staged_night`) what a run would publish.

    metadata: what its commit recorded.
    """

    results: str
    number: int
    metadata: Mapping[str, Any]
    published_ms: int
    shards: Mapping[str, PublishedShard]

    def paths(self, table: str) -> list[str]:
        """The Parquet files of one table of this night, in shard order."""
        names = (getattr(shard.parts, table) for shard in self.shards.values())
        return [storage.join(self.results, table, name) for name in names if name]


_NOT_IN_A_TABLE_URI = '%[]{}<>|\\^`"'


def check_place(results: str) -> None:
    """Refuse a place that the tables' log would write elsewhere: it takes a URI for an encoded one.

    Raises ConfigError.
    """
    bad = sorted(set(results) & set(_NOT_IN_A_TABLE_URI)) if storage.is_remote(results) else []
    if bad:
        raise ConfigError(
            f"results cannot lie in {results}: {' '.join(bad)} in its name would lead to another "
            "place; choose a name without"
        )


def latest_night_number(results: str) -> int | None:
    """The number of the published night, None before the first."""
    return latest_version(results, "masks")


def latest_version(results: str, table: str) -> int | None:
    """The newest version of one table, None where there is no table."""
    opened = _open(results, table)
    return None if opened is None else opened.version


def open_night(results: str, number: int | None = None) -> Night | None:
    """The published night, or the night of a number; None where nothing was published yet.

    Raises ResultsError for a number that does not exist, or whose parts were collected.
    """
    record = record_of(results, number)
    if record is None:
        return None
    masks = _log_of(results, record, "masks")
    assert masks is not None
    others = {name: _paths_by_shard(results, record, name) for name in TABLES[:-1]}
    return Night(
        results=results,
        number=record.number,
        metadata=record.metadata,
        published_ms=record.published_ms,
        shards={shard.shard_id: shard for shard in _published_shards(masks, others)},
    )


def record_of(results: str, number: int | None = None) -> Record | None:
    """What the published night, or that of a number, recorded; None where nothing was published yet.

    Raises ResultsError for a number that does not exist, or whose parts were collected.
    """
    if number is not None:
        oldest = oldest_kept_night(results)
        if number < oldest:
            raise ResultsError(
                f"night {number} of {results} was collected by `reseg vacuum`; the oldest kept is "
                f"{oldest}"
            )
        if number > (latest_night_number(results) or 0):
            raise ResultsError(f"{results} has no night {number}")
    masks = _open(results, "masks", number)
    if masks is None:
        if number is not None:
            raise ResultsError(f"{results} has no night {number}: nothing is published there")
        return None
    return _record(masks)


def _published_shards(
    masks: TableLog, others: Mapping[str, Mapping[str, str]]
) -> list[PublishedShard]:
    """What each part of `masks` says in the log of its shard, in order of their ids."""
    columns = masks.columns(
        "min.shard_id",
        "path",
        "num_records",
        "min.shard_version",
        "min.bundle_digest",
        "min.config_digest",
        "min.case_index",
        "max.case_index",
        "null_count.error_class",
    )
    metrics, cases = others["metrics"], others["cases"]
    return [
        PublishedShard(
            shard_id=shard_id,
            version=version,
            bundle_digest=bundle,
            config_digest=config,
            num_cases=highest + 1 - min(0, lowest),
            num_bad_cases=-min(0, lowest),
            num_images=count,
            num_bad=count - good,
            parts=OldParts(masks=path, metrics=metrics.get(shard_id), cases=cases.get(shard_id)),
        )
        for shard_id, path, count, version, bundle, config, lowest, highest, good in sorted(
            zip(*columns, strict=True)
        )
    ]


def staged_night(
    plan: RunPlan, receipts: Mapping[str, Receipt], base: Night | None, results: str
) -> Night:
    """The night that publishing a complete run would make, read before it is published.

    base: the night that the run was planned on.
    """
    shards = dict(base.shards) if base is not None else {}
    gone = {parts.masks for parts in plan.removed}
    shards = {key: shard for key, shard in shards.items() if shard.parts.masks not in gone}
    for work in plan.works:
        receipt = receipts[work.shard_id]
        shards.pop(work.shard_id, None)
        if receipt.masks is None:
            continue
        parts = {name: getattr(receipt, name) for name in TABLES}
        shards[work.shard_id] = PublishedShard(
            shard_id=work.shard_id,
            version=work.version,
            bundle_digest=plan.bundle["digest"],
            config_digest=plan.config_digest,
            num_cases=receipt.num_cases,
            num_images=receipt.num_images,
            num_bad_cases=receipt.num_bad_cases,
            num_bad=receipt.num_bad,
            parts=OldParts(**{name: part and part.path for name, part in parts.items()}),
        )
    return Night(
        results=results,
        number=0 if base is None else base.number + 1,
        metadata={
            "run_id": plan.run_id,
            "bundle": dict(plan.bundle),
            "config": dict(plan.config),
            "config_digest": plan.config_digest,
            "source": dict(plan.source),
            "code": dict(plan.code),
        },
        published_ms=0,
        shards=dict(sorted(shards.items())),
    )


def nights_of_run(results: str, run_id: str) -> tuple[Night | None, Night]:
    """The night that a run was planned on, if it can still be read, and the one that it made or would make.

    Raises ResultsError if its plan is gone or it is not complete.
    """
    plan = load_plan(results, run_id)
    if plan is None:
        raise ResultsError(f"{results} has no run {run_id!r}")
    base = None
    with suppress(ResultsError):  # collected by now: what the run itself made is still there
        base = None if plan.base_night is None else open_night(results, plan.base_night)
    receipts = {receipt.shard_id: receipt for receipt in all_receipts(results, run_id)}
    if any(work.shard_id not in receipts for work in plan.works):
        raise ResultsError(f"run {run_id} is not complete")
    return base, staged_night(plan, receipts, base, results)


def _open(results: str, table: str, version: int | None = None) -> TableLog | None:
    return delta.open_log(storage.join(results, table), version)


def _log_of(results: str, record: Record, table: str) -> TableLog | None:
    """A table as a night names it; None where the night has nothing in it."""
    version = record.version_of(table)
    if version is None:
        return None
    opened = _open(results, table, version)
    if opened is None:
        raise ResultsError(f"the table {table} of {results} is gone")
    return opened


def _paths_by_shard(results: str, record: Record, table: str) -> dict[str, str]:
    opened = _log_of(results, record, table)
    columns = [] if opened is None else opened.columns("min.shard_id", "path")
    return dict(zip(*columns, strict=True))


def _record(masks: TableLog) -> Record:
    """What a version's commit recorded; a plain restore means the version that it restored."""
    own = commit = masks.commit_of(masks.version)
    while commit.metadata is None:
        if commit.restored is None or commit.restored >= commit.version:
            raise ResultsError(
                f"version {masks.version} of the masks table was not published by reseg; "
                "roll back to one that was"
            )
        commit = masks.commit_of(commit.restored)
    return Record(number=masks.version, metadata=commit.metadata, published_ms=own.timestamp_ms)


def history(results: str) -> list[dict[str, Any]]:
    """All nights, newest first: number, time, and what each commit recorded.

    `kept` says whether a night can still be read.
    """
    table = _open(results, "masks")
    if table is None:
        raise ResultsError(f"{results} holds no published night")
    oldest = oldest_kept_night(results)
    return [
        {
            "night": commit.version,
            "published_ms": commit.timestamp_ms,
            "operation": commit.operation,
            "kept": commit.version >= oldest,
            **(commit.metadata or {}),
        }
        for commit in table.commits()
    ]


def published_run(results: str) -> str | None:
    """The run that published the newest night, or rolled back to it; None before the first."""
    record = record_of(results)
    return None if record is None else str(record.metadata["run_id"])


def paths_since(results: str, night: int) -> set[str]:
    """All files (`table/name`) of a night and of those after it; some may be of no night."""
    masks = _open(results, "masks", night)
    if masks is None:
        return set()
    record = _record(masks)
    found: set[str] = set()
    for table in TABLES:
        version = record.version_of(table)
        newest = _open(results, table)
        if newest is None:
            continue
        oldest = _log_of(results, record, table)
        names = set() if oldest is None else oldest.paths()
        names |= newest.paths_added_since(-1 if version is None else version)
        found |= {f"{table}/{name}" for name in names}
    return found


def night_of_run(results: str, run_id: str, since: int | None = None) -> int | None:
    """The night that a run published, or None if it did not. since: look only at later nights."""
    return published_version(results, "masks", run_id, since)


def published_version(
    results: str, table: str, run_id: str, since: int | None = None
) -> int | None:
    """The version in which a run committed to a table, or None if it did not."""
    opened = _open(results, table)
    for commit in opened.commits() if opened is not None else ():
        if since is not None and commit.version <= since:
            return None
        if commit.metadata is not None and commit.metadata["run_id"] == run_id:
            return commit.version
    return None


# Which nights are kept

_KEPT = "oldest_kept_night.json"


def oldest_kept_night(results: str) -> int:
    """Nights before this one may have lost parts."""
    try:
        said = int(json.loads(storage.read(storage.join(results, "_runs", _KEPT)))["night"])
        return min(said, latest_night_number(results) or 0)
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError):
        raise ResultsError(
            f"{results}/_runs/{_KEPT} is damaged; `reseg vacuum` writes it anew"
        ) from None


def keep_nights_from(results: str, night: int) -> None:
    """Say, before parts are deleted, that nights before this one cannot be relied on."""
    storage.write(storage.join(results, "_runs", _KEPT), json.dumps({"night": night}).encode())


# Publication


def publish(
    results: str, plan: RunPlan, receipts: Mapping[str, Receipt], record: Mapping[str, Any]
) -> int:
    """Commit a verified run to the three tables, `masks` last; the night's number.

    Safe to call again after any failure: a table that has the run's transaction is not committed
    twice. Raises CommitConflict if another run published since this one was planned.
    """
    changes = {table: _changes(table, plan, receipts) for table in TABLES}
    return _replace_night(results, plan.run_id, plan.base_night, changes, record)


def rollback(results: str, to: int, because: str, *, run_id: str, operator: str) -> int:
    """Publish an old night's content again, as a new night on the record; its number.

    Raises ConfigError if there is nothing to take back or no reason is given.
    """
    if not because.strip():
        raise ConfigError("a rollback goes on the record: say why, with --because")
    base, old = record_of(results), record_of(results, to)
    if base is None or old is None:
        raise ResultsError(f"{results} holds no published night")
    changes = {}
    for table in TABLES:
        now, then = (_log_of(results, record, table) for record in (base, old))
        changes[table] = _difference(now, then)
    if not any(added or removed for added, removed in changes.values()):
        raise ConfigError(f"night {base.number} already has the content of night {to}")
    missing = _missing_parts(results, changes)
    if missing:
        raise ResultsError(f"night {to} cannot come back: its part {missing} is gone")
    kept = {key: value for key, value in old.metadata.items() if key != "rollback"}
    record = {
        **kept,
        "operator": operator,
        "because": because,
        "rollback": {"to": to, "run_id": old.metadata["run_id"]},
    }
    return _replace_night(results, run_id, base.number, changes, record)


def _missing_parts(results: str, changes: Changes) -> str | None:
    for table, (added, _) in changes.items():
        for part in added:
            uri = storage.join(results, table, part.path)
            info = storage.file_info(uri)
            if info is None or info.size != part.size_bytes:
                return uri
    return None


def _difference(now: TableLog | None, wanted: TableLog | None) -> tuple[list[AddedPart], list[str]]:
    """What to add and to remove to come from one version's files to another's."""
    present = now.paths() if now is not None else set()
    named = wanted.paths() if wanted is not None else set()
    added = wanted.parts(named - present) if wanted is not None and named - present else []
    return added, sorted(present - named)


def _replace_night(
    results: str,
    run_id: str,
    base_night: int | None,
    changes: Changes,
    record: Mapping[str, Any],
) -> int:
    """The protocol: side tables first, on what the base night names; `masks` on exactly that night."""
    done = night_of_run(results, run_id, since=base_night)
    if done is None:
        if latest_night_number(results) != base_night:
            raise _conflict(run_id, base_night)
        base = record_of(results)
        versions = {
            table: _commit_side(results, table, run_id, changes[table], base)
            for table in TABLES[:-1]
        }
        metadata = {**record, "run_id": run_id, "versions": versions}
        try:
            done = _commit(results, "masks", run_id, changes["masks"], metadata, base_night)
        except CommitConflict:
            settle(results)
            raise _conflict(run_id, base_night) from None
    settle(results)
    return done


def _conflict(run_id: str, base_night: int | None) -> CommitConflict:
    base = "before the first night" if base_night is None else f"against night {base_night}"
    return CommitConflict(
        f"run {run_id} was planned {base}, but another run has published since; nothing of "
        "it is visible; start again, and what it computed is used where it still fits"
    )


def _commit_side(
    results: str,
    table: str,
    run_id: str,
    change: tuple[Sequence[AddedPart], Sequence[str]],
    base: Record | None,
) -> int | None:
    """Commit to `metrics` or `cases`, first taking back what no night names."""
    named = None if base is None else base.version_of(table)
    done = published_version(results, table, run_id, since=named)
    if done is not None:
        return done
    current = _settle_table(results, table, base)
    return _commit(results, table, run_id, change, {}, current)


def settle(results: str) -> None:
    """Bring `metrics` and `cases` to what the published night names, if a dead run left them elsewhere.

    Readers of ours pin versions and never notice; this is for readers of the newest version.
    A commit of somebody else in between wins; whoever publishes next settles again.
    """
    base = record_of(results)
    for table in TABLES[:-1]:
        try:
            _settle_table(results, table, base)
        except CommitConflict:
            continue


def _settle_table(results: str, table: str, base: Record | None) -> int | None:
    """The newest version of a side table, once it holds what `base` names."""
    opened = _open(results, table)
    if opened is None:
        return None
    if base is not None and opened.version == base.version_of(table):
        return opened.version
    change = _difference(opened, None if base is None else _log_of(results, base, table))
    if not any(change):
        return opened.version
    run_id = f"settle-{opened.version + 1}"
    return _commit(results, table, run_id, change, {"settled": True}, opened.version)


def _commit(
    results: str,
    table: str,
    run_id: str,
    change: tuple[Sequence[AddedPart], Sequence[str]],
    metadata: Mapping[str, Any],
    base_version: int | None,
) -> int:
    """One commit on top of exactly `base_version`; looks again before it believes a failure."""
    added, removed = change
    uri = storage.join(results, table)
    for pause_s in (*_COMMIT_PAUSES_S, None):
        failure = None
        try:
            delta.commit(
                uri,
                table_schema(table),
                adds=added,
                removes=removed,
                run_id=run_id,
                metadata={**metadata, "run_id": run_id},
                base_version=base_version,
            )
        except delta.CommitFailed as error:
            failure = error
        landed = published_version(results, table, run_id, since=base_version)
        if landed is not None:
            return landed
        if latest_version(results, table) != base_version:
            raise CommitConflict(f"another run has committed to {uri}")
        if pause_s is None or failure is None:
            break
        time.sleep(pause_s)
    if failure is None:
        raise VerificationError(f"the commit to {uri} was accepted, but is not there")
    raise StoreFailed(
        f"the commit to {uri} failed: {failure}; what is computed is kept, and the same command "
        "publishes it"
    )


_COMMIT_PAUSES_S = (0.2, 1.0, 5.0)
"""A store may refuse a commit that nobody else made (409, 412, a dropped connection)."""


def _changes(
    table: str, plan: RunPlan, receipts: Mapping[str, Receipt]
) -> tuple[list[AddedPart], list[str]]:
    added: list[AddedPart] = []
    removed: list[str] = []
    for work in plan.works:
        part: PartFile | None = getattr(receipts[work.shard_id], table)
        old: str | None = getattr(work.old, table)
        if part is not None and part.path == old:
            continue
        if part is not None:
            added.append(AddedPart(path=part.path, size_bytes=part.size_bytes, stats=part.stats))
        if old is not None:
            removed.append(old)
    for parts in plan.removed:
        old = getattr(parts, table)
        if old is not None:
            removed.append(old)
    return added, removed


# Looking things up


def find_image(night: Night, image_id: str) -> tuple[dict[str, Any], pa.Table]:
    """One image's row of masks (with its pixels) and its rows of metrics.

    Raises ResultsError if the night does not hold it.
    """
    for shard in night.shards.values():
        path = shard.parts.masks
        if path is None:
            continue
        ids = read_part(night.results, "masks", path, ["image_id"]).column("image_id")
        index = pc.index(ids, image_id).as_py()
        if index >= 0:
            row = read_part(night.results, "masks", path).slice(index, 1).to_pylist()[0]
            return row, _metrics_of(night, shard, image_id)
    raise ResultsError(
        f"night {night.number} of {night.results} has no image {image_id!r}; "
        "`reseg paths` gives the tables that list all"
    )


def _metrics_of(night: Night, shard: PublishedShard, image_id: str) -> pa.Table:
    if shard.parts.metrics is None:
        return table_schema("metrics").empty_table()
    rows = read_part(night.results, "metrics", shard.parts.metrics)
    return rows.filter(pc.equal(rows.column("image_id"), image_id))


def read_table(night: Night, table: str, columns: Iterable[str] | None = None) -> pa.Table:
    """A whole table of a night in memory; for small ones, and for tests."""
    names = None if columns is None else list(columns)
    parts = [
        read_part(night.results, table, path, names)
        for path in (getattr(shard.parts, table) for shard in night.shards.values())
        if path
    ]
    schema = table_schema(table)
    empty = schema.empty_table() if names is None else schema.empty_table().select(names)
    return pa.concat_tables([empty, *parts])
