"""Segment: plan -> read -> decode and predict -> finish and write -> verify -> publish.

Three Ray Data operators over rows that are whole shards. The readers (CPU tasks) hand over
encoded bytes; a fixed pool of actors decodes them in sandboxed children beside the device, so
pixels never travel between Ray's processes, and predicts; finishers (CPU tasks) write one part a
shard and return a receipt. Only receipts reach the driver, which alone commits.
"""

import json
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from threading import local
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import results, runs, storage, tables, upkeep
from pipeline.bundle import Bundle, build_model, load_bundle
from pipeline.cases import (
    CaseRows,
    DecodedCase,
    decode_case,
    finish_case,
    pack_predicted,
    unpack_predicted,
)
from pipeline.config import SegmentConfig, output_digest
from pipeline.errors import (
    RETRIED_ERRORS,
    ConfigError,
    ErrorClass,
    ResegError,
    ResultsError,
    RunStalled,
    StageFailed,
    TooManyBadImages,
)
from pipeline.flows.cluster import Pool, connect, num_cores, plan_pool, quiet_deprecations
from pipeline.formats import FORMATS, Source
from pipeline.planning import Selection, check_run_id, make_plan, operator
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
from pipeline.runs import RunPlan
from pipeline.sandbox import Sandbox
from pipeline.telemetry import Report, RunLog, silent

_STAGE_NAMES = {"_read_stage": "read", "_PredictStage": "predict", "_finish_stage": "finish"}
_ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Died\w*): .+)$", re.MULTILINE)
_MAX_BYTES_IN_ROW = 512 << 20
_LOOKAHEAD = 2


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run did, for people and for `--json`."""

    run_id: str
    night: int | None
    published: bool
    resumed: bool
    counts: Mapping[str, Any]
    computed_images: int
    bad_by_class: Mapping[str, int]
    seconds: float
    stage_seconds: Mapping[str, float]
    notes: Sequence[str] = ()

    def to_plain(self) -> dict[str, Any]:
        """The object that `reseg segment --json` prints."""
        values = asdict(self)
        counts = values.pop("counts")
        return {**values, "cases": counts["cases"], "images": counts["images"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A run that is computed, and of which nothing is visible yet; or what was found done already.

    published_as: the night of a run that was published before. With nothing to do, `is_idle`.
    """

    plan: RunPlan
    results: str
    receipts: dict[str, Receipt]
    resumed: bool
    published_as: int | None
    started: float
    log: RunLog

    @property
    def is_idle(self) -> bool:
        """Whether the source, the bundle and the settings are those of the published night."""
        return not self.plan.works and not self.plan.removed

    @property
    def ordered(self) -> list[Receipt]:
        """Receipts in the order of the plan."""
        return [self.receipts[work.shard_id] for work in self.plan.works]


def run_segment(
    location: str,
    results_location: str,
    bundle_location: str,
    config: SegmentConfig,
    *,
    run_id: str | None = None,
    limit: int | None = None,
    address: str | None = None,
    report: Report | None = None,
    only: Selection | None = None,
) -> Summary:
    """Bring the results up to date with source, bundle and configuration; publish one night.

    Does nothing if nothing changed. Finishes an unfinished run whose plan still holds, and takes
    over from one that no longer holds the shards that are still the same. only: the part of
    the source to look at. Raises ResegError.
    """
    staged = stage_run(
        location,
        results_location,
        bundle_location,
        config,
        run_id=run_id,
        limit=limit,
        address=address,
        report=report,
        only=only,
    )
    if staged.published_as is not None or staged.is_idle:
        return summarize(staged, staged.published_as)
    record = make_record(staged)
    total, bad = record["totals"]["images"], record["counts"]["images"]["bad"]
    if total and bad / total > config.max_bad_share:
        raise TooManyBadImages(
            f"{bad} of {total} images are bad ({bad / total:.1%}, allowed are "
            f"{config.max_bad_share:.1%}): {_classes_in_words(record['bad_by_class'])}; run "
            f"{staged.plan.run_id} is complete but not published; the same command with a higher "
            "--max-bad-share publishes it at once"
        )
    night = publish_staged(staged, record)
    return summarize(staged, night, record)


