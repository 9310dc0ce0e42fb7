"""What one machine sees of itself and around it: plain values, judged by `diagnosis`.

Each look runs in a thread of its own under one time limit, so a mount or a store that hangs costs
its own entry and not the report. No value holds a key, a token or the environment.
"""

import hashlib
import http.client
import io
import json
import os
import platform
import re
import resource
import secrets
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement

import pipeline
from pipeline import storage
from pipeline.errors import BadImage, ConfigError, ResegError
from pipeline.objectstore import endpoint_of

Facts = Mapping[str, Any]

PACKAGES = ("ray", "torch", "pyarrow", "numpy", "pillow", "deltalake", "obstore")
DASHBOARD_PATHS = ("/api/version", "/api/jobs/")
_CONNECT_TIMEOUT_S = 5.0
_PROBE_WAIT_S = 10.0  # network file systems show a new file to others after seconds
_MAX_COMPARED_NAMES = 100_000
_COMPARED_BYTES = 1 << 20

_GPU_CHILD = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    there = torch.cuda.is_available()
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": [], "failures": []}
    for index in range(torch.cuda.device_count() if there else 0):
        found["devices"].append(torch.cuda.get_device_name(index))
        try:
            assert torch.ones(8, device=f"cuda:{index}").sum().item() == 8, "1 + 1 is not 2"
        except Exception as error:
            found["failures"].append(f"{index}: {str(error).splitlines()[0][:160]}")
