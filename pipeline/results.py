"""The published results: three Delta Lake tables, their parts, and the one commit of a night.

`masks`, `metrics` and `cases` are Parquet files plus an open transaction log. The commit of
`masks` is the publication: its metadata name the versions of the other two that belong to it, so
a reader through here always sees one whole night. The number of a night is the version of
`masks`. Staging lies in `_runs/RUN_ID/`; nobody lists a folder to find data.
"""

import gzip
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from pipeline import storage
from pipeline.errors import CommitConflict, ResultsError, VerificationError
from pipeline.metrics import metric_columns
from pipeline.records import (
    CASE_IDS,
    IMAGE_IDS,
    MASKS_SCHEMA,
    SHARD_COLUMNS,
    OldParts,
    PartFile,
    Receipt,
    Work,
    receipt_from_json,
    row_columns,
    sha256_hex,
)

TABLES = ("metrics", "cases", "masks")
"""In the order in which a night commits them; the last one publishes."""

METADATA_KEY = "reseg"

_TABLE_CONFIGURATION: dict[str, str | None] = {
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 36500 days",
}
"""Old nights stay readable: by default Delta forgets versions older than 30 days."""

_READERS = 8


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


def write_part(results: str, table: str, rows: pa.Table, shard_id: str) -> PartFile | None:
    """Write the rows of one shard as an immutable part named by its content; None for no rows.

    zstd, a checksum on every page, the binary column without a dictionary.
    """
    if not rows.num_rows:
        return None
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
    data = sink.getvalue().to_pybytes()
    digest = sha256_hex(data)
    name = f"part-{shard_id[:16]}-{digest[:40]}.parquet"
    storage.write(storage.join(results, table, name), data)
    return PartFile(
        path=name,
        sha256=digest,
        size_bytes=len(data),
        num_rows=rows.num_rows,
        stats=_statistics(rows),
    )


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
    uri = storage.join(results, table, path)
    try:
        with pa.PythonFile(storage.open_reader(uri), mode="r") as file:
            return pq.ParquetFile(file, page_checksum_verification=True).read(columns)
    except FileNotFoundError:
        raise ResultsError(f"the part {uri} of a published night is gone") from None
    except (pa.ArrowException, OSError) as error:
        raise ResultsError(f"the part {uri} is damaged ({type(error).__name__}: {error})") from None


# Nights


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
class Night:
    """One published version of the results. `metadata` is what its commit recorded."""

    results: str
    number: int
    metadata: Mapping[str, Any]
    published_ms: int
    shards: Mapping[str, PublishedShard]

    def paths(self, table: str) -> list[str]:
        """The Parquet files of one table of this night, in shard order."""
        names = (getattr(shard.parts, table) for shard in self.shards.values())
        return [storage.join(self.results, table, name) for name in names if name]


def latest_night_number(results: str) -> int | None:
    """The number of the published night, None before the first."""
    table = _open_table(results, "masks")
    return None if table is None else int(table.version())


def open_night(results: str, number: int | None = None) -> Night | None:
    """The published night, or the night of a number; None where nothing was published yet.

    Raises ResultsError for a number that does not exist.
    """
    table = _open_table(results, "masks", number)
    if table is None:
        if number is not None:
            raise ResultsError(f"{results} has no night {number}: nothing is published there")
        return None
    version = int(table.version())
    commit = _commit_of(table, version)
    metadata = json.loads(commit[METADATA_KEY])
    adds = _adds(table)
    others = {
        name: _parts_by_shard(results, name, metadata["versions"][name])
        for name in ("metrics", "cases")
    }
    shards = {
        str(row["min.shard_id"]): PublishedShard(
            shard_id=row["min.shard_id"],
            version=row["min.shard_version"],
            bundle_digest=row["min.bundle_digest"],
            config_digest=row["min.config_digest"],
            num_cases=row["max.case_index"] + 1 - min(0, row["min.case_index"]),
            num_bad_cases=-min(0, row["min.case_index"]),
            num_images=row["num_records"],
            num_bad=row["num_records"] - row["null_count.error_class"],
            parts=OldParts(
                masks=row["path"],
                **{n: found.get(row["min.shard_id"]) for n, found in others.items()},
            ),
        )
        for row in sorted(adds, key=lambda row: row["min.shard_id"])
    }
    return Night(
        results=results,
        number=version,
        metadata=metadata,
        published_ms=int(commit["timestamp"]),
        shards=shards,
    )


