"""Ray: connect or start, ask what there is, and refuse a pool that would starve its readers."""

import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import ResourceConfig
from pipeline.errors import ConfigError, StageFailed
from pipeline.flows.placement import (
    Node,
    Pool,
    described,
    hosts,
    labels_of,
    lay_out,
    seats,
    wants_gpus,
)
from pipeline.telemetry import Report, silent

_POLL_S = 1.0
_LOG = logging.getLogger("reseg")
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_CONNECT_HINT = (
    "is a Ray cluster running there, and, if it asks for a token, is it this one's that is in the "
    "file that RAY_AUTH_TOKEN_PATH names?"
)


@contextmanager
def connect(address: str | None, wanted_cpus: int, object_store_bytes: int = 0) -> Iterator[None]:
    """A Ray session for the duration of a run: the caller's, a cluster's, or one of our own.

    A session that exists already is used and left as it is. Without an address it is that of
    RAY_ADDRESS, which Ray sets for a submitted job; without both a local session is started, with a
    CPU more than the machine has or than are wanted, because reading and writing wait more than
    they compute. Raises ConfigError if the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if (address or os.environ.get("RAY_ADDRESS")) and any(map(os.environ.get, _TOKEN_VARIABLES)):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # who names a token means to show it
    import ray
    import ray.data

    if ray.is_initialized():
        _be_quiet()
        yield
        return
    address = _of_head(address, "--address") or _address_of_environment()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _silent_stderr():
            if address is None:
                _start_local(wanted_cpus, object_store_bytes)
            else:
                _check_reachable(address)
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env=_environment_of_workers(),
                )
    except Exception as error:  # noqa: BLE001  (a slow start is a bare Exception of Ray's)
        brief = (str(error).splitlines() or [""])[0]
        if "Failed to connect to Ray cluster" in brief:  # names an address that nobody gave
            brief = "no head answers there that lets us in"
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


def _environment_of_workers() -> dict[str, Any]:
    """Where stores are, for workers that another machine started; no key, as Ray writes it to logs.

    A submitted job has brought its own.
    """
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ:
        return {}
    names = (*storage.PUBLIC_VARIABLES, "RESEG_LOG")
    return {"env_vars": {name: os.environ[name] for name in names if os.environ.get(name)}}


def _address_of_environment() -> str | None:
    address = _of_head(os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS")
    return None if address == "local" else address


def _of_head(address: str | None, name: str) -> str | None:
    """The address of a head, None for none. Raises ConfigError for that of a dashboard."""
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{name} is {storage.shown(address)}, the URL of a dashboard, which only takes jobs: "
            "`reseg submit` sends one there; to compute from here it is the head's address, as "
            "HEAD:6379, or none"
        )
    return address or None


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


def plan_pool(
    resources: ResourceConfig, threads: int, num_works: int, report: Report = silent
) -> Pool:
    """How many actors, with what, on which nodes; see `placement.lay_out`.

    A cluster with no node for the network yet is asked for one, which its autoscaler answers.
    Raises ConfigError where the readers would find no CPU, StageFailed if no node comes.
    """
    grows = may_grow()
    nodes = live_nodes()
    gpus = 1.0 if wants_gpus(nodes, resources) else 0.0
    if not gpus:
        check_cpu_is_meant(resources.device)
    if grows and not seats(hosts(nodes, resources), max(1.0, threads), gpus):
        place = {"CPU": max(1.0, threads)} | ({"GPU": gpus} if gpus else {})
        reader = {"CPU": max(resources.read_tasks_cpus, resources.finish_tasks_cpus)}
        what = f"{'a GPU' if gpus else 'a CPU'}{described(resources)}"
        wait_for_places(
            [place, reader], what, resources.wait_for_nodes_s, report, labels_of(resources)
        )
        nodes = live_nodes()
    return lay_out(nodes, resources, threads, num_works, grows=grows)


def check_cpu_is_meant(device: str) -> None:
    """To be called where no GPU is up. Raises ConfigError if some might come and nobody said."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if device == "auto" and may_grow() and is_autoscaler_v2(fetch_from_server=True):
        raise ConfigError(
            "no GPU is up, and the cluster starts nodes on demand: --device cuda asks for a GPU (and "
            "--max-gpus for more, when segmenting), --device cpu does without"
        )


def live_nodes() -> list[Node]:
    """The nodes of the cluster that are up."""
    import ray

    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [
        Node(
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            labels=node.get("Labels") or {},
        )
        for node in known
        if node["Alive"]
    ]


def may_grow() -> bool:
    """Whether nodes may join: never where this very process started its own little cluster."""
    import ray

    node: Any = ray._private.worker._global_node
    return node is None or not node.is_head()


def wait_for_places(
    places: Sequence[Mapping[str, float]],
    what: str,
    limit_s: float,
    report: Report = silent,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Ask the cluster for room for all of `places` at once, and wait until it is there.

    A placement group is what every autoscaler understands, and it is gone with the driver; a
    request through `request_resources` would outlive it. labels: of the nodes of all places but the
    last. Raises StageFailed.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    selectors = [dict(labels or {})] * (len(places) - 1) + [{}]
    group = placement_group([dict(place) for place in places], bundle_label_selector=selectors)
    ready = group.ready()
    started = time.monotonic()
    try:
        while (waited := time.monotonic() - started) < limit_s:
            if ray.wait([ready], timeout=_POLL_S)[0]:
                return
            if waited < _POLL_S:
                _LOG.warning(
                    "reseg: there is no room yet for %s; waiting up to %.0f s (resources."
                    "wait_for_nodes_s) for an autoscaler, or you, to start one",
                    what,
                    limit_s,
                )
            report(0, 1, f"waiting for {what}", f"{waited:.0f} of {limit_s:.0f} s")
    finally:
        remove_placement_group(group)
    raise StageFailed(
        f"there was no room for {what} in {limit_s:g} s: has the cluster such a node type, and the "
        "account quota for it? resources.wait_for_nodes_s waits longer, --device cpu does without"
    )


@contextmanager
def quiet_deprecations() -> Iterator[None]:
    """Bounded retries can only be asked for through arguments that Ray 2.60 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray.*")
        yield