def stage_run(
    location: str,
    results_location: str,
    bundle_location: str,
    config: SegmentConfig,
    *,
    run_id: str | None = None,
    limit: int | None = None,
    address: str | None = None,
    report: Report | None = None,
    only: Selection | None = None,
) -> Staged:
    """Plan, compute and verify, up to but without the commit. Raises ResegError."""
    started = time.monotonic()
    report = report or silent
    bundle = load_bundle(bundle_location)
    results_uri = storage.resolve(results_location)
    storage.check_writable(results_uri)
    plan, resumed = _find_or_make_plan(
        location, results_uri, bundle, config, run_id, limit, only, report
    )
    log = RunLog(runs.run_uri(results_uri, plan.run_id, "log.jsonl"))
    done = None
    if plan.base_night is not None or resumed:
        done = results.night_of_run(results_uri, plan.run_id, since=plan.base_night)
    staged = Staged(
        plan=plan,
        results=results_uri,
        receipts={},
        resumed=resumed,
        published_as=done,
        started=started,
        log=log,
    )
    if done is not None or staged.is_idle:
        _close_published(results_uri)
        if plan.base_night is not None:
            results.settle(results_uri)
        return staged
    build_model(bundle)
    log("start", run=plan.run_id, resumed=resumed, shards=len(plan.works), counts=plan.counts)
    receipts = runs.load_receipts(results_uri, plan) if resumed else {}
    try:
        if len(receipts) < len(plan.works):
            threads = max(1, config.inference.threads)
            wanted_cpus = (config.resources.actors or num_cores()) * threads
            with connect(address, wanted_cpus, config.resources.object_store_bytes):
                pool = plan_pool(config.resources, config.inference.threads, len(plan.works))
                receipts = _start_run(plan, results_uri, resumed=resumed)
                _compute(plan, receipts, results_uri, bundle, config, pool, report, log)
        elif not resumed:
            _start_run(plan, results_uri, resumed=resumed)
        runs.verify_receipts(results_uri, plan, receipts)
    except BaseException as error:
        log("stopped", run=plan.run_id, reason=type(error).__name__)
        raise
    finally:
        if runs.has_plan(results_uri, plan.run_id):
            log.save()
    return replace(staged, receipts=receipts)


def make_record(staged: Staged) -> dict[str, Any]:
    """What the commit of a staged run will say about it."""
    plan = staged.plan
    totals = night_totals(staged.results, plan, staged.ordered)
    counts = {key: dict(value) for key, value in plan.counts.items()}
    counts["images"]["bad"], counts["cases"]["bad"] = totals.num_bad, totals.num_bad_cases
    return {
        "bundle": dict(plan.bundle),
        "config": dict(plan.config),
        "config_digest": plan.config_digest,
        "source": dict(plan.source),
        "counts": counts,
        "totals": {"cases": totals.num_cases, "images": totals.num_images},
        "code": dict(plan.code),
        "operator": operator(),
        "bad_by_class": bad_by_class(staged.results, staged.ordered),
        "computed_images": sum(receipt.num_computed for receipt in staged.ordered),
    }


def publish_staged(staged: Staged, record: Mapping[str, Any]) -> int:
    """Commit a staged run; the number of its night. Raises CommitConflict."""
    plan = staged.plan
    night = results.publish(staged.results, plan, staged.receipts, record)
    upkeep.seal_all(staged.results)
    for finished in runs.open_runs(staged.results):  # others were planned on an older night
        runs.close_run(staged.results, finished)
    total, bad = record["totals"]["images"], record["counts"]["images"]["bad"]
    staged.log("published", run=plan.run_id, night=night, images=total, bad=bad)
    staged.log.save()
    return night