def _adds(table: DeltaTable) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    return rows


def _parts_by_shard(results: str, name: str, version: int | None) -> dict[str, str]:
    if version is None:
        return {}
    table = _open_table(results, name, version)
    if table is None:
        raise ResultsError(f"the table {name} of {results} is gone")
    return {row["min.shard_id"]: row["path"] for row in _adds(table)}


def _open_table(results: str, name: str, version: int | None = None) -> DeltaTable | None:
    uri = storage.join(results, name)
    if not storage.is_remote(uri) and not os.path.isdir(storage.join(uri, "_delta_log")):
        return None
    try:
        return DeltaTable(uri, version=version, storage_options=_storage_options(uri))
    except TableNotFoundError:
        return None
    except DeltaError as error:
        if version is not None:
            raise ResultsError(f"{results} has no night {version}") from None
        raise ResultsError(f"the log of {uri} cannot be read: {error}") from None


def _storage_options(uri: str) -> dict[str, str] | None:
    if not storage.is_remote(uri):
        return None
    plain_http = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return {"AWS_ALLOW_HTTP": "true"} if plain_http else {}


def _commit_of(table: DeltaTable, version: int) -> dict[str, Any]:
    """The commit that says what a version means; a plain restore means the one it restored."""
    commits = {item["version"]: item for item in table.history()}
    wanted = version
    while True:
        commit = commits.get(wanted)
        if commit is not None and METADATA_KEY in commit:
            return {**commit, "timestamp": commits[version]["timestamp"]}
        restored = (commit or {}).get("operationParameters", {}).get("version")
        if restored is None or int(restored) >= wanted:
            raise ResultsError(
                f"version {version} of the masks table was not published by reseg; "
                "roll back to one that was"
            )
        wanted = int(restored)


def history(results: str) -> list[dict[str, Any]]:
    """All nights, newest first: number, time, and what each commit recorded."""
    table = _open_table(results, "masks")
    if table is None:
        raise ResultsError(f"{results} holds no published night")
    nights = []
    for commit in table.history():
        metadata = json.loads(commit[METADATA_KEY]) if METADATA_KEY in commit else {}
        nights.append(
            {
                "night": commit["version"],
                "published_ms": commit["timestamp"],
                "operation": commit["operation"],
                **metadata,
            }
        )
    return nights


# Runs


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What one run will do, frozen before it starts.

    source: uri, format, patterns and number of buckets. removed: parts of shards that the source
    no longer has. counts: as `reseg plan` prints them.
    """

    run_id: str
    base_night: int | None
    bundle: Mapping[str, Any]
    config: Mapping[str, Any]
    config_digest: str
    source: Mapping[str, Any]
    works: tuple[Work, ...]
    removed: tuple[OldParts, ...]
    counts: Mapping[str, Any]
    code: Mapping[str, str] = field(default_factory=dict)

    def work_keys(self) -> dict[str, str]:
        """The key of each shard's work, by shard."""
        return {w.shard_id: w.key(self.bundle["digest"], self.config_digest) for w in self.works}


def run_uri(results: str, run_id: str, *parts: str) -> str:
    """A path in a run's staging folder."""
    return storage.join(results, "_runs", run_id, *parts)


def save_plan(results: str, plan: RunPlan) -> None:
    """Freeze a plan. Raises CommitConflict if another process froze another one under its id."""
    from pipeline.records import to_plain

    values = {**to_plain(plan), "works": [w.to_json().decode() for w in plan.works]}
    data = gzip.compress(json.dumps(values, sort_keys=True).encode(), 6, mtime=0)
    if not storage.create(run_uri(results, plan.run_id, "plan.json.gz"), data):
        existing = storage.read(run_uri(results, plan.run_id, "plan.json.gz"))
        if existing != data:
            raise CommitConflict(f"the run {plan.run_id} was just started by another process")
    config = json.dumps(plan.config, indent=1, sort_keys=True).encode()
    storage.write(run_uri(results, plan.run_id, "config.json"), config)
    storage.write(run_uri(results, "open", plan.run_id), b"")


