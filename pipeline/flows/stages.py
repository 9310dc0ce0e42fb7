"""What the workers of a segmentation do: read a shard, decode and predict it, finish and write it.

Each stage takes and yields Arrow tables whose rows are whole shards. Nothing here knows of Ray: `stream`
hands these to it, and tests call them one after the other.
"""

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import local
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import runs, storage, tables
from pipeline.bundle import load_bundle
from pipeline.cases import (
    CaseRows,
    DecodedCase,
    decode_case,
    finish_case,
    pack_predicted,
    unpack_predicted,
)
from pipeline.config import SegmentConfig
from pipeline.errors import RETRIED_ERRORS, ConfigError, ErrorClass
from pipeline.formats import FORMATS, Source
from pipeline.records import (
    STATUS_OK,
    EncodedCase,
    EncodedSlice,
    Problem,
    Receipt,
    Work,
    receipt_from_json,
    work_from_json,
)
from pipeline.sandbox import Sandbox
from pipeline.transforms import Recipe

_MAX_BYTES_IN_ROW = 512 << 20
_LOOKAHEAD = 2
_MOST_BAD_IMAGES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every worker of a run knows; small, and the same for all."""

    run_id: str
    results: str
    source: Source
    bundle_uri: str
    bundle_digest: str
    config: SegmentConfig
    config_digest: str
    recipe: Recipe
    labels: tuple[str, ...]

    def begin(self) -> None:
        """To be called first in every process that works on it."""
        storage.expect(self.results, self.source.uri, self.bundle_uri)


def read_stage(batch: pa.Table, job: Job) -> Iterator[pa.Table]:
    """Shards to their encoded bytes; a shard too large for a row stays a reference."""
    job.begin()
    for data in batch.column("work").to_pylist():
        work = work_from_json(data)
        started = time.monotonic()
        payload = None
        if work.size_bytes <= _MAX_BYTES_IN_ROW:
            payload = pack_encoded(_read_cases(work, job))
        row = {
            "work": pa.array([data], pa.binary()),
            "payload": pa.array([payload], pa.large_binary()),
            "read_s": pa.array([time.monotonic() - started], pa.float64()),
        }
        yield pa.table(row)


def _read_cases(work: Work, job: Job) -> Iterator[EncodedCase]:
    if not work.compute:
        return iter(())
    return FORMATS[work.format].read_cases(job.source, work.path, work.compute)


class PredictStage:
    """An actor: decoders in children, the network on its device, one shard a call."""

    def __init__(self, job: Job) -> None:
        from pipeline.inference import Predictor, keep_freed_memory, predict_cases

        job.begin()
        keep_freed_memory()
        bundle = load_bundle(job.bundle_uri)
        if bundle.digest != job.bundle_digest:
            raise ConfigError(
                f"the bundle {job.bundle_uri} is no longer the one that the run was planned with"
            )
        self._job = job
        self._predict_cases = predict_cases
        self._num_labels = len(bundle.labels)
        self._predictor = Predictor(bundle, job.config.inference, job.config.resources.device)
        self._decoders = ThreadPoolExecutor(job.config.resources.decoders)
        self._thread = local()
        self._decode_s: list[float] = []
        self._free_since = time.monotonic()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for index in range(batch.num_rows):
            work = work_from_json(batch.column("work")[index].as_py())
            payload = batch.column("payload")[index]
            encoded = (
                unpack_encoded(memoryview(payload.as_buffer()))
                if payload.is_valid
                else _read_cases(work, self._job)
            )
            started = time.monotonic()
            idle_s = started - self._free_since
            self._decode_s.clear()
            self._predictor.preprocess_s = 0.0
            decoded = Timed(self._decoded(encoded))
            predicted = self._predict_cases(decoded, self._predictor)
            packed = pack_predicted(predicted)
            self._free_since = time.monotonic()
            preprocess_s = self._predictor.preprocess_s
            told = {
                "seconds": {
                    "read": batch.column("read_s")[index].as_py(),
                    "decode": sum(self._decode_s),
                    "preprocess": preprocess_s,
                    "predict": self._free_since - started - decoded.seconds - preprocess_s,
                    "wait": decoded.seconds,
                    "idle": idle_s,
                },
                "num_bytes": {
                    "encoded": len(payload.as_buffer()) if payload.is_valid else work.size_bytes,
                    "pixels": decoded.num_bytes,
                },
                "numerics": self._predictor.numerics,
                "notes": self._predictor.notes,
            }
            yield pa.table(
                {
                    "work": batch.column("work").slice(index, 1),
                    "predicted": pa.array([packed], pa.large_binary()),
                    "told": pa.array([json.dumps(told)], pa.string()),
                }
            )

    def _decoded(self, encoded: Iterable[EncodedCase]) -> Iterator[DecodedCase]:
        """Decode a few cases ahead of the network, in order."""
        ahead: deque[Future[DecodedCase]] = deque()
        depth = self._job.config.resources.decoders + _LOOKAHEAD
        for case in encoded:
            ahead.append(self._decoders.submit(self._decode, case))
            if len(ahead) >= depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _decode(self, case: EncodedCase) -> DecodedCase:
        limits = self._job.config.limits
        if not hasattr(self._thread, "sandbox"):
            self._thread.sandbox = Sandbox(
                max_pixels=limits.max_pixels,
                timeout_s=limits.decode_timeout_s,
                memory_bytes=limits.decode_memory_bytes,
            )
        started = time.monotonic()
        decoded = decode_case(
            case,
            self._thread.sandbox,
            self._job.config.source,
            self._num_labels,
            max_pixels=limits.max_case_pixels,
        )
        self._decode_s.append(time.monotonic() - started)
        return decoded


class Timed:
    """Decoded cases as they come: how long they were waited for, and how many bytes of pixels."""

    def __init__(self, cases: Iterator[DecodedCase]) -> None:
        self._cases = cases
        self.seconds = 0.0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[DecodedCase]:
        while True:
            started = time.monotonic()
            case = next(self._cases, None)
            self.seconds += time.monotonic() - started
            if case is None:
                return
            if case.volume_ZHWC is not None:
                self.num_bytes += case.volume_ZHWC.nbytes
            yield case


def finish_stage(batch: pa.Table, job: Job) -> Iterator[pa.Table]:
    """Predicted shards to parts and receipts."""
    job.begin()
    for index in range(batch.num_rows):
        work = work_from_json(batch.column("work")[index].as_py())
        told = json.loads(batch.column("told")[index].as_py())
        packed = batch.column("predicted")[index].as_buffer()
        started = time.monotonic()
        rows = [finish_case(case, job.recipe, job.labels) for case in unpack_predicted(packed)]
        finished = time.monotonic()
        receipt = write_shard(work, rows, job, told)
        seconds = told["seconds"] | {
            "finish": finished - started,
            "write": time.monotonic() - finished,
        }
        receipt = replace(
            receipt,
            seconds={name: round(value, 4) for name, value in seconds.items()},
            num_bytes={**told["num_bytes"], "written": _written_bytes(receipt)},
            notes=tuple(told["notes"]),
        )
        filed = runs.put_receipt(job.results, job.run_id, receipt)
        yield pa.table({"receipt": pa.array([filed.to_json()], pa.binary())})


def _written_bytes(receipt: Receipt) -> int:
    parts = (receipt.masks, receipt.metrics, receipt.cases)
    return sum(part.size_bytes for part in parts if part is not None)


def write_shard(
    work: Work, computed: Sequence[CaseRows], job: Job, told: Mapping[str, Any]
) -> Receipt:
    """Write a shard's three parts: computed rows, and those copied from the published night."""
    shard = {
        "shard_id": work.shard_id,
        "shard_version": work.version,
        "bundle_digest": job.bundle_digest,
        "config_digest": job.config_digest,
    }
    mine = {**shard, "run_id": job.run_id}
    versions = {case.case_id: case.version for case in work.compute} | dict(work.copy)
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for table in tables.TABLES:
        rows = [{**mine, **row} for case in computed for row in getattr(case, table)]
        rows += [{**row, **shard} for row in _copied_rows(work, table, job.results)]
        rows.sort(key=lambda row: (row["case_id"], row.get("slice_index", 0), row.get("label", 0)))
        rows_of[table] = rows
    bad_cases = sorted({r["case_id"] for r in rows_of["masks"] if r["status"] != STATUS_OK})
    case_index = {case_id: -index for index, case_id in enumerate(bad_cases, start=1)}
    case_index |= {c: i for i, c in enumerate(sorted(versions.keys() - case_index.keys()))}
    for row in rows_of["masks"]:
        row["case_index"] = case_index[row["case_id"]]
        row["case_version"] = versions[row["case_id"]]
        row.setdefault("numerics", told["numerics"])
    arrow = {
        table: pa.Table.from_pylist(rows, schema=tables.table_schema(table))
        for table, rows in rows_of.items()
    }
    parts = {
        table: tables.write_part(job.results, table, rows, work.shard_id, job.run_id)
        for table, rows in arrow.items()
    }
    masks = arrow["masks"]
    bad = [row for row in rows_of["masks"] if row["error_class"] is not None]
    return Receipt(
        shard_id=work.shard_id,
        work_key=work.key(job.bundle_digest, job.config_digest),
        num_cases=len(case_index),
        num_images=masks.num_rows,
        num_bad_cases=len(bad_cases),
        num_to_retry=sum(row["error_class"] in RETRIED_ERRORS for row in rows_of["masks"]),
        num_bad=sum(status != STATUS_OK for status in masks.column("status").to_pylist()),
        bad_by_class=dict(sorted(Counter(str(row["error_class"]) for row in bad).items())),
        bad_images=[
            (row["case_index"], row["slice_index"], str(row["error_class"]))
            for row in bad[:_MOST_BAD_IMAGES]
        ],
        num_computed=sum(len(case.masks) for case in computed),
        masks=parts["masks"],
        metrics=parts["metrics"],
        cases=parts["cases"],
    )


