"""`reseg doctor`: ask every node of a cluster what it sees, and this machine, and judge it."""

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline import storage, symptoms
from pipeline.diagnosis import Clock, Evidence, Finding, Node, diagnose, in_order
from pipeline.errors import ConfigError
from pipeline.flows.cluster import connect
from pipeline.flows.jobserver import connect_server
from pipeline.flows.submission import Submission
from pipeline.planning import new_run_id, operator
from pipeline.symptoms import Folder, Request
from pipeline.telemetry import Report, silent

HERE = "this machine"
_THERE = "the head"  # where a job's own process runs
_TOLD = re.compile(r"^\{$.*?^\}$", re.MULTILINE | re.DOTALL)
_JOB_S = 60.0
_POLL_S = 0.5
_ALONE = ("versions", "machine", "gpus", "decoder", "token")
_ON_NODES = ("versions", "machine", "gpus", "decoder", "token")
_AS_DRIVER = ("versions", "token")
_HEAD = "node:__internal_head__"
_CLOCK_ROUNDS = 3
_CLOCK_TIMEOUT_S = 10.0
_LOOKS_SHARE = 0.6  # of the time limit: the rest is for Ray to start a worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What the doctor found. nodes: names of the cluster's nodes; empty without a cluster."""

    address: str | None
    nodes: tuple[str, ...]
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether there is no problem; warnings are none."""
        return self.count("problem") == 0

    def count(self, level: str) -> int:
        """Findings of one level."""
        return sum(finding.level == level for finding in self.findings)

    @property
    def sentence(self) -> str:
        """The conclusion, for people."""
        where = "this machine"
        if self.nodes:
            where += f" and {len(self.nodes):,} node{'s' if len(self.nodes) > 1 else ''}"
        problems, warnings = self.count("problem"), self.count("warning")
        if problems or warnings:
            told = f"{_number(problems, 'problem')} and {_number(warnings, 'warning')} on {where}."
            return told[0].upper() + told[1:]
        checks = dict.fromkeys(finding.check for finding in self.findings)
        return f"All is well on {where}: {', '.join(checks)}."

    def to_plain(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "healthy": self.healthy,
            "problems": self.count("problem"),
            "warnings": self.count("warning"),
            "address": self.address,
            "nodes": list(self.nodes),
            "seconds": round(self.seconds, 2),
            "findings": [finding.to_plain() for finding in self.findings],
        }


def _number(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'s' if count != 1 else ''}"


def run_doctor(
    locations: Sequence[str] = (),
    *,
    address: str | None = None,
    bundle: str = "",
    dashboard: str = "",
    timeout_s: float = 90.0,
    report: Report = silent,
) -> Diagnosis:
    """Check this machine, and every node of the cluster at `address` (or RAY_ADDRESS), if any.

    By the URL of a dashboard only jobs get in, so one looks at the nodes, and at the locations, from
    there. locations: paths and URIs of sources and results that all of them must reach. timeout_s:
    for the answer of the slowest node. Raises ConfigError for a request that makes no sense, and where no
    cluster answers.
    """
    started = time.monotonic()
    uris = tuple(dict.fromkeys(storage.resolve(location) for location in locations))
    bundle = storage.resolve(bundle) if bundle else ""
    address = address or os.environ.get("RAY_ADDRESS") or None
    _check_dashboard(dashboard)
    if address is not None and urlsplit(address).scheme in ("http", "https"):
        if dashboard:
            raise ConfigError("--dashboard goes with --address HOST:PORT; a URL is the dashboard")
        nodes, findings = _examine_by_job(address, uris, bundle, timeout_s, report)
        return Diagnosis(
            address=address, nodes=nodes, findings=findings, seconds=time.monotonic() - started
        )
    request = Request(
        looks=(),
        stores=tuple(uri for uri in uris if storage.is_remote(uri)),
        bundle=bundle,
        dashboard=dashboard.rstrip("/"),
        timeout_s=timeout_s * _LOOKS_SHARE,
    )
    with _planted([uri for uri in uris if not storage.is_remote(uri)]) as folders:
        request = replace(request, folders=folders)
        if address or _in_session():
            with connect(address, 0):
                evidence = _examine_cluster(request, timeout_s, report)
        else:
            evidence = _examine_alone(request)
    return Diagnosis(
        address=address,
        nodes=tuple(node.name for node in evidence.workers),
        findings=tuple(diagnose(evidence)),
        seconds=time.monotonic() - started,
    )


def _check_dashboard(url: str) -> None:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
        raise ConfigError(f"--dashboard {url!r} is not of the form http://HOST:PORT")


def _in_session() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@contextmanager
def _planted(locations: Iterable[str]) -> Iterator[tuple[Folder, ...]]:
    """Probes in all local locations for the duration of the examination."""
    folders: list[Folder] = []
    try:
        for location in locations:
            folders.append(symptoms.plant(location))
        yield tuple(folders)
    finally:
        for folder in folders:
            symptoms.unplant(folder)


def _looks(request: Request, always: tuple[str, ...], *others: str) -> tuple[str, ...]:
    """The looks that are always taken, and of the others those that have something to look at."""
    given = {
        "folders": request.folders,
        "stores": request.stores,
        "store_clock": any(uri.startswith("s3://") for uri in request.stores),
        "bundle": request.bundle,
        "weights": request.bundle,
        "dashboard": request.dashboard,
    }
    return always + tuple(name for name in others if given[name])


def _examine_alone(request: Request) -> Evidence:
    names = _looks(request, _ALONE, "stores", "store_clock", "bundle", "weights", "dashboard")
    found = symptoms.look(replace(request, looks=names))
    return Evidence(
        nodes=(Node(name=HERE, report=found, driver=True),),
        folders=request.folders,
        stores=request.stores,
        bundle=request.bundle,
        dashboard=request.dashboard,
        ranges=symptoms.supported_ranges(),
    )


def _examine_by_job(
    url: str, uris: Sequence[str], bundle: str, timeout_s: float, report: Report
) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
    """Names of the nodes, and findings: of this machine and the dashboard, and of a doctor sent there.

    Raises ConfigError where the dashboard does not take the job.
    """
    server = connect_server(url, allow_open=True)
    request = Request(looks=(), dashboard=server.url, timeout_s=timeout_s * _LOOKS_SHARE)
    mine = [replace(item, seen=f"here: {item.seen}") for item in diagnose(_examine_alone(request))]
    words = ["--json", "--timeout", f"{timeout_s:g}", *(["--bundle", bundle] if bundle else [])]
    submission = Submission(
        command="doctor", words=(*words, "--", *uris), name=f"doctor-{new_run_id()}"
    )
    job = server.submit(submission, operator())
    started = time.monotonic()
    while not job.ended and (waited_s := time.monotonic() - started) < timeout_s + _JOB_S:
        report(0, 1, "asking nodes, by a job", f"{waited_s:.0f} s")
        time.sleep(_POLL_S)
        job = server.job(job.id)
    if not job.ended:
        server.stop(job.id)
    log = server.log(job.id)
    told = _TOLD.search(log)
    if told is None:
        lines = [line for line in (job.status, job.message, *log.splitlines()) if line.strip()]
        failed = Finding(
            level="problem",
            check="nodes",
            seen=f"the doctor could not be run there: {lines[-1][:300]}",
            advice=f"mend that first; its log: reseg jobs logs {job.id} --address {url}",
        )
        return (), tuple(in_order([failed, *mine]))
    values = json.loads(told[0])
    theirs = [
        Finding(**{key: text.replace(HERE, _THERE) for key, text in item.items()})
        for item in values["findings"]
    ]
    return tuple(values["nodes"]), tuple(in_order([*theirs, *mine]))


def _examine_cluster(request: Request, timeout_s: float, report: Report) -> Evidence:
    import ray

    listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node for node in listed if node["Alive"]]
    known = _dashboard_of_cluster()
    refs = {}
    for node in alive:
        asked = replace(request, answer=node["NodeID"][:12])
        # a dashboard on loopback can only be asked on its own machine, which is the head
        asked = replace(asked, dashboard=known if _HEAD in node["Resources"] else "")
        looks = _looks(asked, _ON_NODES, "folders", "stores", "store_clock", "bundle", "dashboard")
        refs[node["NodeID"]] = _pinned(_look_on_node, node["NodeID"], replace(asked, looks=looks))
    looks = _looks(request, _AS_DRIVER, "stores", "store_clock", "bundle", "weights", "dashboard")
    report(0, len(alive), "asking nodes")
    mine = symptoms.look(replace(request, looks=looks))
    reports, failures = _collect(refs, timeout_s, report)
    names = {node["NodeID"]: _name(node) for node in alive}
    nodes = [
        Node(
            name=names[key],
            report=reports.get(key, {}),
            failure=failures.get(key, ""),
            gpus=node["Resources"].get("GPU", 0.0),
            object_store_bytes=int(node["Resources"].get("object_store_memory", 0)),
        )
        for key, node in ((node["NodeID"], node) for node in alive)
    ]
    return Evidence(
        nodes=(Node(name=HERE, report=mine, driver=True), *nodes),
        folders=request.folders,
        arrived=_arrived(request.folders, reports, names),
        stores=request.stores,
        clocks={names[key]: clock for key, clock in _measure_clocks(reports).items()},
        bundle=request.bundle,
        dashboard=request.dashboard or known,
        ranges=symptoms.supported_ranges(),
    )


def _name(node: Mapping[str, Any]) -> str:
    """Host and the beginning of the id: several nodes may run on one host."""
    return f"{node['NodeManagerHostname'] or node['NodeManagerAddress']} ({node['NodeID'][:6]})"


def _pinned(function: Any, node_id: str, *arguments: Any) -> Any:
    """Start a task on one node, whatever else runs there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    return task.remote(*arguments)


