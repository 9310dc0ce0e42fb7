"""A Ray head of our own that asks for a token: on loopback, ended by the ids of its own processes."""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PORTS = range(20_000, 32_000)  # below are those that Ray gives its workers
_END_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenHead:
    """url: of the dashboard. address: of the head itself. folder: of Ray's sessions."""

    url: str
    address: str
    folder: Path
    token_path: Path

    def environment(self, **more: str) -> dict[str, str]:
        """For a client that has the token; more: variables to set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
        return kept | {"RAY_AUTH_TOKEN_PATH": str(self.token_path), **more}


@contextmanager
def token_head(num_cpus: int = 2) -> Iterator[TokenHead]:
    """Start a head without other nodes, and end it with all that it started."""
    root = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # sockets need a short path
    token_path = root / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(16))
    port, dashboard, client = _free_ports(3)
    head = TokenHead(
        url=f"http://127.0.0.1:{dashboard}",
        address=f"127.0.0.1:{port}",
        folder=root / "ray",
        token_path=token_path,
    )
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": 0,
        "ray-client-server-port": client,
        "num-cpus": num_cpus,
        "num-gpus": 0,
        "object-store-memory": 100_000_000,
        "temp-dir": head.folder,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = head.environment(RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0", PATH=path)
    try:
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *words],
            env=environment,
            check=True,
            capture_output=True,
            timeout=120,
        )
        yield head
    finally:
        _end_all(token_path)
        shutil.rmtree(root, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def _end_all(token_path: Path) -> None:
    """Kill every process that was started with this token's path, which no other has.

    Twice nobody must be found: a process that is just being started has no environment yet.
    """
    mark = f"RAY_AUTH_TOKEN_PATH={token_path}\0".encode()
    deadline = time.monotonic() + _END_TIMEOUT_S
    times_empty = 0
    while times_empty < 2 and time.monotonic() < deadline:
        pids = _started_with(mark)
        times_empty = 0 if pids else times_empty + 1
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)


def _started_with(mark: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found