def _copied_rows(work: Work, table: str, results_uri: str) -> list[dict[str, Any]]:
    old: str | None = getattr(work.old, table)
    if not work.copy or old is None:
        return []
    wanted = {case_id for case_id, _ in work.copy}
    rows = tables.read_part(results_uri, table, old)
    kept = pc.is_in(rows.column("case_id"), pa.array(sorted(wanted), pa.string()))
    copied: list[dict[str, Any]] = rows.filter(kept).to_pylist()
    return copied


def compute_alone(work: Work, job: Job) -> Receipt:
    """All three stages of one shard in this process."""
    stages: list[Callable[[pa.Table], Iterator[pa.Table]]] = [
        partial(read_stage, job=job),
        PredictStage(job),
        partial(finish_stage, job=job),
    ]
    rows = pa.table({"work": pa.array([work.to_json()], pa.binary())})
    for stage in stages:
        rows = pa.concat_tables(list(stage(rows)))
    return receipt_from_json(rows.column("receipt")[0].as_py())


# Encoded cases in one buffer


def pack_encoded(cases: Iterable[EncodedCase]) -> bytes:
    """Encoded cases as one buffer: a JSON index, then all bytes; `unpack_encoded` is the inverse."""
    index, blobs = [], []
    for case in cases:
        slices = []
        for item in case.slices:
            problem = item.problem and [item.problem.error_class, item.problem.message]
            sizes = [None if data is None else len(data) for data in (item.image, item.mask)]
            digests = [item.image_sha256, item.mask_sha256]
            slices.append([item.name, item.source_uri, *sizes, *digests, problem])
            blobs += [data for data in (item.image, item.mask) if data is not None]
        index.append([case.case_id, case.spacing_mm, slices])
    header = json.dumps(index).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *blobs])


def unpack_encoded(view: memoryview) -> Iterator[EncodedCase]:
    """Cases out of `pack_encoded`'s buffer, one at a time."""
    length = int.from_bytes(view[:8], "little")
    position = 8 + length

    def take(size: int | None) -> bytes | None:
        nonlocal position
        if size is None:
            return None
        data, position = bytes(view[position : position + size]), position + size
        return data

    for case_id, spacing_mm, stored in json.loads(bytes(view[8 : 8 + length])):
        slices = []
        for name, uri, image, mask, image_sha256, mask_sha256, problem in stored:
            slices.append(
                EncodedSlice(
                    name=name,
                    source_uri=uri,
                    image=take(image),
                    mask=take(mask),
                    image_sha256=image_sha256,
                    mask_sha256=mask_sha256,
                    problem=problem
                    and Problem(error_class=ErrorClass(problem[0]), message=problem[1]),
                )
            )
        yield EncodedCase(
            case_id=case_id, slices=slices, spacing_mm=tuple(spacing_mm) if spacing_mm else None
        )