def _close_published(results_uri: str) -> None:
    """Take runs off the list that were killed between their commit and their last word."""
    for run_id in runs.open_runs(results_uri):
        if results.night_of_run(results_uri, run_id) is not None:
            runs.close_run(results_uri, run_id)


def _start_run(plan: RunPlan, results_uri: str, *, resumed: bool) -> dict[str, Receipt]:
    """Freeze a new plan and take over what open runs have done of it; the receipts there are."""
    if not resumed:
        runs.save_plan(results_uri, plan)
        for abandoned in runs.open_runs(results_uri):
            if abandoned != plan.run_id:
                runs.adopt_receipts(results_uri, plan, abandoned)
    return runs.load_receipts(results_uri, plan)


def _find_or_make_plan(
    location: str,
    results_uri: str,
    bundle: Bundle,
    config: SegmentConfig,
    run_id: str | None,
    limit: int | None,
    only: Selection | None,
    report: Report,
) -> tuple[RunPlan, bool]:
    """The plan to carry out, and whether it is that of a run that was started before."""
    if run_id is not None:
        frozen = runs.load_plan(results_uri, check_run_id(run_id))
        if frozen is not None:
            _check_frozen(frozen, location, bundle, config)
            return frozen, True
    plan = make_plan(
        location,
        results_uri,
        bundle,
        config,
        run_id=run_id,
        limit=limit,
        only=only,
        progress=report,
    )
    if run_id is None:
        for candidate in runs.open_runs(results_uri):
            with suppress(ResultsError):  # a damaged plan is set aside with its run
                frozen = runs.load_plan(results_uri, candidate)
                if frozen is not None and _is_same_plan(frozen, plan):
                    return frozen, True
    return plan, False


def _is_same_plan(frozen: RunPlan, plan: RunPlan) -> bool:
    return (
        frozen.base_night == plan.base_night
        and frozen.work_keys() == plan.work_keys()
        and frozen.removed == plan.removed
    )


def _check_frozen(frozen: RunPlan, location: str, bundle: Bundle, config: SegmentConfig) -> None:
    """Refuse to finish a run with another source, bundle or configuration."""
    if frozen.source["uri"] != storage.resolve(location):
        raise ConfigError(
            f"run {frozen.run_id} is of the source {frozen.source['uri']}, not {location}; "
            "start another run"
        )
    if frozen.bundle["digest"] != bundle.digest:
        raise ConfigError(
            f"run {frozen.run_id} was planned with the bundle {frozen.bundle['digest'][:12]} "
            f"({frozen.bundle['uri']}), not {bundle.digest[:12]}; finish it with that one, or "
            "start another run"
        )
    if frozen.config_digest != output_digest(config):
        raise ConfigError(
            f"run {frozen.run_id} was planned with another configuration; it is in its config.json; "
            "finish it with that one, or start another run"
        )


# The driver


def _compute(
    plan: RunPlan,
    receipts: dict[str, Receipt],
    results_uri: str,
    bundle: Bundle,
    config: SegmentConfig,
    pool: Pool,
    report: Report,
    log: RunLog,
) -> None:
    """Add to `receipts` those of the planned shards that have none yet, by computing them."""
    todo = [work for work in plan.works if work.shard_id not in receipts]
    source = Source(
        uri=plan.source["uri"],
        format=plan.source["format"],
        config=config.source,
        limits=config.limits,
        num_buckets=plan.source["num_buckets"],
    )
    job = Job(
        run_id=plan.run_id,
        results=results_uri,
        source=source,
        bundle_uri=bundle.uri,
        bundle_digest=bundle.digest,
        config=config,
        config_digest=plan.config_digest,
    )
    log("compute", run=plan.run_id, shards=len(todo), **asdict(pool))
    started, images = time.monotonic(), 0
    for receipt in _stream_receipts(todo, job, pool) if todo else ():
        receipts[receipt.shard_id] = receipt
        images += receipt.num_computed
        rate = images / max(time.monotonic() - started, 1e-9)
        report(len(receipts), len(plan.works), "shards", f"{rate:,.1f} images/s")
        log(
            "shard",
            run=plan.run_id,
            shard=receipt.shard_id,
            images=receipt.num_images,
            bad=receipt.num_bad,
            **receipt.seconds,
        )


