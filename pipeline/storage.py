"""Bytes at a path or a URI: list, read, write whole, create once.

A local path is served by the operating system, `s3://`, `gs://` and `az://` by `objectstore`.
Nothing else is reachable: other schemes are refused.
"""

import fcntl
import io
import os
import re
import secrets
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import BinaryIO, TypeVar, cast

from pipeline import objectstore
from pipeline.errors import ConfigError, SourceError
from pipeline.objectstore import PUBLIC_VARIABLES, Changed, shown

T = TypeVar("T")

__all__ = ["PUBLIC_VARIABLES", "Changed", "shown"]

_HALF_A_URI = re.compile(r"(?:s3|gs|az|https?|file):/(?!/)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One listed file. `path` is relative to the listed folder, with `/`.

    version: etag, or size and mtime in nanoseconds. special: a FIFO, socket or device, which
    must never be opened. modified_s: seconds since 1970 by the clock of whoever stores it.
    """

    path: str
    size: int
    version: str
    special: bool = False
    modified_s: float = 0.0


def resolve(location: str) -> str:
    """The canonical form of a user's path or URI.

    Raises ConfigError for a scheme that is not served, an endpoint that must not be used, and for a
    URI with query, credentials or `..` in it.
    """
    if not location.strip():
        raise ConfigError("a path is empty (a variable that is not set?); . is the current folder")
    scheme, separator, rest = location.partition("://")
    if _HALF_A_URI.match(location):
        meant = shown(location.replace(":/", "://", 1))
        raise ConfigError(f"{shown(location)!r} is neither a path nor a URI; did you mean {meant}?")
    if not separator:
        return os.path.abspath(os.path.expanduser(location))
    if scheme == "file":
        return os.path.abspath(rest)
    objectstore.check_location(scheme, location)
    bucket, _, key = rest.partition("/")
    parts = key.strip("/").split("/")
    if not bucket or "@" in bucket or any(c in rest for c in "?#") or {"..", "."} & set(parts):
        raise ConfigError(f"{shown(location)!r} is not of the form {scheme}://bucket/prefix")
    if "" in parts[:-1]:
        raise ConfigError(f"{location!r} holds an empty folder name (//)")
    return f"{scheme}://{bucket}/{'/'.join(parts)}".rstrip("/")


def is_remote(uri: str) -> bool:
    """Whether a resolved URI is in object storage."""
    return "://" in uri


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`, for local paths and URIs alike; empty parts are left out."""
    return "/".join([uri.rstrip("/") or "/", *(part for part in parts if part)])


def expect(*uris: str) -> None:
    """Be patient with the stores of these places from the first question on.

    For workers: whoever sent them has reached the store, so it is not a wrong address.
    """
    for uri in uris:
        if is_remote(uri):
            objectstore.expect(uri)


def list_files(uri: str) -> Iterator[FileInfo]:
    """All files below a folder, in no promised order.

    Raises SourceError if the folder does not exist or cannot be read.
    """
    if is_remote(uri):
        yield from _list_remote(uri)
        return
    if os.path.isfile(uri):
        raise SourceError(f"{uri} is a file; wanted is a folder, or a .tar or .parquet file")
    if not os.path.isdir(uri):
        raise SourceError(f"{uri} is not a folder that exists")
    yield from _list_local(uri)


def _list_local(root: str) -> Iterator[FileInfo]:
    """Files of real folders first, then of linked ones; a folder reached before is not entered
    again, so a path does not depend on the order in which the disk lists its entries."""
    start = os.stat(root)
    seen = {(start.st_dev, start.st_ino)}
    folders, linked = [""], deque[str]()
    while folders or linked:
        prefix = folders.pop() if folders else linked.popleft()
        try:
            with os.scandir(os.path.join(root, prefix) if prefix else root) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            place = os.path.join(root, prefix)
            raise SourceError(f"cannot list {place}: {error.strerror}") from None
        for entry in entries:
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            try:
                info = entry.stat()
            except OSError:
                yield FileInfo(path=path, size=0, version="unreadable")
                continue
            if not stat.S_ISDIR(info.st_mode):
                special = not stat.S_ISREG(info.st_mode)
                version = _local_version(info)
                yield FileInfo(
                    path=path,
                    size=info.st_size,
                    version=version,
                    special=special,
                    modified_s=info.st_mtime,
                )
            elif entry.is_symlink():
                linked.append(path)
            else:
                seen.add((info.st_dev, info.st_ino))
                folders.append(path)
        while not folders and linked and _enter(root, linked[0], seen):
            linked.popleft()


def _enter(root: str, path: str, seen: set[tuple[int, int]]) -> bool:
    """Whether a linked folder was reached before; if not, it counts as reached from now on."""
    info = os.stat(os.path.join(root, path))
    key = (info.st_dev, info.st_ino)
    reached = key in seen
    seen.add(key)
    return reached


def _local_version(info: os.stat_result) -> str:
    return f"{info.st_size}-{info.st_mtime_ns}"


def _list_remote(uri: str) -> Iterator[FileInfo]:
    try:
        for item in objectstore.list_items(uri):
            yield _file_info(item)
    except PermissionError:
        raise SourceError(f"cannot list {uri}: the object store denies access") from None


def _file_info(item: objectstore.Item) -> FileInfo:
    return FileInfo(path=item.key, size=item.size, version=item.version, modified_s=item.modified_s)


def file_info(uri: str) -> FileInfo | None:
    """Size and version of one file, or None where there is none."""
    if is_remote(uri):
        item = objectstore.head(uri)
        return None if item is None else _file_info(item)
    try:
        info = os.stat(uri)
    except FileNotFoundError:
        return None
    return FileInfo(
        path="",
        size=info.st_size,
        version=_local_version(info),
        special=not stat.S_ISREG(info.st_mode),
        modified_s=info.st_mtime,
    )


def read(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError, or OSError with the reason."""
    if is_remote(uri):
        return objectstore.read(uri)
    with open(uri, "rb") as file:
        return file.read()


def read_version(uri: str, version: str) -> bytes:
    """The whole file, if it is still as it was listed. Raises Changed if not, or OSError."""
    if is_remote(uri):
        try:
            return objectstore.read(uri, version)
        except FileNotFoundError:
            raise Changed("gone") from None
    info = file_info(uri)
    if info is None or info.version != version:
        raise Changed("gone" if info is None else "another version")
    return read(uri)


def read_ahead(uri: str, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What tasks that read below `uri` return, in order; in object storage many at a time."""
    if is_remote(uri):
        yield from objectstore.fetch_ahead(iter(tasks))
    else:
        yield from (task() for task in tasks)


def open_reader(uri: str) -> BinaryIO:
    """A seekable reader of one file, in object storage of one version of it."""
    if is_remote(uri):
        item = objectstore.head(uri)
        if item is None:
            raise FileNotFoundError(2, "no such object", uri)
        reader = objectstore.RangeReader(uri, item.size, item.version)
        return cast(BinaryIO, io.BufferedReader(reader, buffer_size=256 << 10))
    return open(uri, "rb")


def write(uri: str, data: bytes) -> None:
    """Write a file whole or not at all: temporary name and rename, or one PUT."""
    if is_remote(uri):
        objectstore.put(uri, data)
        return
    temporary = _write_temporary(uri, data)
    os.replace(temporary, uri)
    _sync_folder(os.path.dirname(uri))


def create(uri: str, data: bytes) -> bool:
    """Write a file only if there is none; False if there is one already, which stays as it is.

    In object storage an equal file counts as ours: who must be told apart writes what does it.
    """
    if is_remote(uri):
        with exclusive(uri) as locked:
            if locked and (there := objectstore.head(uri)) is not None:
                return there.size == len(data) and objectstore.read(uri) == data
            return objectstore.put_new(uri, data)
    temporary = _write_temporary(uri, data)
    try:
        os.link(temporary, uri)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    _sync_folder(os.path.dirname(uri))
    return True


def _write_temporary(uri: str, data: bytes) -> str:
    """Write and sync `data` beside `uri`; the name starts with a dot and holds no secret."""
    folder = os.path.dirname(uri)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".tmp-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return temporary


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(uri: str) -> None:
    """Delete one file; a file that is not there is no error."""
    if is_remote(uri):
        objectstore.delete(uri)
        return
    with suppress(FileNotFoundError):
        os.unlink(uri)


def check_writable(uri: str) -> None:
    """Raise ConfigError unless files can be created below `uri`; leaves nothing behind."""
    if is_remote(uri):
        return
    folder = uri
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise ConfigError(f"{uri} cannot be a folder: {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{uri} is not writable: no permission in {folder}")


def is_folder(uri: str) -> bool:
    """Whether there is a local folder of this name; in object storage nothing is one."""
    return not is_remote(uri) and os.path.isdir(uri)


def is_empty(uri: str) -> bool:
    """Whether a folder is absent or holds nothing."""
    if is_remote(uri):
        return next(iter(_list_remote(uri)), None) is None
    try:
        return not os.listdir(uri)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


# What commits rest on


@contextmanager
def exclusive(uri: str) -> Iterator[bool]:
    """Hold the lock of a name in RESEG_STORE_LOCK, a folder that all machines share.

    False where no lock is configured: then the store itself must refuse the second writer, which
    `require_commits` proves. The lock goes with its process, however that ends.
    """
    folder = os.environ.get("RESEG_STORE_LOCK", "")
    if not folder or not is_remote(uri):
        yield False
        return
    name = sha256(uri.encode()).hexdigest()[:32]
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(os.path.join(folder, f"{name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"RESEG_STORE_LOCK={folder} cannot hold locks ({error.strerror}); it must be a folder "
            "that all machines share and may write to"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a place did when it was asked. seconds: what asking took."""

    put_if_absent: bool
    read_after_write: bool
    seconds: float


_RACERS = 8


def probe(uri: str) -> Probe:
    """Try on a few small files whether of several creators exactly one wins, and whether what was
    written is read and listed at once; leaves nothing behind.

    Raises ConfigError or StoreFailed if nothing can be written there.
    """
    started = time.monotonic()
    folder = join(uri, f".probe-{secrets.token_hex(8)}")
    one, many = join(folder, "one"), join(folder, "many")
    try:
        once = create(one, b"first") and not create(one, b"other") and read(one) == b"first"
        write(one, b"second")
        seen = read(one) == b"second" and [item.path for item in list_files(folder)] == ["one"]
        with ThreadPoolExecutor(_RACERS) as pool:
            texts = [b"racer %d" % number for number in range(_RACERS)]
            won = list(pool.map(lambda text: create(many, text), texts))
        alone = sum(won) == 1 and read(many) == texts[won.index(True)]
        for name in (one, many):
            remove(name)
    except OSError as error:
        raise ConfigError(
            f"{uri} cannot hold results: {error.strerror or error}; reading, writing, listing and "
            "deleting are needed there"
        ) from None
    finally:
        if not is_remote(uri):
            with suppress(OSError):
                os.rmdir(folder)
    return Probe(
        put_if_absent=once and alone,
        read_after_write=seen,
        seconds=time.monotonic() - started,
    )


def require_commits(uri: str) -> None:
    """Refuse a place in object storage where two commits could both seem to succeed.

    Raises ConfigError.
    """
    if not is_remote(uri):
        return
    found = probe(uri)
    if not found.put_if_absent:
        raise ConfigError(
            f"the object store of {uri} lets a second writer replace a file that must be created "
            "once (it does not keep If-None-Match), so two runs could overwrite each other's night; "
            "set RESEG_STORE_LOCK to a folder that all machines share, or use another store"
        )
    if not found.read_after_write:
        raise ConfigError(
            f"the object store of {uri} does not show at once what was written, so a night could be "
            "published with parts missing; use another store"
        )
