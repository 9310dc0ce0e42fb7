"""Train: check -> index -> workers of Ray Train -> bundle.

Ray Train starts the workers, joins them to one process group and starts them again when one
dies; what each of them does is `pipeline.training`. Checkpoints are ours: Ray's are copied straight to
their final name, and a reused run name would silently go on with another configuration.
"""

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa

from pipeline import storage
from pipeline.config import ResourceConfig, TrainConfig, TrainResourceConfig
from pipeline.dataset import IndexJob
from pipeline.errors import ConfigError, ResegError, StageFailed
from pipeline.flows.cluster import (
    check_cpu_is_meant,
    connect,
    live_nodes,
    may_grow,
    wait_for_places,
)
from pipeline.flows.placement import Node, seats
from pipeline.lock import release_lock, show_life, take_lock
from pipeline.preparation import (
    CONFIG_FILE,
    Groups,
    TrainJob,
    check_index,
    check_request,
    finished_result,
    freeze,
    make_job,
    read_index,
    shard_groups,
    with_index,
    write_index,
)
from pipeline.telemetry import RunLog

_RAY_FOLDER = "_ray"
_STOP_TIMEOUT_S = 120.0
_POLL_S = 0.5
_SIGN_OF_LIFE_S = 30.0
_MOST_THREADS = 16
"""More threads than this do not make a U-Net faster."""

Report = Callable[[int, int, str, str], None]


class Stopped(KeyboardInterrupt):
    """The user stopped the training; a checkpoint was written first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The workers of a training, with the CPU threads of each."""

    num_workers: int
    min_workers: int
    threads: int
    use_gpu: bool


def run_train(
    location: str,
    out_location: str,
    config: TrainConfig,
    *,
    address: str | None = None,
    report: Report = lambda *_: None,
) -> dict[str, Any]:
    """Train on a source and export a bundle to `OUT/bundle`; the result, as in `OUT/result.json`.

    Goes on with an unfinished training in OUT, and does nothing for a finished one. Raises
    ResegError; KeyboardInterrupt once a checkpoint is written.
    """
    started = time.monotonic()
    request = check_request(location, out_location, config)
    done = finished_result(request.out)
    if done is not None:
        return {**done, "seconds": round(time.monotonic() - started, 3), "trained": False}
    job = make_job(request)
    index = read_index(request.out)
    groups = [] if index is not None else shard_groups(request)
    log = RunLog(storage.join(request.out, "log.jsonl"))
    wanted = max(1, config.resources.workers) * (config.resources.threads or 1)
    try:
        with connect(address, wanted), _Locked(request.out) as lock:
            crew = plan_crew(config.resources, config.batch_size, report)
            if index is None:
                index = _index_on_ray(job.index_job, groups, report)
            counts = check_index(job, index)
            lock.take()
            freeze(request)
            job = with_index(job, index)
            write_index(request.out, index)
            log("start", index=job.index_digest, images=counts.num_images, bad=counts.bad_by_class)
            _train(job, crew, report, lock)
    except BaseException as error:
        log("stopped", reason=type(error).__name__)
        raise
    finally:
        if storage.file_info(storage.join(request.out, CONFIG_FILE)) is not None:
            log.save()
    result = finished_result(request.out)
    if result is None:
        raise StageFailed(f"the workers ended without a result in {request.out}; start it again")
    return {**result, "seconds": round(time.monotonic() - started, 3), "trained": True}