def _look_on_node(request: Request) -> dict[str, Any]:
    """The task of one node: `symptoms.look`, and what only Ray's worker knows."""
    from ray._private.authentication import authentication_utils

    found = symptoms.look(replace(request, spill_folder=_spill_folder()))
    token = authentication_utils.is_token_auth_enabled()
    return {**found, "session": {"token": token}}


def _spill_folder() -> str:
    """Where this node's raylet, the parent of its workers, spills objects to."""
    import ray

    with suppress(OSError):
        for argument in Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0"):
            if argument.startswith("--fallback_directory="):
                return argument.partition("=")[2]
    return str(ray.get_runtime_context().get_temp_dir())


def _dashboard_of_cluster() -> str:
    """The dashboard's address as the head has published it; empty where it has none."""
    from ray.experimental.internal_kv import _internal_kv_get

    where = _internal_kv_get(b"webui:url", namespace=b"dashboard")
    return f"http://{where.decode()}" if where else ""


def _collect(
    refs: Mapping[str, Any], timeout_s: float, report: Report
) -> tuple[dict[str, Any], dict[str, str]]:
    """Reports and failures by node, complete when the time is over."""
    import ray

    reports: dict[str, Any] = {}
    failures: dict[str, str] = {}
    waiting = {ref: key for key, ref in refs.items()}
    deadline = time.monotonic() + timeout_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=min(left, 1.0))
        for ref in ready:
            key = waiting.pop(ref)
            try:
                reports[key] = ray.get(ref)
            except Exception as error:  # noqa: BLE001  (a node that fails is a finding)
                failures[key] = symptoms.brief(getattr(error, "cause", None) or error)
        report(len(refs) - len(waiting), len(refs), "asking nodes")
    for ref, key in waiting.items():
        failures[key] = f"no answer in {timeout_s:g} s"
        with suppress(Exception):
            ray.cancel(ref)
    return reports, failures


