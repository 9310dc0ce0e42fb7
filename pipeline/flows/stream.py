"""The stages as a Ray Data pipeline: shards go in, receipts come out as they are made.

Three operators over rows that are whole shards. The readers (CPU tasks) hand over encoded bytes; a
pool of actors decodes them in sandboxed children beside the device, so pixels never travel between
Ray's processes, and predicts; finishers (CPU tasks) write one part a shard and return a receipt.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from pipeline.errors import ResegError, RunStalled, StageFailed
from pipeline.flows.cluster import quiet_deprecations
from pipeline.flows.placement import Pool
from pipeline.flows.stages import Job, PredictStage, compute_alone, finish_stage, read_stage
from pipeline.flows.stragglers import Stragglers
from pipeline.records import Receipt, Work, receipt_from_json

_STAGE_NAMES = {"read_stage": "read", "PredictStage": "predict", "finish_stage": "finish"}
_RAYS_ADVICE = "\nFailed to apply UDF transform"
_ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Died\w*): .+)$", re.MULTILINE)
_LEAST_IN_FLIGHT = 16
_CALLS_PER_RETRY = 10
"""Calls that an actor may lose: some two seconds each until Ray knows that its node is dead."""


def stream_receipts(todo: Sequence[Work], job: Job, pool: Pool) -> Iterator[Receipt]:
    """Run the three operators; yield each shard's receipt as it comes. Raises ResegError.

    The last shards, if they hang, are computed a second time beside the stream.
    """
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    stream = _make_stream(todo, job, pool)
    watch = Stragglers(
        todo,
        job.config.resources,
        in_flight=max(_LEAST_IN_FLIGHT, 4 * pool.num_actors),
        start=lambda work: _start_alone(work, job, pool),
        close=lambda: _close_stream(stream),
    )
    try:
        with watch:
            try:
                for row in stream.iter_rows():
                    receipt = receipt_from_json(row["receipt"])
                    watch.delivered(receipt)
                    yield receipt
            except (RayError, ExecutionTimeoutError):
                if not watch.have_begun:
                    raise
            yield from watch.rest()
    except ExecutionTimeoutError as error:
        raise RunStalled(_stalled(str(error), job.config.resources.stall_timeout_s)) from None
    except RayError as error:
        raise _cause(error, job.run_id) from None


def _make_stream(todo: Sequence[Work], job: Job, pool: Pool) -> Any:
    """The three operators over the shards, largest first, as a dataset of receipts.

    Readers and finishers are scheduled by Ray's default strategy, not by Ray Data's, which spreads
    them: the default one leaves nodes with GPUs alone as long as others have room.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = job.config.resources.stall_timeout_s
    resources = job.config.resources
    largest_first = sorted(todo, key=lambda work: (-work.size_bytes, work.shard_id))
    works = [{"work": work.to_json()} for work in largest_first]
    retries = resources.max_retries
    with quiet_deprecations():
        return (
            ray.data.from_items(works, override_num_blocks=len(works))
            .map_batches(
                cast(Any, read_stage),
                batch_size=None,
                batch_format="pyarrow",
                fn_kwargs={"job": job},
                num_cpus=resources.read_tasks_cpus,
                max_retries=retries,
                scheduling_strategy="DEFAULT",
            )
            .map_batches(
                PredictStage,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_kwargs={"job": job},
                compute=ray.data.ActorPoolStrategy(
                    size=pool.num_actors, max_tasks_in_flight_per_actor=2
                ),
                num_cpus=pool.cpus_per_actor,
                num_gpus=pool.gpus_per_actor or None,
                label_selector=dict(pool.labels) or None,
                max_restarts=-1,
                max_task_retries=retries * _CALLS_PER_RETRY,
            )
            .map_batches(
                cast(Any, finish_stage),
                batch_size=1,
                batch_format="pyarrow",
                fn_kwargs={"job": job},
                num_cpus=resources.finish_tasks_cpus,
                max_retries=retries,
                scheduling_strategy="DEFAULT",
            )
        )


def _close_stream(stream: Any) -> None:
    """End a dataset that another thread iterates over; its iteration then ends as if it were done."""
    executor = stream._current_executor
    if executor is not None:
        executor.shutdown(force=True)


def _start_alone(work: Work, job: Job, pool: Pool) -> Any:
    """Begin all three stages of one shard in a process of its own; a future for the receipt."""
    import ray

    task: Any = ray.remote(compute_alone)
    return task.options(
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor,
        max_retries=job.config.resources.max_retries,
        scheduling_strategy="SPREAD",
        label_selector=dict(pool.labels) or None,
    ).remote(work, job)


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
    """The error of a worker as one sentence; ours pass through.

    Ray wraps an error of ours in one of its own that is also of our class, and holds the traceback;
    and Ray Data writes into ours how its retries could be configured.
    """
    from ray.exceptions import RayError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ResegError) and not isinstance(cause, RayError):
            if cause.args and isinstance(cause.args[0], str):
                cause.args = (cause.args[0].partition(_RAYS_ADVICE)[0], *cause.args[1:])
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