def plan_crew(
    resources: TrainResourceConfig, batch_size: int, report: Report = lambda *_: None
) -> Crew:
    """How many workers, with what. Raises ConfigError where they would leave no CPU for reading.

    One worker a GPU where there are GPUs; else one, with the CPUs of its machine but one. A cluster
    that may grow is asked for the GPUs that are not there yet; raises StageFailed if they do not come.
    """
    nodes = live_nodes()
    gpus = int(sum(node.gpus for node in nodes))
    use_gpu = resources.device != "cpu" and (gpus >= 1 or resources.device == "cuda")
    if not use_gpu:
        check_cpu_is_meant(resources.device)
    wanted = (resources.min_workers or resources.workers or 1) if use_gpu else 0
    if wanted > gpus and may_grow():
        places = [{"CPU": float(resources.threads or 1), "GPU": 1.0}] * wanted + [{"CPU": 1.0}]
        limit_s = ResourceConfig().wait_for_nodes_s
        wait_for_places(
            places,
            f"{wanted} workers with a GPU each",
            limit_s,
            lambda done, total, what, note="": report(done, total, what, note),
        )
        nodes = live_nodes()
        gpus = int(sum(node.gpus for node in nodes))
    if use_gpu and not gpus:
        raise ConfigError("resources.device is cuda, but the cluster has no GPU")
    workers = resources.workers or (gpus if use_gpu else 1)
    least = min(resources.min_workers or workers, workers)
    if use_gpu and least > gpus:
        raise ConfigError(f"{least} workers need {least} GPUs, the cluster has {gpus}")
    if workers > batch_size:  # as many as there are GPUs, where nothing was said
        raise ConfigError(f"{workers} workers cannot share a batch of {batch_size} slices")
    threads = resources.threads or _most_threads(nodes, min(workers, gpus or workers), use_gpu)
    if not _fit(nodes, least, threads, use_gpu):
        raise ConfigError(
            f"{least} workers of {threads} threads leave none of the cluster's "
            f"{sum(node.cpus for node in nodes):g} CPUs for reading: set resources.workers or "
            "resources.threads lower"
        )
    return Crew(num_workers=workers, min_workers=least, threads=threads, use_gpu=use_gpu)


def _most_threads(nodes: Sequence[Node], workers: int, use_gpu: bool) -> int:
    """As many as every worker can have on its node, so that none waits for a place for good."""
    largest = max((int(node.cpus) for node in nodes), default=1)
    for threads in range(min(largest, _MOST_THREADS), 1, -1):
        if _fit(nodes, workers, threads, use_gpu):
            return threads
    return 1


def _fit(nodes: Sequence[Node], workers: int, threads: int, use_gpu: bool) -> bool:
    """Whether the nodes hold so many workers, and a CPU is left for reading."""
    places = seats(nodes, threads, 1.0 if use_gpu else 0.0)
    return places >= workers and workers * threads + 1 <= sum(node.cpus for node in nodes)


def _index_on_ray(job: IndexJob, groups: Groups, report: Report) -> pa.Table:
    """Index all shards in CPU tasks, a bounded number at a time; order does not matter."""
    import ray

    from pipeline.dataset import index_cases

    remote = ray.remote(num_cpus=1, max_retries=2)(index_cases)
    known = ray.put(job)
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    limit = 2 * int(have.get("CPU", 1))
    todo, running = list(reversed(groups)), list[Any]()
    tables: list[pa.Table] = []
    while todo or running:
        while todo and len(running) < limit:
            running.append(remote.remote(known, *todo.pop()))
        done, running = ray.wait(running)
        try:
            tables += ray.get(done)
        except ray.exceptions.RayError as error:
            brief = str(error).strip().splitlines()[-1][:200]
            raise StageFailed(f"indexing the source failed: {brief}; start again") from None
        report(len(tables), len(groups), "indexing", "")
    return pa.concat_tables(tables)


class _Locked:
    """The lock of a training's folder, from `take` to the end of the block, and signs of life."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._seen: float | None = None

    def __enter__(self) -> "_Locked":
        return self

    def take(self) -> None:
        """Raises ConfigError if another process trains there."""
        take_lock(self._out)
        self._seen = time.monotonic()

    def renew(self) -> None:
        """To be called every now and then."""
        if self._seen is not None and time.monotonic() - self._seen > _SIGN_OF_LIFE_S:
            show_life(self._out)
            self._seen = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self._seen is not None:
            release_lock(self._out)


class _Board:
    """Where worker 0 says how far it is, and reads whether to stop; an actor beside the driver.

    It is on the driver's node, so that a training outlives every other one.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._stop = False

    def tell(self, state: Mapping[str, Any]) -> bool:
        self._state = {**self._state, **state}
        return self._stop

    def read(self) -> dict[str, Any]:
        return self._state

    def stop(self) -> None:
        self._stop = True


