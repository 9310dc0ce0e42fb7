"""The transaction log of one Delta Lake table: what is in a version, and commits on top of exactly one.

Nothing else touches the log. A commit is a compare-and-swap: it lands as the version after the one it
was made for, or not at all. What the library lets through (a run committed twice, a file that is
not there) is for callers to check.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from pipeline import objectstore, storage
from pipeline.errors import ResultsError

METADATA_KEY = "reseg"

_TABLE_CONFIGURATION: dict[str, str | None] = {
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 36500 days",
}
"""Old nights stay readable: by default Delta forgets versions older than 30 days."""


class CommitFailed(Exception):
    """A commit did not answer as hoped; whether it landed is told only by looking again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedPart:
    """One Parquet file of a version. stats: as `tables.write_part` made them."""

    path: str
    size_bytes: int
    stats: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One version's entry in the log. metadata: what reseg recorded, None for commits of others.

    restored: the version that a plain Delta `restore` went back to.
    """

    version: int
    timestamp_ms: int
    operation: str
    metadata: Mapping[str, Any] | None
    restored: int | None = None


class TableLog:
    """A table at one version; its files are loaded when they are asked for."""

    def __init__(self, uri: str, version: int) -> None:
        self._uri, self.version = uri, version

    def columns(self, *names: str) -> list[list[Any]]:
        """Columns of this version's files, in one order: path, size_bytes, num_records, and statistics
        as `min.shard_id`, `max.case_index`, `null_count.error_class`."""
        table = self._adds
        return [table.column(name).to_pylist() for name in names]

    def paths(self) -> set[str]:
        """The files of this version."""
        return set(self.columns("path")[0])

    def parts(self, wanted: Set[str] | None = None) -> list[AddedPart]:
        """The files of this version, or those of some paths, with all that a commit says of them."""
        table = self._adds
        if wanted is not None:
            chosen = pa.array(sorted(wanted), pa.string())
            table = table.filter(pc.is_in(table.column("path").cast(pa.string()), chosen))
        found = []
        for row in table.to_pylist():
            stats: dict[str, Any] = {"numRecords": row["num_records"]}
            for key, prefix in _STATISTICS.items():
                stats[key] = {
                    name[len(prefix) :]: value
                    for name, value in row.items()
                    if name.startswith(prefix) and value is not None
                }
            found.append(AddedPart(path=row["path"], size_bytes=row["size_bytes"], stats=stats))
        return found

    def paths_added_since(self, version: int) -> set[str]:
        """What the commits after a version, up to this one, have added; some may be gone again."""
        found = set()
        for number in range(version + 1, self.version + 1):
            for action in self._actions(number):
                if "add" in action:
                    found.add(action["add"]["path"])
        return found

    @cached_property
    def _adds(self) -> pa.Table:
        try:
            options = _storage_options(self._uri)
            table = DeltaTable(self._uri, version=self.version, storage_options=options)
        except (DeltaError, OSError) as error:
            raise ResultsError(
                f"the log of {self._uri} cannot be read: {_on_one_line(error)}"
            ) from None
        return pa.table(table.get_add_actions(flatten=True))

    def _actions(self, version: int) -> Iterator[dict[str, Any]]:
        """The lines of one log entry."""
        uri = storage.join(self._uri, "_delta_log", f"{version:020d}.json")
        try:
            with storage.open_reader(uri) as file:
                yield from map(json.loads, file)
        except FileNotFoundError:
            raise ResultsError(f"the log entry {uri} is gone") from None
        except ValueError:
            raise ResultsError(f"the log entry {uri} is damaged") from None

    def commits(self) -> Iterator[Commit]:
        """All versions up to this one, newest first, each read when it is asked for.

        From the log's own files: the library numbers its history down from the version that is
        opened, whichever commits it has found by then.
        """
        for version in range(self.version, -1, -1):
            yield self.commit_of(version)

    def commit_of(self, version: int) -> Commit:
        """One version's entry. Raises ResultsError if it is gone or damaged."""
        info: dict[str, Any] = next(
            (a["commitInfo"] for a in self._actions(version) if "commitInfo" in a), {}
        )
        try:
            text = info.get(METADATA_KEY)
            restored = (info.get("operationParameters") or {}).get("version")
            return Commit(
                version=version,
                timestamp_ms=int(info.get("timestamp", 0)),
                operation=str(info.get("operation", "")),
                metadata=None if text is None else json.loads(text),
                restored=None if restored is None else int(restored),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ResultsError(f"the log entry {version} of {self._uri} is damaged") from None


_LOG_ENTRY = re.compile(r"([0-9]{20})\.json")
_STATISTICS = {"minValues": "min.", "maxValues": "max.", "nullCount": "null_count."}


def open_log(uri: str, version: int | None = None) -> TableLog | None:
    """A table at its newest or at a given version; None where there is no table.

    Raises ResultsError for a version that does not exist.
    """
    newest = _newest_version(uri)
    if newest is None:
        return None
    if version is not None and not 0 <= version <= newest:
        raise ResultsError(f"{uri} has no version {version}")
    return TableLog(uri, newest if version is None else version)


def _newest_version(uri: str) -> int | None:
    """By listing the log: opening a table of many parts takes a second, this takes none."""
    log = storage.join(uri, "_delta_log")
    if not storage.is_remote(uri) and not storage.is_folder(log):
        return None
    entries = (_LOG_ENTRY.fullmatch(info.path) for info in storage.list_files(log))
    return max((int(entry.group(1)) for entry in entries if entry), default=None)


def commit(
    uri: str,
    schema: pa.Schema,
    *,
    adds: Iterable[AddedPart],
    removes: Iterable[str],
    run_id: str,
    metadata: Mapping[str, Any],
    base_version: int | None,
) -> None:
    """Commit on top of exactly `base_version` (None: create the table).

    Raises CommitFailed when the library reports anything else than success: the commit may have
    landed all the same.
    """
    now_ms = int(time.time() * 1000)
    added = [
        AddAction(part.path, part.size_bytes, {}, now_ms, True, json.dumps(dict(part.stats)))
        for part in adds
    ]
    properties = CommitProperties(
        max_commit_retries=0,
        custom_metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)},
        app_transactions=[Transaction(run_id, 1)],
    )
    delta_schema = Schema.from_arrow(schema)
    with storage.exclusive(uri) as locked:
        if locked and _newest_version(uri) != base_version:
            raise CommitFailed("another commit landed first")
        options = _storage_options(uri)
        try:
            if base_version is None:
                create_table_with_add_actions(
                    uri,
                    delta_schema,
                    added,
                    configuration=_TABLE_CONFIGURATION,
                    commit_properties=properties,
                    storage_options=options,
                )
                return
            actions: list[AddAction | RemoveAction] = [
                *added,
                *(RemoveAction(path, True, now_ms) for path in removes),
            ]
            table = DeltaTable(uri, version=base_version, storage_options=options)
            table.create_write_transaction(
                actions, "append", delta_schema, commit_properties=properties
            )
        except (CommitFailedError, DeltaError, OSError) as error:
            raise CommitFailed(_on_one_line(error)) from None


def _on_one_line(error: BaseException) -> str:
    """The library's chain of causes, which it draws as a coloured tree."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip().removeprefix("↳").strip() for line in plain.splitlines()]
    return ": ".join(line for line in lines if line)[:500]


def _storage_options(uri: str) -> dict[str, str] | None:
    return objectstore.storage_options(uri) if storage.is_remote(uri) else None