def load_plan(results: str, run_id: str) -> RunPlan | None:
    """A frozen plan, or None where the run was never started."""
    from pipeline.records import work_from_json

    try:
        data = storage.read(run_uri(results, run_id, "plan.json.gz"))
    except FileNotFoundError:
        return None
    try:
        values = json.loads(gzip.decompress(data))
    except (OSError, EOFError, ValueError, zlib.error):
        raise ResultsError(f"the plan of run {run_id} in {results} is damaged") from None
    return RunPlan(
        run_id=values["run_id"],
        base_night=values.get("base_night"),
        bundle=values["bundle"],
        config=values["config"],
        config_digest=values["config_digest"],
        source=values["source"],
        works=tuple(work_from_json(item.encode()) for item in values["works"]),
        removed=tuple(OldParts(**item) for item in values["removed"]),
        counts=values["counts"],
        code=values.get("code", {}),
    )


def has_plan(results: str, run_id: str) -> bool:
    """Whether a run was started, that is, its plan frozen."""
    return storage.file_info(run_uri(results, run_id, "plan.json.gz")) is not None


def open_runs(results: str) -> list[str]:
    """Ids of runs that were planned and neither published nor set aside, oldest first."""
    folder = storage.join(results, "_runs", "open")
    if not storage.is_remote(folder) and not os.path.isdir(folder):
        return []
    return sorted(i.path for i in storage.list_files(folder) if not i.path.startswith(".tmp"))


def close_run(results: str, run_id: str) -> None:
    """Take a run off the list of open ones; its staging stays for whoever asks."""
    storage.remove(run_uri(results, "open", run_id))


def put_receipt(results: str, run_id: str, receipt: Receipt) -> Receipt:
    """File a receipt; the first of a shard wins, and is returned."""
    uri = run_uri(results, run_id, "receipts", f"{receipt.shard_id}.json")
    if storage.create(uri, receipt.to_json()):
        return receipt
    return receipt_from_json(storage.read(uri))


def load_receipt(results: str, run_id: str, shard_id: str) -> Receipt | None:
    """A shard's receipt, or None while it has none. Raises ResultsError if it is damaged."""
    try:
        data = storage.read(run_uri(results, run_id, "receipts", f"{shard_id}.json"))
    except FileNotFoundError:
        return None
    try:
        return receipt_from_json(data)
    except (ValueError, KeyError, TypeError):
        raise ResultsError(f"the receipt of {shard_id} in run {run_id} is damaged") from None


def withdraw_receipt(results: str, run_id: str, shard_id: str) -> None:
    """Take a receipt back, so that its shard is computed again; its parts become orphans."""
    storage.remove(run_uri(results, run_id, "receipts", f"{shard_id}.json"))


def load_receipts(results: str, plan: RunPlan) -> dict[str, Receipt]:
    """The receipts of a run that can be relied on, by shard.

    Those whose parts are not there, or that hold images which failed for a passing reason, are
    withdrawn: their shards are computed again.
    """
    keys = plan.work_keys()

    def load(shard_id: str) -> Receipt | None:
        receipt = _load_reliable(results, plan.run_id, shard_id, keys[shard_id])
        if receipt is None:
            withdraw_receipt(results, plan.run_id, shard_id)
        return receipt

    with ThreadPoolExecutor(_READERS) as pool:
        return {item.shard_id: item for item in pool.map(load, keys) if item is not None}


def _load_reliable(results: str, run_id: str, shard_id: str, work_key: str) -> Receipt | None:
    """A receipt for exactly this work, whole, with its parts, and without passing failures."""
    try:
        receipt = load_receipt(results, run_id, shard_id)
    except ResultsError:
        return None
    if receipt is None or receipt.work_key != work_key or receipt.num_to_retry:
        return None
    for table in TABLES:
        part: PartFile | None = getattr(receipt, table)
        if part is not None:
            info = storage.file_info(storage.join(results, table, part.path))
            if info is None or info.size != part.size_bytes:
                return None
    return receipt