def _train(job: TrainJob, crew: Crew, report: Report, lock: _Locked) -> None:
    """Run the workers to their end, showing how far they are. Raises what they raised."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind: Any = ray.remote(_Board)
    board = kind.options(num_cpus=0, scheduling_strategy=here).remote()
    trainer = _make_trainer(job, crew, board)
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  (Ray wraps whatever a worker raised)
            failure.append(error)

    thread = threading.Thread(target=fit, name="reseg-train", daemon=True)
    report(0, 1, f"starting {crew.num_workers} worker(s)", "")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_S)
            _show(ray.get(board.read.remote()), report)
            lock.renew()
    except KeyboardInterrupt:
        with suppress(Exception):
            ray.get(board.stop.remote())
            thread.join(_STOP_TIMEOUT_S)
        raise
    finally:
        if not storage.is_remote(job.out):
            shutil.rmtree(storage.join(job.out, _RAY_FOLDER), ignore_errors=True)
    state = ray.get(board.read.remote())
    if "error" in state:
        raise state["error"]
    if failure:
        raise _as_sentence(failure[0])


def _show(state: Mapping[str, Any], report: Report) -> None:
    if "step" not in state:
        return
    loss = "" if state["loss"] is None else f", loss {state['loss']:.4f}"
    score = "" if state["score"] is None else f", Dice {state['score']:.3f}"
    note = f"epoch {state['epoch']}/{state['epochs']}{loss}{score}, {state['images_per_s']:,.0f} images/s"
    report(state["step"], state["steps"], state["phase"], note)


def _as_sentence(error: BaseException) -> ResegError:
    """Ray's account of failed workers, as one sentence."""
    from ray.exceptions import RayTaskError

    failures = getattr(error, "worker_failures", None) or {}
    cause: BaseException = next(iter(failures.values()), error)
    inner = getattr(cause, "cause", None) or cause.__cause__ or cause
    while isinstance(inner, RayTaskError) and isinstance(inner.cause, Exception):
        inner = inner.cause
    if isinstance(inner, ResegError):
        return inner
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    brief = (lines or [type(inner).__name__])[-1][:300]
    return StageFailed(
        f"training workers failed too often, at last with: {type(inner).__name__}: {brief}; the same "
        "command goes on from the last checkpoint"
    )


def _make_trainer(job: TrainJob, crew: Crew, board: Any) -> Any:
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    elastic = crew.min_workers < crew.num_workers
    return TorchTrainer(
        _work,
        train_loop_config={"job": job, "board": board, "threads": crew.threads},
        torch_config=TorchConfig(
            backend="nccl" if crew.use_gpu else "gloo",
            timeout_s=math.ceil(job.config.resources.stall_timeout_s),
        ),
        scaling_config=ScalingConfig(
            num_workers=cast(
                Any, (crew.min_workers, crew.num_workers) if elastic else crew.num_workers
            ),
            use_gpu=crew.use_gpu,
            resources_per_worker={"CPU": crew.threads} | ({"GPU": 1} if crew.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=f"train-{os.getpid()}-{time.time_ns()}",  # never reused: it would resume by itself
            storage_path=storage.join(job.out, _RAY_FOLDER),
            failure_config=FailureConfig(max_failures=job.config.resources.max_failures),
        ),
    )


def _work(values: dict[str, Any]) -> None:
    """What a worker process runs."""
    import ray
    import ray.train
    import torch

    from pipeline.learning import Ranks
    from pipeline.training import run_worker

    board = values["board"]
    if "error" in ray.get(board.read.remote()):
        return  # started again by Ray after an error that would only come back
    torch.set_num_threads(values["threads"])
    context = ray.train.get_context()
    ranks = Ranks(rank=context.get_world_rank(), world=context.get_world_size())
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL exchanges what is no tensor

    def tell(state: Mapping[str, Any]) -> bool:
        return bool(ray.get(board.tell.remote(dict(state))))

    try:
        run_worker(values["job"], ranks, device.type, tell)
    except ResegError as error:
        ray.get(board.tell.remote({"error": error}))
        raise
