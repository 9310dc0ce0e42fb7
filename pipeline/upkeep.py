"""Upkeep of results: seal what was published, find any flipped bit of it, collect what no night needs."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline import delta, results, runs, storage
from pipeline.errors import ResultsError
from pipeline.policy import KeepConfig
from pipeline.records import sha256_hex
from pipeline.results import Night, Record
from pipeline.tables import TABLES, content_digest, part_prefix

Progress = Callable[[int, int, str], None]

_READERS = 8
_PREFIX_LENGTH = len(part_prefix("0" * 64))
_SEALS = "_seals"


def _silent(done: int, total: int, what: str) -> None:
    """No progress is wanted."""


# Seals: the log and the manifests have no checksums of their own


def seal_night(results_uri: str, night: Record, previous: Record | None) -> None:
    """Store the digests of the files that say what a night is: log entries, plan, receipts.

    Parts need none: they carry theirs in their names. Done once; a seal is never written again.
    """
    run_id = night.metadata["run_id"]
    seal_uri = _seal_uri(results_uri, night.number)
    names = [*_log_entries(night, previous), *_manifests(results_uri, run_id)]
    with ThreadPoolExecutor(_READERS) as pool:
        digests = pool.map(lambda n: sha256_hex(storage.read(storage.join(results_uri, n))), names)
        files = dict(zip(names, digests, strict=True))
    text = json.dumps({"night": night.number, "files": files}, sort_keys=True)
    storage.create(
        seal_uri, json.dumps({"digest": sha256_hex(text.encode()), "seal": text}).encode()
    )


def _log_entries(night: Record, previous: Record | None) -> Iterator[str]:
    """The log entries of all tables since the previous night."""
    for table in TABLES:
        now = night.version_of(table)
        then = None if previous is None else previous.version_of(table)
        for version in range(-1 if then is None else then, -1 if now is None else now):
            yield f"{table}/_delta_log/{version + 1:020d}.json"


def _manifests(results_uri: str, run_id: str) -> Iterator[str]:
    """Plan, configuration and receipts of a run; a rollback has none."""
    if not runs.has_plan(results_uri, run_id):
        return
    yield from (f"_runs/{run_id}/{name}" for name in ("plan.json.gz", "config.json"))
    plan = runs.load_plan(results_uri, run_id)
    assert plan is not None
    for work in plan.works:
        yield f"_runs/{run_id}/receipts/{work.shard_id}.json"


def seal_all(results_uri: str) -> None:
    """Seal the published night and those before it, back to one that is sealed."""
    if results.latest_night_number(results_uri) is None:
        return
    for number in reversed(kept_nights(results_uri)):
        if storage.file_info(_seal_uri(results_uri, number)) is not None:
            break
        night = results.record_of(results_uri, number)
        assert night is not None
        seal_night(results_uri, night, _before(results_uri, night))


def _seal_uri(results_uri: str, number: int) -> str:
    return storage.join(results_uri, _SEALS, f"{number:020d}.json")


def _before(results_uri: str, night: Record) -> Record | None:
    """The night before, if it can still be opened."""
    try:
        return results.record_of(results_uri, night.number - 1) if night.number else None
    except ResultsError:
        return None


# Checksums


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What reading everything found. unsealed: nights whose log entries have no digests."""

    nights: tuple[int, ...]
    num_parts: int
    num_manifests: int
    num_bytes: int
    damaged: tuple[str, ...]
    unsealed: tuple[int, ...]

    def to_plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "nights": list(self.nights),
            "parts": self.num_parts,
            "manifests": self.num_manifests,
            "bytes": self.num_bytes,
            "damaged": list(self.damaged),
            "unsealed_nights": list(self.unsealed),
        }


def verify_checksums(results_uri: str, progress: Progress = _silent) -> Checked:
    """Read every part and manifest of the nights that are kept, and compare all digests.

    Raises ResultsError where nothing is published or the log itself cannot be opened.
    """
    numbers = kept_nights(results_uri)
    parts: dict[str, str] = {}
    manifests: dict[str, str] = {}
    damaged: list[str] = []
    unsealed: list[int] = []
    for number in numbers:
        try:
            night = results.open_night(results_uri, number)
        except (ResultsError, KeyError, ValueError, TypeError) as error:
            damaged.append(f"night {number}: {error}")
            continue
        assert night is not None
        for table in TABLES:
            for uri in night.paths(table):
                parts[uri] = content_digest(uri.rsplit("/", 1)[1])
        files = _read_seal(results_uri, night, damaged)
        if files is None:
            unsealed.append(number)
        else:
            manifests.update({storage.join(results_uri, name): d for name, d in files.items()})
    found, num_bytes = _compare_digests({**parts, **manifests}, progress)
    damaged += found + _damaged_checkpoints(results_uri)
    return Checked(
        nights=tuple(numbers),
        num_parts=len(parts),
        num_manifests=len(manifests),
        num_bytes=num_bytes,
        damaged=tuple(sorted(damaged)),
        unsealed=tuple(unsealed),
    )