def adopt_receipts(results: str, plan: RunPlan, abandoned: str) -> int:
    """Take over from an unfinished run the shards whose work is still exactly the same."""
    adopted = 0
    for shard_id, key in plan.work_keys().items():
        receipt = _load_reliable(results, abandoned, shard_id, key)
        if receipt is not None:
            put_receipt(results, plan.run_id, receipt)
            adopted += 1
    return adopted


# Verification and publication


def verify_receipts(results: str, plan: RunPlan, receipts: Mapping[str, Receipt]) -> None:
    """Check on the store that every planned image is there exactly once, in parts as received.

    Raises VerificationError.
    """
    missing = [work.path for work in plan.works if work.shard_id not in receipts]
    if missing:
        raise VerificationError(f"{len(missing)} planned shards have no receipt, as {missing[0]!r}")
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda w: _verify_shard(results, w, receipts[w.shard_id]), plan.works)
        problems = [
            (work, problem) for work, problem in zip(plan.works, found, strict=True) if problem
        ]
    for work, _ in problems:
        withdraw_receipt(results, plan.run_id, work.shard_id)
    if problems:
        raise VerificationError(
            f"{problems[0][1]} ({len(problems)} shards in all); nothing is published, and the same "
            "command computes them again"
        )


def _verify_shard(results: str, work: Work, receipt: Receipt) -> str | None:
    for table in TABLES:
        part: PartFile | None = getattr(receipt, table)
        if part is None:
            continue
        uri = storage.join(results, table, part.path)
        try:
            data = storage.read(uri)
        except FileNotFoundError:
            return f"the part {uri} is not there"
        if sha256_hex(data) != part.sha256:
            return f"the part {uri} does not have the digest of its receipt"
        if table == "masks" and (problem := _verify_rows(data, work)):
            return f"the part {uri} {problem}"
    if receipt.masks is None and (work.compute or work.copy):
        return f"the shard {work.path!r} has cases, but no part of masks"
    return None


def _verify_rows(data: bytes, work: Work) -> str | None:
    columns = ["image_id", "case_id", "slice_name"]
    rows = pq.ParquetFile(pa.BufferReader(data)).read(columns).to_pylist()
    if len({row["image_id"] for row in rows}) != len(rows):
        return "holds an image twice"
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["case_id"], set()).add(row["slice_name"])
    copied = {case_id for case_id, _ in work.copy}
    wanted = {case.case_id for case in work.compute} | copied
    if found.keys() != wanted:
        odd = sorted(found.keys() ^ wanted)[0]
        return f"does not hold the planned cases: {odd!r}"
    for case in work.compute:
        names = found[case.case_id]
        for item in case.slices:
            if not names & {item.name, f"{item.name}.0"}:
                return f"lacks the slice {item.name!r} of {case.case_id!r}"
    return None


def published_version(results: str, table: str, run_id: str) -> int | None:
    """The version in which a run committed to a table, or None if it did not."""
    opened = _open_table(results, table)
    if opened is None or opened.transaction_version(run_id) is None:
        return None
    for commit in opened.history():
        if METADATA_KEY in commit and json.loads(commit[METADATA_KEY])["run_id"] == run_id:
            return int(commit["version"])
    return None


def publish(
    results: str, plan: RunPlan, receipts: Mapping[str, Receipt], record: Mapping[str, Any]
) -> int:
    """Commit a verified run to the three tables, `masks` last; the night's number.

    Safe to call again after any failure: a table that has the run's transaction is not committed
    twice. Raises CommitConflict if another run published since this one was planned.
    """
    done = published_version(results, "masks", plan.run_id)
    if done is not None:
        return done
    if latest_night_number(results) != plan.base_night:
        raise _conflict(plan)
    base = open_night(results)
    versions: dict[str, int | None] = {}
    for table in TABLES[:-1]:
        named = None if base is None else base.metadata["versions"][table]
        versions[table] = _commit_side(results, table, plan, receipts, named)
    metadata = {**record, "run_id": plan.run_id, "versions": versions}
    return _commit(results, "masks", plan, receipts, metadata, plan.base_night)