def _stream_receipts(todo: Sequence[Work], job: Job, pool: Pool) -> Iterator[Receipt]:
    """Run the three operators; yield each shard's receipt as it comes."""
    import ray.data
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = job.config.resources.stall_timeout_s
    resources = job.config.resources
    largest_first = sorted(todo, key=lambda work: (-work.size_bytes, work.shard_id))
    works = [{"work": work.to_json()} for work in largest_first]
    retries = resources.max_retries
    with quiet_deprecations():
        dataset = (
            ray.data.from_items(works, override_num_blocks=len(works))
            .map_batches(
                cast(Any, _read_stage),
                batch_size=None,
                batch_format="pyarrow",
                fn_kwargs={"job": job},
                num_cpus=resources.read_tasks_cpus,
                max_retries=retries,
            )
            .map_batches(
                _PredictStage,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_kwargs={"job": job},
                compute=ray.data.ActorPoolStrategy(
                    size=pool.num_actors, max_tasks_in_flight_per_actor=2
                ),
                num_cpus=pool.cpus_per_actor,
                num_gpus=pool.gpus_per_actor or None,
                max_restarts=-1,
                max_task_retries=retries,
            )
            .map_batches(
                cast(Any, _finish_stage),
                batch_size=1,
                batch_format="pyarrow",
                fn_kwargs={"job": job},
                num_cpus=resources.finish_tasks_cpus,
                max_retries=retries,
            )
        )
    try:
        for row in dataset.iter_rows():
            yield receipt_from_json(row["receipt"])
    except ExecutionTimeoutError as error:
        raise RunStalled(_stalled(str(error), resources.stall_timeout_s)) from None
    except RayError as error:
        raise _cause(error, job.run_id) from None


def _stalled(message: str, timeout_s: float) -> str:
    """The stages that still had work, from Ray's own account."""
    running = [line.strip("- ") for line in message.splitlines() if line.startswith("  - ")]
    stages = [
        f"{stage} ({line.partition(':')[2].strip()})"
        for line in running
        for key, stage in _STAGE_NAMES.items()
        if key in line
    ]
    return (
        f"no stage moved for {timeout_s:g} s; still running: {'; '.join(stages) or 'unknown'}; "
        "the same command resumes the run"
    )


def _cause(error: BaseException, run_id: str) -> ResegError:
    """The error of a worker as one sentence; ours pass through."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ResegError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    text = str(error)
    stage = next((name for key, name in _STAGE_NAMES.items() if key in text), "unknown")
    reasons = _ERROR_LINE.findall(text)
    reason = reasons[-1] if reasons else type(error).__name__
    return StageFailed(
        f"the {stage} stage failed: {reason[:300]}; what is done is kept, and the same command "
        f"resumes run {run_id}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What a night holds in all, the shards that the run does not touch included."""

    num_cases: int
    num_images: int
    num_bad_cases: int
    num_bad: int


def night_totals(results_uri: str, plan: RunPlan, receipts: Sequence[Receipt]) -> Totals:
    """The night that publishing a run would make."""
    touched = {work.shard_id for work in plan.works}
    removed = {parts.masks for parts in plan.removed}
    base = None if plan.base_night is None else results.open_night(results_uri, plan.base_night)
    counted: list[Receipt | results.PublishedShard] = list(receipts)
    if base is not None:
        counted += [
            shard
            for shard in base.shards.values()
            if shard.shard_id not in touched and shard.parts.masks not in removed
        ]
    return Totals(
        num_cases=sum(item.num_cases for item in counted),
        num_images=sum(item.num_images for item in counted),
        num_bad_cases=sum(item.num_bad_cases for item in counted),
        num_bad=sum(item.num_bad for item in counted),
    )


