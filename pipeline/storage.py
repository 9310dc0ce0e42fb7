"""Bytes at a path or an `s3://` URI: list, read, write whole, create once.

A local path is served by the operating system, `s3://` by obstore (the store library inside
deltalake), configured by the AWS variables of the environment or the instance role, never by a
configuration file. Nothing else is reachable: other schemes are refused.
"""

import io
import os
import secrets
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, cast

from pipeline.errors import ConfigError, SourceError


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

    Raises ConfigError for a scheme other than `file` and `s3`, and for an S3 URI with query,
    credentials or `..` in it.
    """
    scheme, separator, rest = location.partition("://")
    if not separator:
        return os.path.abspath(os.path.expanduser(location))
    if scheme == "file":
        return os.path.abspath(rest)
    if scheme != "s3":
        raise ConfigError(f"{location!r}: the scheme {scheme!r} is not served; use a path or s3://")
    bucket, _, key = rest.partition("/")
    if not bucket or "@" in bucket or any(c in rest for c in "?#") or ".." in key.split("/"):
        raise ConfigError(f"{location!r} is not of the form s3://bucket/prefix")
    return f"s3://{bucket}/{key.strip('/')}".rstrip("/")


def is_remote(uri: str) -> bool:
    """Whether a resolved URI is in object storage."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`, for local paths and URIs alike; empty parts are left out."""
    return "/".join([uri.rstrip("/") or "/", *(part for part in parts if part)])


def list_files(uri: str) -> Iterator[FileInfo]:
    """All files below a folder, in no promised order.

    Raises SourceError if the folder does not exist or cannot be read.
    """
    if is_remote(uri):
        yield from _list_s3(uri)
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


def _list_s3(uri: str) -> Iterator[FileInfo]:
    import obstore

    bucket, prefix = _split(uri)
    start = f"{prefix}/" if prefix else ""
    try:
        for page in obstore.list(_store(bucket), prefix=prefix or None):
            for item in page:
                path = item["path"]
                if path.startswith(start) and path != start and not path.endswith("/"):
                    yield FileInfo(
                        path=path[len(start) :],
                        size=item["size"],
                        version=item["e_tag"] or f"{item['size']}-{item['last_modified']}",
                        modified_s=item["last_modified"].timestamp(),
                    )
    except Exception as error:  # noqa: BLE001  (obstore's errors share no public root)
        raise SourceError(f"cannot list {uri}: {_brief(error)}") from None


def file_info(uri: str) -> FileInfo | None:
    """Size and version of one file, or None where there is none."""
    if is_remote(uri):
        import obstore

        bucket, key = _split(uri)
        try:
            item = obstore.head(_store(bucket), key)
        except FileNotFoundError:
            return None
        return FileInfo(path="", size=item["size"], version=item["e_tag"] or str(item["size"]))
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
    """The whole file. Raises FileNotFoundError, or OSError with the store's reason."""
    if is_remote(uri):
        import obstore

        bucket, key = _split(uri)
        return bytes(obstore.get(_store(bucket), key).bytes())
    with open(uri, "rb") as file:
        return file.read()


def open_reader(uri: str) -> BinaryIO:
    """A seekable reader of one file."""
    if is_remote(uri):
        import obstore

        bucket, key = _split(uri)
        return cast(
            BinaryIO, io.BufferedReader(_RangeReader(obstore.open_reader(_store(bucket), key)))
        )
    return open(uri, "rb")


class _RangeReader(io.RawIOBase):
    """obstore's reader as a standard raw stream."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())

    def readinto(self, buffer: Any) -> int:
        data = bytes(self._reader.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)


def write(uri: str, data: bytes) -> None:
    """Write a file whole or not at all: temporary name and rename, or one PUT."""
    if is_remote(uri):
        import obstore

        bucket, key = _split(uri)
        obstore.put(_store(bucket), key, data)
        return
    temporary = _write_temporary(uri, data)
    os.replace(temporary, uri)
    _sync_folder(os.path.dirname(uri))


def create(uri: str, data: bytes) -> bool:
    """Write a file only if there is none; False if there is one already, which stays as it is."""
    if is_remote(uri):
        import obstore
        from obstore.exceptions import AlreadyExistsError

        bucket, key = _split(uri)
        try:
            obstore.put(_store(bucket), key, data, mode="create")
        except AlreadyExistsError:
            return False
        return True
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
        import obstore

        bucket, key = _split(uri)
        with suppress(FileNotFoundError):
            obstore.delete(_store(bucket), key)
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
        return next(iter(_list_s3(uri)), None) is None
    try:
        return not os.listdir(uri)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


@lru_cache(maxsize=32)
def _store(bucket: str) -> Any:
    """The bucket's client; obstore reads the AWS variables itself."""
    from obstore.store import S3Store

    plain_http = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return S3Store(bucket, client_options={"allow_http": True} if plain_http else None)


def _brief(error: BaseException) -> str:
    """The first line of a store's error; the rest may hold request headers."""
    text = (str(error).splitlines() or [""])[0][:200]
    return text or type(error).__name__