def _arrived(
    folders: Iterable[Folder], reports: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, frozenset[str]]:
    """The nodes whose answer the driver sees, by location."""
    return {
        folder.location: frozenset(
            names[key]
            for key, found in reports.items()
            if found["folders"].get(folder.location, {}).get("answered")
            and symptoms.answer_arrived(folder, key[:12])
        )
        for folder in folders
    }


def _measure_clocks(reports: Iterable[str]) -> dict[str, Clock]:
    """The clock of every node that has answered, by the quickest of a few short tasks.

    A task of its own, because the first one waits for a worker to start, and half of a round trip
    is how far off this can be.
    """
    best: dict[str, Clock] = {}
    deadline = time.monotonic() + _CLOCK_TIMEOUT_S
    for _ in range(_CLOCK_ROUNDS):
        for key, clock in _clock_round(reports, deadline).items():
            if key not in best or clock.uncertainty_s < best[key].uncertainty_s:
                best[key] = clock
    return best


def _clock() -> float:
    return time.time()


def _clock_round(keys: Iterable[str], deadline: float) -> dict[str, Clock]:
    import ray

    found: dict[str, Clock] = {}
    sent = {}
    for key in keys:
        began = time.time()
        sent[_pinned(_clock, key)] = (key, began)
    while sent and (left := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait(list(sent), num_returns=1, timeout=left)
        ended = time.time()
        for ref in ready:
            key, began = sent.pop(ref)
            with suppress(Exception):
                theirs = ray.get(ref)
                found[key] = Clock(
                    skew_s=theirs - (began + ended) / 2, uncertainty_s=(ended - began) / 2
                )
    return found
