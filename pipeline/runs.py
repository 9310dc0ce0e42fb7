"""Runs and what they leave in staging: the frozen plan, one receipt a shard, who works on it.

Staging lies in `_runs/RUN_ID/`. A plan and a receipt are put if absent: the first one counts, and a
process that was thought dead changes nothing any more. `_runs/open/` lists the runs that were
planned and neither published nor set aside; nobody lists a folder to find data.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.errors import CommitConflict, ResultsError, VerificationError
from pipeline.records import (
    OldParts,
    PartFile,
    Receipt,
    Work,
    receipt_from_json,
    sha256_hex,
    to_plain,
    work_from_json,
)
from pipeline.tables import TABLES, decode_part

_READERS = 8


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
    try:
        data = storage.read(run_uri(results, run_id, "plan.json.gz"))
    except FileNotFoundError:
        return None
    try:
        return _plan_from_plain(json.loads(gzip.decompress(data)))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error):
        raise ResultsError(f"the plan of run {run_id} in {results} is damaged") from None


def _plan_from_plain(values: Mapping[str, Any]) -> RunPlan:
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
    if not storage.is_remote(folder) and not storage.is_folder(folder):
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


def all_receipts(results: str, run_id: str) -> Iterator[Receipt]:
    """Every receipt of a run that can be read, whatever its plan says."""
    folder = run_uri(results, run_id, "receipts")
    if not storage.is_remote(folder) and not storage.is_folder(folder):
        return
    for info in storage.list_files(folder):
        if not info.path.startswith(".tmp"):
            with suppress(ResultsError):
                receipt = load_receipt(results, run_id, info.path.removesuffix(".json"))
                if receipt is not None:
                    yield receipt


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


# Verification


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
    rows = decode_part(data, ["image_id", "case_id", "slice_name"])
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