def _read_seal(results_uri: str, night: Night, damaged: list[str]) -> dict[str, str] | None:
    uri = _seal_uri(results_uri, night.number)
    try:
        sealed = json.loads(storage.read(uri))
        if sha256_hex(sealed["seal"].encode()) != sealed["digest"]:
            raise ValueError
        files: dict[str, str] = json.loads(sealed["seal"])["files"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        damaged.append(f"{uri}: its own digest does not fit")
        return {}
    return files


def _compare_digests(wanted: Mapping[str, str], progress: Progress) -> tuple[list[str], int]:
    def check(uri: str) -> tuple[str | None, int]:
        try:
            data = storage.read(uri)
        except FileNotFoundError:
            return f"{uri}: is gone", 0
        except OSError as error:
            return f"{uri}: cannot be read ({error.strerror or type(error).__name__})", 0
        fits = wanted[uri] and sha256_hex(data).startswith(wanted[uri])
        return (None if fits else f"{uri}: its digest does not fit"), len(data)

    damaged, num_bytes = [], 0
    with ThreadPoolExecutor(_READERS) as pool:
        for number, (problem, size) in enumerate(pool.map(check, wanted), start=1):
            num_bytes += size
            if problem:
                damaged.append(problem)
            progress(number, len(wanted), "verifying")
    return damaged, num_bytes


def _damaged_checkpoints(results_uri: str) -> list[str]:
    """Tables whose newest version, opened through a Delta checkpoint, is not what the log says."""
    damaged = []
    for table in TABLES:
        uri = storage.join(results_uri, table)
        log = storage.join(uri, "_delta_log")
        try:
            if storage.file_info(storage.join(log, "_last_checkpoint")) is None:
                continue
            opened = delta.open_log(uri)
            if opened is None:
                continue
            present = opened.paths()
            said = _replay(log, opened.version)
        except (ResultsError, ValueError, KeyError, OSError) as error:
            damaged.append(f"{log}: {error}")
            continue
        if present != said:
            damaged.append(f"{log}: a checkpoint disagrees with the log")
    return damaged


def _replay(log: str, version: int) -> set[str]:
    present: set[str] = set()
    for number in range(version + 1):
        for line in storage.read(storage.join(log, f"{number:020d}.json")).splitlines():
            action = json.loads(line)
            if "add" in action:
                present.add(action["add"]["path"])
            elif "remove" in action:
                present.discard(action["remove"]["path"])
    return present


# Collecting


@dataclass(frozen=True, slots=True, kw_only=True)
class Waste:
    """Files that no kept night and no unfinished run needs. oldest_night: the first one kept."""

    oldest_night: int
    nights_dropped: int
    files: tuple[str, ...]
    num_bytes: int
    num_too_young: int

    def to_plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "oldest_kept_night": self.oldest_night,
            "nights_dropped": self.nights_dropped,
            "files": len(self.files),
            "bytes": self.num_bytes,
            "too_young": self.num_too_young,
        }


def kept_nights(results_uri: str) -> list[int]:
    """Numbers of the nights that can be read, oldest first. Raises ResultsError if there is none."""
    return sorted(entry["night"] for entry in results.history(results_uri) if entry["kept"])


def _readable(results_uri: str) -> list[int]:
    """As `kept_nights`; where nobody knows any more which those are, all."""
    try:
        return kept_nights(results_uri)
    except ResultsError:
        newest = results.latest_night_number(results_uri)
        if newest is None:
            raise
        return list(range(newest + 1))


def find_waste(results_uri: str, keep: KeepConfig, now_s: float | None = None) -> Waste:
    """What a vacuum would delete: files of the tables' folders that nothing needs, older than the grace.

    Needed are the parts of the newest `keep.nights` nights and those in receipts of open runs.
    """
    staged, shards = _staged(results_uri)  # first: what is published meanwhile is in one of the two
    nights = _readable(results_uri)
    kept = nights[-keep.nights :] if keep.nights else nights
    needed = staged | results.paths_since(results_uri, kept[0])
    oldest_s = (time.time() if now_s is None else now_s) - keep.grace_hours * 3600
    files, num_bytes, young = [], 0, 0
    for folder, info in _collectable(results_uri):
        path = f"{folder}/{info.path}"
        if path in needed or info.path[:_PREFIX_LENGTH] in shards:
            continue
        if info.modified_s > oldest_s:
            young += 1
            continue
        files.append(path)
        num_bytes += info.size
    return Waste(
        oldest_night=kept[0],
        nights_dropped=len(nights) - len(kept),
        files=tuple(sorted(files)),
        num_bytes=num_bytes,
        num_too_young=young,
    )


def collect(results_uri: str, waste: Waste, progress: Progress = _silent) -> None:
    """Delete what `find_waste` found; first say that the dropped nights are gone."""
    results.keep_nights_from(results_uri, waste.oldest_night)
    with ThreadPoolExecutor(_READERS) as pool:
        deleted = pool.map(
            lambda path: storage.remove(storage.join(results_uri, path)), waste.files
        )
        for number, _ in enumerate(deleted, start=1):
            progress(number, len(waste.files), "collecting")


def _staged(results_uri: str) -> tuple[set[str], set[str]]:
    """What runs that may still be published hold: parts in receipts, and prefixes of parts to come.

    A run that is taken up again writes the same part under the same name, maybe in this moment.
    """
    needed: set[str] = set()
    prefixes: set[str] = set()
    for run_id in runs.open_runs(results_uri):
        done = set()
        for receipt in runs.all_receipts(results_uri, run_id):
            done.add(receipt.shard_id)
            for table in TABLES:
                part = getattr(receipt, table)
                if part is not None:
                    needed.add(f"{table}/{part.path}")
        with suppress(ResultsError):  # a run whose plan is damaged is never taken up
            plan = runs.load_plan(results_uri, run_id)
            works = plan.works if plan is not None else ()
            prefixes |= {part_prefix(w.shard_id) for w in works if w.shard_id not in done}
    return needed, prefixes


def _collectable(results_uri: str) -> Iterator[tuple[str, storage.FileInfo]]:
    """Files of the three tables but their logs, and those of shadow runs."""
    for folder in (*TABLES, "_shadow"):
        uri = storage.join(results_uri, folder)
        if not storage.is_remote(uri) and not storage.is_folder(uri):
            continue
        for info in storage.list_files(uri):
            if folder == "_shadow" or not info.path.startswith("_delta_log/"):
                yield folder, info