found["warnings"] = [str(item.message).splitlines()[0][:200] for item in caught
                     if "cuda" in str(item.message).lower()][:1]
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """One local location and the probe that the driver left in it for the others to find.

    folder: where the probe lies; the parent of a location that is still to be created. token: name
    and content of the probe; empty where none could be written, for the reason in `failure`.
    seen: what the location holds, as a hash, to be compared where there is no probe. is_new: it is
    still to be created.
    """

    location: str
    folder: str
    token: str = ""
    seen: str = ""
    failure: str = ""
    is_new: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a machine is asked: which looks, at what. answer: marks its own probe files."""

    looks: tuple[str, ...]
    answer: str = "here"
    folders: tuple[Folder, ...] = ()
    stores: tuple[str, ...] = ()
    bundle: str = ""
    dashboard: str = ""
    spill_folder: str = ""
    timeout_s: float = 60.0


def look(request: Request) -> dict[str, Facts]:
    """Everything asked for, by name of the look; {"error": sentence} for one that failed."""
    looks: dict[str, Callable[[], Facts]] = {
        "versions": versions,
        "machine": lambda: machine(request.spill_folder),
        "gpus": lambda: gpus(request.timeout_s),
        "decoder": decoder,
        "folders": lambda: {item.location: find_probe(item, request) for item in request.folders},
        "stores": lambda: _in_parallel(
            {uri: partial(probe_store, uri) for uri in request.stores}, request.timeout_s - 1
        ),
        "store_clock": store_clock,
        "bundle": lambda: bundle_digest(request.bundle),
        "weights": lambda: bundle_weights(request.bundle),
        "token": token_file,
        "dashboard": lambda: dashboard_statuses(request.dashboard),
    }
    return _in_parallel({name: looks[name] for name in request.looks}, request.timeout_s)


def _in_parallel(looks: Mapping[str, Callable[[], Facts]], timeout_s: float) -> dict[str, Facts]:
    found: dict[str, Facts] = {}
    threads = [
        threading.Thread(target=_note, args=(found, name, function), daemon=True)
        for name, function in looks.items()
    ]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {name: found.get(name, {"error": f"no answer in {timeout_s:g} s"}) for name in looks}


def _note(found: dict[str, Facts], name: str, function: Callable[[], Facts]) -> None:
    try:
        found[name] = dict(function())
    except Exception as error:  # noqa: BLE001  (one look that fails is a finding, not an end)
        found[name] = {"error": brief(error)}


def brief(error: BaseException) -> str:
    """One line about an error, without what a store or a server put in its further lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, ResegError | BadImage) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def versions() -> dict[str, Any]:
    """Versions by package, None where one is missing; `code` is a digest of reseg's own files."""
    found: dict[str, Any] = {"python": platform.python_version(), "reseg": pipeline.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    digest = hashlib.sha256()
    root = Path(pipeline.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return {**found, "code": digest.hexdigest()[:12]}


def supported_ranges() -> dict[str, str]:
    """Versions that the installed reseg asks for, by package; empty if it is not installed."""
    try:
        described = metadata.metadata("reseg")
    except metadata.PackageNotFoundError:
        return {}
    asked = [Requirement(line) for line in described.get_all("Requires-Dist") or []]
    found = {item.name: str(item.specifier) for item in asked if item.name in PACKAGES}
    return {"python": described["Requires-Python"], **found}


def machine(spill_folder: str) -> dict[str, Any]:
    """Memory, shared memory, disk for spilling and open files; bytes, None where unknown."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory, available = _memory()
    shared = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    folder = _nearest(spill_folder or "/tmp")
    disk = shutil.disk_usage(folder)
    return {
        "memory_bytes": memory,
        "available_bytes": available,
        "shm_bytes": shared and shared.total,
        "spill_folder": folder,
        "disk_bytes": disk.total,
        "disk_free_bytes": disk.free,
        "files_soft": soft if soft != resource.RLIM_INFINITY else sys.maxsize,
        "files_hard": hard if hard != resource.RLIM_INFINITY else sys.maxsize,
    }


def _nearest(folder: str) -> str:
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _memory() -> tuple[int | None, int | None]:
    """Bytes in all and available, those of the container where it has fewer than the machine."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        total = int(lines["MemTotal"].split()[0]) << 10
        available = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None, None
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, available = min(total, limit), min(available, limit - used)
    return total, available


def gpus(timeout_s: float) -> dict[str, Any]:
    """Devices that torch sees, in a child: Ray hides them from tasks that ask for none.

    driver: version of NVIDIA's kernel module, None where there is none.
    """
    driver = None
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        driver = next(iter(re.findall(r"\d+\.\d+(?:\.\d+)?", text)), None)
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    try:
        child = subprocess.run(
            [sys.executable, "-c", _GPU_CHILD],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s - 1,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return {
            "driver": driver,
            "error": f"torch and its driver gave no answer in {timeout_s:g} s",
        }
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["it died without a word"])[-1][:200]
        return {"driver": driver, "error": f"torch cannot be used: {last}"}
    return {"driver": driver, **json.loads(child.stdout.splitlines()[-1])}


def decoder() -> dict[str, Any]:
    """Send one small picture through the sandbox. Raises BadImage, OSError, TimeoutError."""
    import numpy as np
    from PIL import Image

    from pipeline.sandbox import Sandbox

    wanted = np.arange(64, dtype=np.uint8).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(wanted).save(buffer, "PNG")
    started = time.monotonic()
    with Sandbox() as sandbox:
        (page,) = sandbox.decode(buffer.getvalue(), "mask")
    if not np.array_equal(page, wanted):
        raise RuntimeError("a picture came back with other pixels")
    return {"seconds": round(time.monotonic() - started, 3)}


def plant(location: str) -> Folder:
    """Leave a probe where the others can find it if the location is shared; see `unplant`."""
    folder = location if os.path.isdir(location) else os.path.dirname(location)
    if os.path.isfile(location):
        reason = "it is a file"
    elif not os.path.isdir(folder):
        reason = "it does not exist, nor does the folder that would hold it"
    else:
        token = f".reseg-probe-{secrets.token_hex(8)}"
        try:
            _leave(storage.join(folder, token), token)
            return Folder(location=location, folder=folder, token=token, is_new=folder != location)
        except OSError as error:
            reason = brief(error)
    return Folder(location=location, folder=folder, seen=_contents(location), failure=reason)


def _contents(location: str) -> str:
    """A hash of a folder's names, or of a file's size and beginning; empty if it cannot be read."""
    try:
        if os.path.isdir(location):
            with os.scandir(location) as entries:
                names = [entry.name for entry in islice(entries, _MAX_COMPARED_NAMES)]
            if len(names) == _MAX_COMPARED_NAMES:  # each machine may list another part of them
                return f"{_MAX_COMPARED_NAMES} names or more"
            return hashlib.sha256("\0".join(sorted(names)).encode(errors="replace")).hexdigest()
        with open(location, "rb") as file:
            head = file.read(_COMPARED_BYTES)
        return hashlib.sha256(f"{os.path.getsize(location)}\0".encode() + head).hexdigest()
    except OSError:
        return ""


def find_probe(folder: Folder, request: Request) -> dict[str, Any]:
    """Look for the driver's probe and answer with a file of one's own beside it.

    found: the probe, or what the location holds, is the same here. answered: a file was written.
    """
    if not folder.token:
        return {"found": bool(folder.seen) and _contents(folder.location) == folder.seen}
    probe = storage.join(folder.folder, folder.token)
    if not _appears(probe, folder.token.encode()):
        return {"found": False, "answered": False}
    try:
        _leave(f"{probe}-{request.answer}", folder.token)
    except OSError as error:
        return {"found": True, "answered": False, "failure": brief(error)}
    if not os.path.exists(probe):  # the driver has given up and swept: this comes too late
        storage.remove(f"{probe}-{request.answer}")
    return {"found": True, "answered": True}


def _leave(path: str, content: str) -> None:
    """Write under the final name at once: only what bears the probe's name is swept."""
    with open(path, "xb") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())


def answer_arrived(folder: Folder, answer: str) -> bool:
    """Whether the driver sees what a machine wrote beside the probe."""
    probe = storage.join(folder.folder, folder.token)
    return _appears(f"{probe}-{answer}", folder.token.encode())


def _appears(path: str, content: bytes) -> bool:
    deadline = time.monotonic() + _PROBE_WAIT_S
    while True:
        with suppress(OSError):
            if storage.read(path) == content:
                return True
        if time.monotonic() > deadline or not os.path.isdir(os.path.dirname(path)):
            return False
        time.sleep(0.5)


def unplant(folder: Folder) -> None:
    """Remove the probe and every answer to it that this machine sees."""
    if folder.token:
        with suppress(OSError):
            for name in os.listdir(folder.folder):
                if name.startswith(folder.token):
                    storage.remove(storage.join(folder.folder, name))


def probe_store(uri: str) -> dict[str, Any]:
    """Whether the store keeps its two promises, seen from here.

    denied instead: it answers and lists, but lets nobody write, as is right for a source. Refusals
    come without random names, so that the same one from many nodes is one finding.
    """
    try:
        found = storage.probe(uri)
    except ResegError as error:
        refusal = re.sub(r"/\.probe-[0-9a-f]+(/\w+)?", "", brief(error))
        # only ConfigError: a store that does not answer would be waited for twice
        return {"denied" if isinstance(error, ConfigError) and _lists(uri) else "error": refusal}
    return {
        "put_if_absent": found.put_if_absent,
        "read_after_write": found.read_after_write,
        "seconds": found.seconds,
    }


def _lists(uri: str) -> bool:
    with suppress(ResegError, OSError):
        return next(iter(storage.list_files(uri)), None) is not None
    return False


def store_clock() -> dict[str, Any]:
    """How far this machine's clock is ahead of the S3 endpoint's, by the Date of any answer."""
    endpoint = endpoint_of("s3")
    began = time.time()
    date = _get(endpoint or "https://s3.amazonaws.com", "/")[1]
    ended = time.time()
    if not date:
        raise OSError("its answers have no Date")
    theirs = parsedate_to_datetime(date).timestamp() + 0.5  # whole seconds, cut off
    return {
        "skew_s": (began + ended) / 2 - theirs,
        "uncertainty_s": (ended - began) / 2 + 0.5,
    }


def bundle_digest(location: str) -> dict[str, Any]:
    """The digest of a bundle whose files are right, as this machine reads them."""
    from pipeline.bundle import load_bundle

    return {"digest": load_bundle(location).digest[:16]}


def bundle_weights(location: str) -> dict[str, Any]:
    """The number of parameters of a bundle that loads whole and is finite."""
    from pipeline.bundle import load_bundle, verify_bundle

    return {"parameters": verify_bundle(load_bundle(location))}


def token_file() -> dict[str, Any]:
    """Where Ray's token lies and who may read it; mode None where there is no file."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    with suppress(OSError):
        return {"path": path, "mode": stat.S_IMODE(os.stat(os.path.expanduser(path)).st_mode)}
    return {"path": path, "mode": None}


def dashboard_statuses(url: str) -> dict[str, int]:
    """What the dashboard answers to somebody without a token: HTTP status by path."""
    return {path: _get(url, path)[0] for path in DASHBOARD_PATHS}


def _get(url: str, path: str) -> tuple[int, str]:
    """Status and Date of one plain GET; follows no redirect, sends no credentials."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_CONNECT_TIMEOUT_S)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Date", "")
    finally:
        connection.close()