def bad_by_class(results_uri: str, receipts: Sequence[Receipt]) -> dict[str, int]:
    """How many images of the written parts have each error class."""
    found: dict[str, int] = {}
    for receipt in receipts:
        if receipt.num_bad and receipt.masks is not None:
            rows = tables.read_part(results_uri, "masks", receipt.masks.path, ["error_class"])
            for name in rows.column("error_class").to_pylist():
                if name is not None:
                    found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


def _classes_in_words(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "from earlier nights"


def summarize(
    staged: Staged, night: int | None, record: Mapping[str, Any] | None = None
) -> Summary:
    """What a run did. record: what the commit recorded or would record, where the run has one."""
    plan = staged.plan
    receipts = staged.ordered if record else []
    stages: dict[str, float] = {}
    for receipt in receipts:
        for name, value in receipt.seconds.items():
            stages[name] = round(stages.get(name, 0.0) + value, 3)
    idle = staged.is_idle and staged.published_as is None
    return Summary(
        run_id=plan.run_id,
        night=plan.base_night if idle else night,
        published=night is not None,
        resumed=staged.resumed,
        counts=record["counts"] if record else plan.counts,
        computed_images=sum(receipt.num_computed for receipt in receipts),
        bad_by_class=record["bad_by_class"] if record else {},
        seconds=round(time.monotonic() - staged.started, 3),
        stage_seconds=stages,
        notes=tuple(dict.fromkeys(note for receipt in receipts for note in receipt.notes)),
    )


# The workers


def _read_stage(batch: pa.Table, job: Job) -> Iterator[pa.Table]:
    """Shards to their encoded bytes; a shard too large for a row stays a reference."""
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


class _PredictStage:
    """An actor: decoders in children, the network on its device, one shard a call."""

    def __init__(self, job: Job) -> None:
        from pipeline.inference import Predictor, keep_freed_memory, predict_cases

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
            self._decode_s = 0.0
            predicted = self._predict_cases(self._decoded(encoded), self._predictor)
            packed = pack_predicted(predicted)
            told = {
                "read": batch.column("read_s")[index].as_py(),
                "decode": self._decode_s,
                "predict": time.monotonic() - started,
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
        decoded = decode_case(case, self._thread.sandbox, self._job.config.source, self._num_labels)
        self._decode_s += time.monotonic() - started
        return decoded


def _finish_stage(batch: pa.Table, job: Job) -> Iterator[pa.Table]:
    """Predicted shards to parts and receipts."""
    bundle = load_bundle(job.bundle_uri)
    for index in range(batch.num_rows):
        work = work_from_json(batch.column("work")[index].as_py())
        told = json.loads(batch.column("told")[index].as_py())
        packed = batch.column("predicted")[index].as_buffer()
        started = time.monotonic()
        rows = [
            finish_case(case, bundle.recipe, bundle.labels) for case in unpack_predicted(packed)
        ]
        finished = time.monotonic()
        receipt = write_shard(work, rows, job, told)
        seconds = {
            **{name: round(told[name], 4) for name in ("read", "decode", "predict")},
            "finish": round(finished - started, 4),
            "write": round(time.monotonic() - finished, 4),
        }
        filed = runs.put_receipt(
            job.results, job.run_id, _with_seconds(receipt, seconds, told["notes"])
        )
        yield pa.table({"receipt": pa.array([filed.to_json()], pa.binary())})


def _with_seconds(receipt: Receipt, seconds: dict[str, float], notes: list[str]) -> Receipt:
    return replace(receipt, seconds=seconds, notes=tuple(notes))


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
    return Receipt(
        shard_id=work.shard_id,
        work_key=work.key(job.bundle_digest, job.config_digest),
        num_cases=len(case_index),
        num_images=masks.num_rows,
        num_bad_cases=len(bad_cases),
        num_to_retry=sum(row["error_class"] in RETRIED_ERRORS for row in rows_of["masks"]),
        num_bad=sum(status != STATUS_OK for status in masks.column("status").to_pylist()),
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
