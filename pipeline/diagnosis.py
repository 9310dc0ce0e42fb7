"""What is wrong with a machine or a cluster, said in sentences: pure functions of plain reports.

`symptoms` gathers the reports, `flows.doctor` sends for them. A judge takes them and returns
findings; it asks nobody anything, so a test can feed it any cluster.
"""

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from pipeline.symptoms import PACKAGES, Facts, Folder

Level = Literal["problem", "warning", "ok"]
LEVELS: tuple[Level, ...] = ("problem", "warning", "ok")

_GIB = 1 << 30
SKEW_WARNING_S, SKEW_PROBLEM_S = 1.0, 30.0
SPILL_REFUSED_SHARE = 0.95  # Ray's local_fs_capacity_threshold
SPILL_WARNING_SHARE = 0.85
MIN_AVAILABLE_BYTES = 2 * _GIB
MIN_SHM_BYTES = 256 << 20  # the decoder passes pixels through it; Docker gives 64 MiB
MIN_OPEN_FILES = 8192
_SHOWN_NAMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One judgement: what was checked, what was seen, and what to do; no advice if all is well."""

    level: Level
    check: str
    seen: str
    advice: str = ""

    def to_plain(self) -> dict[str, str]:
        return {"level": self.level, "check": self.check, "seen": self.seen, "advice": self.advice}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine and its report, or why there is none. gpus, object_store_bytes: as Ray has them.

    driver: the machine the command runs on, as the driver's own process sees it.
    """

    name: str
    report: Mapping[str, Facts] = field(default_factory=dict)
    failure: str = ""
    driver: bool = False
    gpus: float = 0.0
    object_store_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """How far a clock is ahead of the driver's; the truth is within the uncertainty."""

    skew_s: float
    uncertainty_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was gathered. arrived: names of the nodes whose answer the driver saw, by location.

    dashboard: its address, or empty. ranges: versions that reseg supports, by package.
    """

    nodes: tuple[Node, ...]
    folders: tuple[Folder, ...] = ()
    arrived: Mapping[str, frozenset[str]] = field(default_factory=dict)
    stores: tuple[str, ...] = ()
    clocks: Mapping[str, Clock] = field(default_factory=dict)
    bundle: str = ""
    dashboard: str = ""
    ranges: Mapping[str, str] = field(default_factory=dict)

    @property
    def workers(self) -> tuple[Node, ...]:
        """The nodes of the cluster, without the driver."""
        return tuple(node for node in self.nodes if not node.driver)

    def reports(self, look: str) -> list[tuple[Node, Facts]]:
        """The nodes that have a report on something, with it."""
        return [(node, node.report[look]) for node in self.nodes if look in node.report]


def diagnose(evidence: Evidence) -> list[Finding]:
    """All findings, problems first."""
    return in_order(finding for judge in JUDGES for finding in judge(evidence))


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Findings, problems first."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def judge_answers(evidence: Evidence) -> list[Finding]:
    """A node that says nothing is a finding by itself."""
    found = []
    for failure, names in _group((node, node.failure) for node in evidence.workers).items():
        if not failure:
            continue
        advice = "look at the node and its raylet log, or take the node out; --timeout waits longer"
        if "No module named" in failure or "failed to import" in failure:
            advice = "install the reseg of this machine there, or use one image for all nodes"
        found.append(_problem("nodes", f"no report from {_names(names)}: {failure}", advice))
    if evidence.workers and not found:
        found.append(_ok("nodes", f"{_count(len(evidence.workers), 'node')} answered"))
    return found


def judge_versions(evidence: Evidence) -> list[Finding]:
    """The same Python and packages everywhere, within what reseg supports."""
    reports = evidence.reports("versions")
    found = _errors("versions", reports, "install reseg anew there")
    reports = [(node, facts) for node, facts in reports if "error" not in facts]
    for package in ("python", *PACKAGES, "reseg"):
        found += _judge_version(package, reports, evidence.ranges.get(package, ""))
    codes = _group((node, facts["code"]) for node, facts in reports)
    if len(codes) > 1 and len({facts["reseg"] for _, facts in reports}) == 1:
        found.append(
            _problem(
                "versions",
                f"reseg has one version number but different code: {_by_value(codes)}",
                "install the same wheel, or the same commit, on all nodes",
            )
        )
    if reports and not found:
        first = reports[0][1]
        listed = ", ".join(f"{name} {first[name]}" for name in ("python", *PACKAGES, "reseg"))
        where = f"the same on {len(reports)} machines" if len(reports) > 1 else "on this machine"
        known = "supported, " if evidence.ranges else ""
        found.append(_ok("versions", f"{known}{where}: {listed}"))
    return found


def _judge_version(
    package: str, reports: list[tuple[Node, Facts]], supported: str
) -> list[Finding]:
    found = []
    groups = _group((node, facts[package]) for node, facts in reports)
    for names in (names for version, names in groups.items() if version is None):
        found.append(
            _problem(
                "versions", f"{package} is not installed on {_names(names)}", "install reseg anew"
            )
        )
    known = {version: names for version, names in groups.items() if version is not None}
    for version, names in known.items():
        if supported and not _is_within(version, supported):
            seen = f"{package} {version} on {_names(names)}; supported is {supported}"
            found.append(_problem("versions", seen, f"install {package} {supported} there"))
    if len({_comparable(package, version) for version in known}) > 1:
        advice = "install the same versions on all nodes, best from one image"
        found.append(_problem("versions", f"{package} differs: {_by_value(known)}", advice))
    elif package == "python" and len(known) > 1:
        advice = "harmless as a rule; Ray may refuse it for drivers"
        found.append(_warning("versions", f"Python's patch differs: {_by_value(known)}", advice))
    return found


def _is_within(version: str, supported: str) -> bool:
    try:
        return SpecifierSet(supported).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _comparable(package: str, version: str) -> str:
    """What has to be equal: of Python the minor version, of torch not whether it is for a GPU."""
    return ".".join(version.split(".")[:2]) if package == "python" else version.split("+")[0]


def judge_gpus(evidence: Evidence) -> list[Finding]:
    """Every GPU that Ray gives away is one that torch can compute on."""
    reports = evidence.reports("gpus")
    found = [finding for node, facts in reports if (finding := _judge_gpus_of(node, facts))]
    if found or not reports:
        return found
    fine = _group((node, _describe_gpus(facts)) for node, facts in reports if facts["devices"])
    if not fine:
        return [_ok("GPUs", "none, and none is promised: networks run on the CPU")]
    return [_ok("GPUs", f"torch computes on {_by_value(fine)}")]


def _judge_gpus_of(node: Node, facts: Facts) -> Finding | None:
    if "error" in facts:
        advice = "repair the installation of torch, or the driver"
        return _problem("GPUs", f"{facts['error']} (on {node.name})", advice)
    if facts["failures"]:
        return _judge_broken_gpu(node, facts["failures"][0])
    seen, promised = len(facts["devices"]), int(node.gpus)
    if seen < promised or (facts["driver"] and not seen):
        return _judge_hidden_gpus(node, facts)
    if seen > promised and not node.driver:
        text = f"{node.name} has {_count(seen, 'GPU')}, Ray gives {promised} away"
        return _warning("GPUs", text, f"start Ray there with --num-gpus {seen} to use them all")
    return None


def _judge_broken_gpu(node: Node, failure: str) -> Finding:
    text = f"torch cannot compute on GPU {failure} (on {node.name})"
    if "out of memory" in failure or "busy" in failure:
        return _warning("GPUs", text, "if it is not a run of yours, end what uses the GPU")
    return _problem("GPUs", text, "install a torch that is built for this GPU and driver")


def _judge_hidden_gpus(node: Node, facts: Facts) -> Finding:
    driver, seen = facts["driver"], len(facts["devices"])
    if node.gpus:
        level, promise = _problem, f"Ray gives away {_count(int(node.gpus), 'GPU')} on {node.name}"
    else:
        level, promise = _warning, f"the NVIDIA driver {driver} is loaded on {node.name}"
    if facts["cuda"] is None:
        text = f"{promise}, but torch {facts['torch']} there is built for CPUs"
        return level("GPUs", text, "install torch's wheel for CUDA there")
    text = f"{promise}, torch {facts['torch']} (CUDA {facts['cuda']}) sees {seen or 'none'}"
    if facts["warnings"]:
        text += f": {facts['warnings'][0]}"
    if driver:
        return level(
            "GPUs", text, f"driver {driver} may be too old; in a container, pass the GPUs in"
        )
    return level("GPUs", text, "install the NVIDIA driver, or start Ray there with --num-gpus 0")


def _describe_gpus(facts: Facts) -> str:
    models = _group((index, name) for index, name in enumerate(facts["devices"]))
    listed = " and ".join(f"{len(those)} x {name}" for name, those in models.items())
    return f"{listed} (driver {facts['driver']}, CUDA {facts['cuda']})"


def judge_decoder(evidence: Evidence) -> list[Finding]:
    """The sandbox decodes a picture on every machine."""
    reports = evidence.reports("decoder")
    advice = (
        "python must be able to start a child with 4 GiB of address space and a file in /dev/shm"
    )
    found = _errors("decoder", reports, advice)
    if reports and not found:
        slowest = max(facts["seconds"] for _, facts in reports)
        found.append(_ok("decoder", f"the sandbox decodes, started in at most {slowest:.1f} s"))
    return found


def judge_machines(evidence: Evidence) -> list[Finding]:
    """Memory, shared memory, disk for spilling, open files."""
    reports = evidence.reports("machine")
    found = _errors("machine", reports, "see what is unusual about the machine")
    good = [(node, facts) for node, facts in reports if "error" not in facts]
    for judge in (_judge_disk, _judge_memory, _judge_shm, _judge_files):
        found += [finding for node, facts in good if (finding := judge(node, facts))]
    if good and not found:
        disk = min(facts["disk_free_bytes"] for _, facts in good)
        memory = min((facts["available_bytes"] or 0) for _, facts in good)
        least = "at least " * (len(good) > 1)
        found.append(
            _ok(
                "machine",
                f"{least}{_size(disk)} of disk to spill to, {_size(memory)} of memory free",
            )
        )
    return found


def _judge_disk(node: Node, facts: Facts) -> Finding | None:
    free, total, folder = facts["disk_free_bytes"], facts["disk_bytes"], facts["spill_folder"]
    used = 1 - free / max(total, 1)
    seen = f"{used:.0%} of the disk of {folder} on {node.name} is used, {_size(free)} are free"
    advice = "free some, or start Ray there with --object-spilling-directory on a larger disk"
    if used >= SPILL_REFUSED_SHARE:
        return _problem("disk", f"{seen}; Ray refuses to spill objects above 95%", advice)
    if used >= SPILL_WARNING_SHARE or free < node.object_store_bytes:
        return _warning("disk", f"{seen}; spilling may fill it", advice)
    return None


def _judge_memory(node: Node, facts: Facts) -> Finding | None:
    available = facts["available_bytes"]
    if available is None or available >= MIN_AVAILABLE_BYTES:
        return None
    seen = (
        f"{_size(available)} of {_size(facts['memory_bytes'])} memory are available on {node.name}"
    )
    return _warning("memory", seen, "end what uses it, or give fewer CPUs to Ray there")


def _judge_shm(node: Node, facts: Facts) -> Finding | None:
    shm, wanted = facts["shm_bytes"], max(MIN_SHM_BYTES, node.object_store_bytes)
    if shm is None or shm >= wanted:
        return None
    seen = f"/dev/shm has {_size(shm)} on {node.name}"
    if node.object_store_bytes > shm:
        seen += (
            f", Ray's object store {_size(node.object_store_bytes)}: it lies on disk, and is slow"
        )
    return _warning("memory", seen, f"start the container with --shm-size={-(-wanted // _GIB)}g")


def _judge_files(node: Node, facts: Facts) -> Finding | None:
    # a driver of Ray's raises its own limit to the hard one; raylets and workers keep theirs
    limit = facts["files_hard"] if node.driver else facts["files_soft"]
    if limit >= MIN_OPEN_FILES:
        return None
    advice = f"ulimit -n 65536 before Ray is started; below {MIN_OPEN_FILES} connections may fail"
    return _warning("machine", f"a process may open {limit:,} files on {node.name}", advice)


def judge_folders(evidence: Evidence) -> list[Finding]:
    """What the driver writes in a location every node sees, and the other way round."""
    return [_judge_folder(folder, evidence) for folder in evidence.folders]


def _judge_folder(folder: Folder, evidence: Evidence) -> Finding:
    place, workers = (
        folder.location,
        [node for node in evidence.workers if "folders" in node.report],
    )
    if not folder.token and not folder.seen:
        return _problem("folders", f"{place} cannot be used: {folder.failure}", "correct the path")
    answers = {node.name: _answer(node, place) for node in workers}
    lost = [name for name, answer in answers.items() if not answer.get("found")]
    if lost:
        seen = "the probe written here" if folder.token else "what is here"
        return _problem(
            "folders",
            f"{place} is not shared: {_names(lost)} cannot see {seen}",
            "mount the same file system there at this path, or use s3://",
        )
    others = _count(len(workers), "node")
    if not folder.token:
        seen = f"{place} cannot be written here ({folder.failure})"
        if workers:
            seen += f"; {others} list the same" if len(workers) > 1 else "; the node lists the same"
        return _warning("folders", seen, "fine for a source; results need a folder to write in")
    mute = [name for name, answer in answers.items() if not answer.get("answered")]
    if mute:
        why = answers[mute[0]].get("failure", "no answer")
        return _problem(
            "folders",
            f"{_names(mute)} cannot write in {place}: {why}",
            "let the user that runs Ray write there, unless it is only a source",
        )
    unseen = [name for name in answers if name not in evidence.arrived.get(place, ())]
    if unseen:
        return _problem(
            "folders",
            f"{place} is not shared: what {_names(unseen)} wrote does not arrive here",
            "mount the same file system on both, not a copy or an overlay of it",
        )
    shared = f"is shared by {others} and this machine, both ways" if workers else "can be written"
    if folder.is_new:
        seen = f"{place} does not exist yet; the folder that would hold it {shared}"
        return _warning("folders", seen, "fine for results that are new; a source must be there")
    return _ok("folders", f"{place} {shared}")


def _answer(node: Node, place: str) -> Facts:
    answers = node.report["folders"]
    if "error" in answers:
        return {"found": False, "failure": answers["error"]}
    return dict(answers[place])


def judge_stores(evidence: Evidence) -> list[Finding]:
    """Every machine reaches every store, and commits are safe there."""
    found = []
    for uri in evidence.stores:
        reports = [
            (node, facts if "error" in facts else facts[uri])
            for node, facts in evidence.reports("stores")
        ]
        found += _judge_store(uri, reports)
    return found


def _judge_store(uri: str, reports: list[tuple[Node, Facts]]) -> list[Finding]:
    found = []
    errors = _group((node, facts["error"]) for node, facts in reports if "error" in facts)
    for error, names in errors.items():
        advice = "check endpoint, region, network and credentials there (AWS variables or the role)"
        if "411" in error or "MissingContentLength" in error:
            advice = (
                "set AWS_REQUEST_CHECKSUM_CALCULATION and AWS_RESPONSE_CHECKSUM_VALIDATION to "
                "when_required on every node: this store refuses chunked checksums"
            )
        found.append(_problem("stores", f"{uri} from {_names(names)}: {error}", advice))
    denied = _group((node, facts["denied"]) for node, facts in reports if "denied" in facts)
    for refusal, names in denied.items():
        seen = f"{uri} can be listed, but not written, from {_names(names)}: {refusal}"
        found.append(_warning("stores", seen, "fine for a source; results need the right to write"))
    reached = [(node, facts) for node, facts in reports if "put_if_absent" in facts]
    if any(not facts["put_if_absent"] for _, facts in reached):
        found.append(
            _problem(
                "stores",
                f"{uri}: the store overwrites where it should refuse (put-if-absent does not hold)",
                "two runs could publish over each other: keep results in another store, or set "
                "RESEG_STORE_LOCK to a folder that all machines share",
            )
        )
    if any(not facts["read_after_write"] for _, facts in reached):
        found.append(
            _problem(
                "stores",
                f"{uri}: what was just written is not read back (read-after-write does not hold)",
                "turn off caches between here and the store, or use another one for results",
            )
        )
    if reached and not found:
        slowest = max(facts["seconds"] for _, facts in reached)
        seen = f"{uri} answers everywhere" if len(reached) > 1 else f"{uri} answers"
        found.append(
            _ok("stores", f"{seen}, put-if-absent and read-after-write hold ({slowest:.1f} s)")
        )
    return found


def judge_clocks(evidence: Evidence) -> list[Finding]:
    """Clocks of nodes against the driver's, and of all against the store's."""
    stores = {
        node.name: Clock(skew_s=facts["skew_s"], uncertainty_s=facts["uncertainty_s"])
        for node, facts in evidence.reports("store_clock")
        if "error" not in facts
    }
    return _judge_skew(evidence.clocks, "this machine") + _judge_skew(stores, "the object store")


def _judge_skew(clocks: Mapping[str, Clock], reference: str) -> list[Finding]:
    found = []
    for name, clock in clocks.items():
        certain_s = abs(clock.skew_s) - clock.uncertainty_s
        if certain_s > SKEW_WARNING_S:
            level = _problem if certain_s > SKEW_PROBLEM_S else _warning
            direction = "ahead of" if clock.skew_s > 0 else "behind"
            seen = (
                f"the clock of {name} is {abs(clock.skew_s):.1f} s {direction} {reference} "
                f"(measured to {clock.uncertainty_s:.2g} s)"
            )
            advice = "run chrony or ntpd there; S3 refuses signatures that are 15 minutes off"
            found.append(level("clocks", seen, advice))
    if clocks and not found:
        worst = max(abs(clock.skew_s) + clock.uncertainty_s for clock in clocks.values())
        found.append(_ok("clocks", f"within {worst:.2g} s of {reference}"))
    return found


def judge_access(evidence: Evidence) -> list[Finding]:
    """Nobody without the token gets in: whoever does can run any program on the cluster."""
    found = []
    sessions = evidence.reports("session")
    open_nodes = [node.name for node, facts in sessions if not facts["token"]]
    advice = (
        "stop the cluster and start it with RAY_AUTH_MODE=token and the token in a file named by "
        "RAY_AUTH_TOKEN_PATH on every node"
    )
    if open_nodes:
        seen = (
            f"Ray takes commands without a token on {_names(open_nodes)}: anybody who reaches its "
            "ports can run programs there"
        )
        found.append(_problem("access", seen, advice))
    elif sessions:
        found.append(_ok("access", "every node asks for the token"))
    return found + _judge_dashboard(evidence, advice) + _judge_token(evidence)


def _judge_dashboard(evidence: Evidence, advice: str) -> list[Finding]:
    url = evidence.dashboard
    if not url:
        return []
    found = [_judge_strangers(url, evidence.reports("dashboard"), advice)]
    if not _is_loopback(url):
        text = f"the dashboard listens beyond its own machine, at {url}"
        advice = "start Ray with --dashboard-host 127.0.0.1, or keep a firewall around it"
        found.append(_warning("access", text, advice))
    return found


def _judge_strangers(url: str, answers: list[tuple[Node, Facts]], advice: str) -> Finding:
    """What the dashboard said to requests without a token."""
    statuses = [item for _, facts in answers if "error" not in facts for item in facts.items()]
    given_away = sorted({path for path, status in statuses if 200 <= status < 300})
    if given_away:
        text = f"{url} answers {' and '.join(given_away)} without a token: anybody who reaches it "
        return _problem("access", f"{text}can run programs on the cluster", advice)
    odd = sorted({status for _, status in statuses} - {401, 403})
    if odd:
        text = f"{url} answers {', '.join(map(str, odd))} without a token, not 401"
        return _warning("access", text, "see that whatever stands before it refuses strangers")
    if not statuses:
        why = next((facts["error"] for _, facts in answers), "its machine did not answer")
        text = f"{url} could not be asked whether it refuses strangers: {why}"
        return _warning("access", text, "give its address as --dashboard http://HOST:8265")
    return _ok("access", f"the dashboard at {url} refuses whoever has no token")


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _judge_token(evidence: Evidence) -> list[Finding]:
    readable = _group(
        (node, (facts["path"], facts["mode"]))
        for node, facts in evidence.reports("token")
        if facts.get("mode") is not None and facts["mode"] & 0o077
    )
    return [
        _problem(
            "access",
            f"{path} on {_names(names)} has mode {mode:04o}: others can read the token, which is "
            "full control of the cluster",
            f"chmod 600 {path}",
        )
        for (path, mode), names in readable.items()
    ]


def judge_bundle(evidence: Evidence) -> list[Finding]:
    """The network is whole, and the same wherever it is read."""
    if not evidence.bundle:
        return []
    reports = evidence.reports("bundle")
    found = _errors("bundle", reports, "copy the bundle again, to where every node can read it")
    found += _errors("bundle", evidence.reports("weights"), "copy or train the bundle again")
    good = _group((node, facts["digest"]) for node, facts in reports if "error" not in facts)
    if len(good) > 1:
        seen = f"{evidence.bundle} is not the same everywhere: {_by_value(good)}"
        found.append(_problem("bundle", seen, "use one folder that all nodes share, or s3://"))
    if good and not found:
        found.append(_ok("bundle", f"{evidence.bundle} is whole, digest {next(iter(good))}"))
    return found


JUDGES: tuple[Callable[[Evidence], list[Finding]], ...] = (
    judge_answers,
    judge_versions,
    judge_gpus,
    judge_decoder,
    judge_machines,
    judge_folders,
    judge_stores,
    judge_clocks,
    judge_bundle,
    judge_access,
)


def _problem(check: str, seen: str, advice: str) -> Finding:
    return Finding(level="problem", check=check, seen=seen, advice=advice)


def _warning(check: str, seen: str, advice: str) -> Finding:
    return Finding(level="warning", check=check, seen=seen, advice=advice)


def _ok(check: str, seen: str) -> Finding:
    return Finding(level="ok", check=check, seen=seen)


def _errors(check: str, reports: list[tuple[Node, Facts]], advice: str) -> list[Finding]:
    """One problem for each different failure of a look, with those that met it."""
    groups = _group((node, facts["error"]) for node, facts in reports if "error" in facts)
    return [
        _problem(check, f"{error} (on {_names(names)})", advice) for error, names in groups.items()
    ]


def _group(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[str]]:
    """Names of what has the same value, by value."""
    found: dict[Any, list[str]] = {}
    for owner, value in pairs:
        found.setdefault(value, []).append(owner.name if isinstance(owner, Node) else str(owner))
    return found


def _by_value(groups: Mapping[Any, list[str]]) -> str:
    return ", ".join(f"{value} on {_names(names)}" for value, names in groups.items())


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    left = len(names) - _SHOWN_NAMES
    return f"{shown} and {left} more" if left > 0 else shown


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _size(num_bytes: int) -> str:
    if num_bytes < _GIB:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{num_bytes / _GIB:.1f} GiB"