def _conflict(plan: RunPlan) -> CommitConflict:
    base = (
        "before the first night" if plan.base_night is None else f"against night {plan.base_night}"
    )
    return CommitConflict(
        f"run {plan.run_id} was planned {base}, but another run has published since; nothing of "
        "it is visible; start again, and what it computed is used where it still fits"
    )


def _commit_side(
    results: str,
    table: str,
    plan: RunPlan,
    receipts: Mapping[str, Receipt],
    named: int | None,
) -> int | None:
    """Commit to `metrics` or `cases`, first taking back what no night names."""
    done = published_version(results, table, plan.run_id)
    if done is not None:
        return done
    opened = _open_table(results, table)
    current = None if opened is None else int(opened.version())
    if opened is not None and named is not None and current != named:
        opened.restore(named)
        current = int(opened.version())
    if opened is not None and named is None:
        _remove_all(opened, plan)
        current = int(opened.version())
    return _commit(results, table, plan, receipts, {"run_id": plan.run_id}, current)


def _remove_all(opened: DeltaTable, plan: RunPlan) -> None:
    """Take back a first commit that no night ever named."""
    removes: list[AddAction | RemoveAction] = [_remove(row["path"]) for row in _adds(opened)]
    if removes:
        opened.create_write_transaction(
            removes,
            "append",
            Schema.from_arrow(table_schema(opened.table_uri.rstrip("/").rsplit("/", 1)[-1])),
            commit_properties=CommitProperties(max_commit_retries=0),
        )
        opened.update_incremental()


def _commit(
    results: str,
    table: str,
    plan: RunPlan,
    receipts: Mapping[str, Receipt],
    metadata: Mapping[str, Any],
    base_version: int | None,
) -> int:
    """One commit on top of exactly `base_version`; looks again before it believes a failure."""
    actions = list(_actions(table, plan, receipts))
    uri = storage.join(results, table)
    schema = Schema.from_arrow(table_schema(table))
    properties = CommitProperties(
        max_commit_retries=0,
        custom_metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)},
        app_transactions=[Transaction(plan.run_id, 1)],
    )
    try:
        if base_version is None:
            adds = [action for action in actions if isinstance(action, AddAction)]
            create_table_with_add_actions(
                uri,
                schema,
                adds,
                configuration=_TABLE_CONFIGURATION,
                commit_properties=properties,
                storage_options=_storage_options(uri),
            )
        else:
            opened = _open_table(results, table, base_version)
            if opened is None:
                raise ResultsError(f"the table {uri} is gone")
            opened.create_write_transaction(actions, "append", schema, commit_properties=properties)
    except (CommitFailedError, DeltaError, OSError) as error:
        landed = published_version(results, table, plan.run_id)
        if landed is not None:
            return landed
        if latest_version(results, table) != base_version:
            raise _conflict(plan) from None
        raise VerificationError(f"the commit to {uri} failed: {error}") from None
    landed = published_version(results, table, plan.run_id)
    if landed is None:
        raise VerificationError(f"the commit to {uri} was accepted, but is not there")
    return landed


def latest_version(results: str, table: str) -> int | None:
    """The newest version of one table, None where there is no table."""
    opened = _open_table(results, table)
    return None if opened is None else int(opened.version())


def _actions(
    table: str, plan: RunPlan, receipts: Mapping[str, Receipt]
) -> Iterator[AddAction | RemoveAction]:
    for work in plan.works:
        part: PartFile | None = getattr(receipts[work.shard_id], table)
        old: str | None = getattr(work.old, table)
        if part is not None and part.path == old:
            continue
        if part is not None:
            yield _add(part)
        if old is not None:
            yield _remove(old)
    for parts in plan.removed:
        old = getattr(parts, table)
        if old is not None:
            yield _remove(old)


def _add(part: PartFile) -> AddAction:
    now_ms = int(time.time() * 1000)
    return AddAction(part.path, part.size_bytes, {}, now_ms, True, json.dumps(part.stats))


def _remove(path: str) -> RemoveAction:
    return RemoveAction(path, True, int(time.time() * 1000))


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
