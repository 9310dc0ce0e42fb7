"""One process a folder: who works there, and whether that process still lives.

A convenience that saves double work; nothing that is published depends on it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pipeline import storage
from pipeline.errors import Busy, ResegError

LOCK_FILE = "lock.json"
_STALE_S = 180.0
_RENEW_S = 30.0


def take_lock(folder: str, doing: str = "training") -> None:
    """Make this process the only one that works in a folder. Raises Busy if another does.

    The lock names host and process. One of a process that is gone, or that has not shown itself for
    three minutes from another host, is taken over.
    """
    uri = storage.join(folder, LOCK_FILE)
    if storage.create(uri, _lock_text()):
        return
    try:
        other = json.loads(storage.read(uri))
        alive = _is_alive(other)
    except (OSError, ValueError, KeyError, TypeError):
        alive = False
    if alive:
        raise Busy(
            f"process {other['pid']} on {other['host']} is {doing} in {folder}; wait for it, or "
            f"delete {LOCK_FILE} there if it is gone"
        )
    storage.write(uri, _lock_text())


def show_life(folder: str) -> None:
    """Renew the lock, so that other hosts see that its process lives.

    Where that fails it is left for the next time: an outage is no reason to stop what is locked.
    """
    with suppress(OSError, ResegError):
        storage.write(storage.join(folder, LOCK_FILE), _lock_text())


def release_lock(folder: str) -> None:
    """Let others work in the folder, unless another has taken it over.

    Where that fails the lock becomes stale by itself.
    """
    uri = storage.join(folder, LOCK_FILE)
    with suppress(OSError, ValueError, ResegError):
        mine = json.loads(storage.read(uri))
        if (mine.get("host"), mine.get("pid")) == (socket.gethostname(), os.getpid()):
            storage.remove(uri)


@contextmanager
def locked(folder: str, doing: str) -> Iterator[None]:
    """Hold the lock of a folder, renewed from a thread. Raises Busy if another does."""
    take_lock(folder, doing)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEW_S):
            show_life(folder)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        release_lock(folder)


def _lock_text() -> bytes:
    return json.dumps(
        {"host": socket.gethostname(), "pid": os.getpid(), "seen": time.time()}
    ).encode()


def _is_alive(other: Mapping[str, Any]) -> bool:
    if time.time() - other["seen"] >= _STALE_S:
        return False  # whoever has its number now is somebody else
    if other["host"] != socket.gethostname():
        return True
    if other["pid"] == os.getpid():
        return False
    try:
        os.kill(other["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
