"""Ray: connect or start, ask what there is, and refuse a pool that would starve its readers."""

import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ResourceConfig
from pipeline.errors import ConfigError, StageFailed

_CONNECT_HINT = "is a Ray cluster running there, and is its token in RAY_AUTH_TOKEN_PATH?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The actors of a run, with the CPUs and GPUs of each."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float


@contextmanager
def connect(address: str | None, wanted_cpus: int, object_store_bytes: int = 0) -> Iterator[None]:
    """A Ray session for the duration of a run: the caller's, a cluster's, or one of our own.

    A session that exists already is used and left as it is. Without an address a local one is
    started, with a CPU more than the machine has or than are wanted, because reading and writing
    wait more than they compute. Raises ConfigError if the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    if ray.is_initialized():
        _be_quiet()
        yield
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _silent_stderr():
            if address is None:
                _start_local(wanted_cpus, object_store_bytes)
            else:
                _check_reachable(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # noqa: BLE001  (a slow start is a bare Exception of Ray's)
        brief = (str(error).splitlines() or [""])[0]
        if address is None:
            raise StageFailed(
                f"Ray did not start on this machine: {brief or type(error).__name__}; where it is "
                "only slow, the same command again will do"
            ) from None
        raise ConfigError(
            f"cannot connect to Ray at {address!r}: {brief}; {_CONNECT_HINT}"
        ) from None
    if on_terminate is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own in place
    _be_quiet()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # Ray prints retries there
        try:
            yield
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Fail in seconds where Ray itself would try for minutes. Raises ConnectionError."""
    host, _, port = address.rpartition("://")[2].partition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=3).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers there ({error.strerror or error})") from None


def _start_local(wanted_cpus: int, object_store_bytes: int) -> None:
    import ray

    # Ray's 15 would hand the cores to whatever else runs; a program of the user's does not do that
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # 30 is too few for a busy machine
    ray.init(
        address="local",
        num_cpus=max(num_cores(), wanted_cpus) + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=object_store_bytes or None,
    )
    _protect_token()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide the line that Ray's C++ core prints at every start; its failures are exceptions."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _protect_token() -> None:
    """Ray leaves its token readable by everyone; it is full control of the cluster."""
    with suppress(OSError):
        Path("~/.ray/auth_token").expanduser().chmod(0o600)


def _be_quiet() -> None:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data._internal").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def plan_pool(resources: ResourceConfig, threads: int, num_works: int) -> Pool:
    """How many actors, with what. Raises ConfigError where the readers would find no CPU.

    One actor a GPU where there are GPUs; else one a CPU core, each with `threads` threads.
    """
    import ray

    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    on_gpu = gpus >= 1 and resources.device != "cpu"
    if resources.device == "cuda" and not on_gpu:
        raise ConfigError("resources.device is cuda, but the cluster has no GPU")
    per_actor = float(max(1, threads))
    tasks = resources.read_tasks_cpus + resources.finish_tasks_cpus
    if on_gpu:
        actors = resources.actors or int(gpus)
        if actors > gpus:
            raise ConfigError(f"{actors} actors need {actors} GPUs, the cluster has {gpus:g}")
    else:
        actors = resources.actors or max(1, int((cpus - tasks) // per_actor))
    if resources.actors == 0:
        actors = max(1, min(actors, num_works))
    if actors * per_actor + tasks > cpus:
        raise ConfigError(
            f"{actors} actors of {per_actor:g} CPUs would leave {cpus - actors * per_actor:g} of the "
            f"cluster's {cpus:g} CPUs for reading and writing, which need {tasks:g}: the run would "
            "hang; set resources.actors lower"
        )
    return Pool(
        num_actors=actors,
        cpus_per_actor=per_actor,
        gpus_per_actor=1.0 if on_gpu else 0.0,
    )


@contextmanager
def quiet_deprecations() -> Iterator[None]:
    """Bounded retries can only be asked for through arguments that Ray 2.60 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray.*")
        yield
