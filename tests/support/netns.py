"""Ray clusters of several machines on one: a network namespace a machine, a bridge between them.

Needs root and iproute2. Machines share disk and processors; what is theirs alone is the network, so
that a link can be cut, and the processes, so that one can die. Nothing outside is touched, and
ports cannot collide.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "120",
}
_ON_MACHINES = {
    **ENVIRONMENT,
    "GLOO_SOCKET_IFNAME": "net",  # all machines have one host name, which means themselves
}
_RAY = str(Path(sys.executable).parent / "ray")
_STORE_BYTES = 100_000_000


def why_not() -> str | None:
    """Why there can be no such clusters here, or None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    name = f"reseg-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()}"
    bridge = ["ip", "-n", name, "link", "add", "net", "type", "bridge"]
    tried = subprocess.run(bridge, capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"no bridge can be made here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """A head (the machine 0) and workers (1, 2, ...), each in a namespace of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = f"reseg{os.getpid()}"
        self._spaces: list[str] = []
        self.address = "10.77.0.1:6379"

    def add(self, *, cpus: int, gpus: int = 0, labels: str = "") -> int:
        """Start another machine, the head first; its number. labels: as `kind=a,zone=b`."""
        number = len(self._spaces)
        space = f"{self._name}-{number}"
        self._spaces.append(space)
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        head = self._spaces[0]
        if number == 0:
            _ip("-n", space, "link", "add", "net", "type", "bridge")
        else:
            port = ["link", "add", f"v{number}", "type", "veth", "peer", "name", "net"]
            _ip("-n", head, *port, "netns", space)
            _ip("-n", head, "link", "set", f"v{number}", "master", "net", "up")
        _ip("-n", space, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "net")
        _ip("-n", space, "link", "set", "net", "up")
        self._start_ray(number, cpus, gpus, labels)
        return number

    def _start_ray(self, number: int, cpus: int, gpus: int, labels: str) -> None:
        here = f"10.77.0.{number + 1}"
        role = ["--head", "--port", "6379", "--include-dashboard", "false"]
        command = [
            *(_RAY, "start", *(role if number == 0 else ["--address", self.address])),
            *("--node-ip-address", here, "--num-cpus", str(cpus), "--num-gpus", str(gpus)),
            *("--object-store-memory", str(_STORE_BYTES), "--disable-usage-stats"),
            *("--temp-dir", str(self._folder / str(number))),
            *(["--labels", labels] if labels else []),
        ]
        done = subprocess.run(
            self._inside(number, command), env=_ON_MACHINES, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *command: Any, log: Path) -> subprocess.Popen[str]:
        """Start a program on the head; its standard error goes to `log`."""
        with log.open("w") as errors:
            return subprocess.Popen(
                self._inside(0, [*map(str, command)]),
                env=_ON_MACHINES,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
            )

    def kill(self, number: int) -> None:
        """End a machine as a power cut does."""
        for pid in self.processes(number):
            _signal(pid, signal.SIGKILL)

    def terminate(self, number: int) -> None:
        """End a machine as a cloud takes back a spot one: SIGTERM to its raylet."""
        for pid in self.processes(number, "raylet/raylet"):
            _signal(pid, signal.SIGTERM)

    def kill_raylet(self, number: int) -> None:
        """End only the process that speaks for a machine."""
        for pid in self.processes(number, "raylet/raylet"):
            _signal(pid, signal.SIGKILL)

    def cut(self, number: int) -> None:
        """Pull a machine's cable."""
        _ip("-n", self._spaces[0], "link", "set", f"v{number}", "down")

    def heal(self, number: int) -> None:
        """Put the cable back."""
        _ip("-n", self._spaces[0], "link", "set", f"v{number}", "up")

    def processes(self, number: int, word: str = "") -> list[int]:
        """The processes of a machine whose command line has a word."""
        told = _ip("netns", "pids", self._spaces[number]).split()
        return [int(pid) for pid in told if word in command_line(int(pid))]

    def stop(self) -> None:
        """End all machines and take the network down."""
        for number in range(len(self._spaces)):
            while self.processes(number):
                self.kill(number)
                time.sleep(0.2)
        for space in reversed(self._spaces):
            _ip("netns", "del", space)

    def _inside(self, number: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self._spaces[number], *command]


@contextmanager
def cluster(*workers: dict[str, Any], head_cpus: int = 0) -> Iterator[Cluster]:
    """A head, by default without CPUs, and a worker for each of the given `Cluster.add` arguments."""
    folder = Path(tempfile.mkdtemp(prefix="rn", dir="/tmp"))  # sockets want a short path
    made = Cluster(folder)
    try:
        made.add(cpus=head_cpus)
        for worker in workers:
            made.add(**worker)
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def command_line(pid: int) -> str:
    """The command of a process, empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
