"""Objects in S3, Google Cloud Storage and Azure, through obstore: what `storage` does with a URI.

Endpoint, region and credentials come from the environment, or from the role of the machine; never
from a configuration file. Every operation here may be repeated without harm, and is, with growing
pauses, until the store answers or patience ends: then it is a StoreFailed, whatever the reason, so
that an outage is never taken for a missing or a damaged file.
"""

import ipaddress
import math
import os
import random
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from io import RawIOBase
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import ConfigError, StoreFailed

if TYPE_CHECKING:
    from obstore import GetOptions

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az")
"""Amazon S3 and what speaks its language, Google Cloud Storage, Azure Blob Storage."""

PUBLIC_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ENDPOINT",
    "RESEG_SCHEMES",
    "RESEG_STORE_LOCK",
    "RESEG_STORE_PATIENCE_S",
)
"""Variables that say where a store is and hold no secret: workers get them from the driver."""

_RANGE_BYTES = 8 << 20
_RANGES_AHEAD = 4
_PATIENCE_S, _FIRST_PATIENCE_S = 300.0, 12.0
_REQUEST_S = 60
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 8.0
_NOT_SHOWN = re.compile(r"//[^/]*@|[?#].*", re.DOTALL)
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_STATUS = re.compile(r"\b([1-5][0-9]{2}) [A-Z][A-Za-z]")
_CREDENTIALS = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "AuthenticationFailed",
    }
)
_LASTING = frozenset({"InvalidBucketName", "PermanentRedirect", "NotImplemented"})
_KNOWN = re.compile(rf"\b({'|'.join((*sorted(_CREDENTIALS), 'AccessDenied', 'SlowDown'))})\b")
"""An answer about several objects names the codes of each in words of its own."""
_NO_CREDENTIALS = (
    "MissingSecretAccessKey",
    "MissingAccessKeyId",
    "MissingAccount",
    "169.254.169.254",
)
"""The last is the metadata service, which is asked where the environment says nothing."""

_reached: set[str] = set()


class Changed(OSError):
    """The object is no longer the version that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One object as the store lists it. modified_s: seconds since 1970 by the store's clock."""

    key: str
    size: int
    version: str
    modified_s: float


def split(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket (or container) and key of a resolved URI."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def shown(location: str) -> str:
    """A location for a message: without credentials, or a query that might be a signature."""
    return _NOT_SHOWN.sub(lambda found: "//***@" if found[0].startswith("//") else "?***", location)


def check_location(scheme: str, location: str) -> None:
    """Refuse a scheme that is not served, and an endpoint that is no place for images.

    Raises ConfigError.
    """
    allowed = os.environ.get("RESEG_SCHEMES", ",".join(SCHEMES)).replace(" ", "").split(",")
    if scheme not in SCHEMES or scheme not in allowed:
        served = ", ".join(f"{name}://" for name in SCHEMES if name in allowed)
        raise ConfigError(
            f"{shown(location)!r}: the scheme {scheme!r} is not served; use a path"
            + (f" or {served}" if served else "; RESEG_SCHEMES allows no other")
        )
    endpoint = endpoint_of(scheme)
    if endpoint:
        _check_endpoint(endpoint)


def endpoint_of(scheme: str) -> str:
    """The address that the environment gives a kind of store; empty for the provider's own."""
    names = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "az": ("AZURE_STORAGE_ENDPOINT",)}
    return next((os.environ[name] for name in names.get(scheme, ()) if os.environ.get(name)), "")


@lru_cache(maxsize=8)
def _check_endpoint(endpoint: str) -> None:
    """Link-local addresses hold the machine's own credentials; a name may lead there too."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"the endpoint {shown(endpoint)!r} is not of the form https://host[:port]"
        )
    if parts.query or parts.fragment:
        raise ConfigError(
            f"the endpoint of {parts.hostname} ends in a query; leave out what follows ?"
        )
    if parts.username or parts.password:
        raise ConfigError(
            f"the endpoint of {parts.hostname} holds a user name; credentials belong in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, None)}
    except OSError:
        return  # whoever calls it will be told that nothing answers
    for address in found:
        if ipaddress.ip_address(str(address).partition("%")[0]).is_link_local:
            raise ConfigError(
                f"the endpoint {parts.hostname} is the link-local address {address}, which is "
                "where a machine keeps its own credentials; images are not read from there"
            )


@lru_cache(maxsize=32)
def _store(scheme: str, bucket: str, patient: bool = False) -> Any:
    """The client of a bucket. Its own retries are few, since `_persist` has the patience; but a
    listing under way can only be gone on with by the client itself."""
    from obstore.store import AzureStore, GCSStore, S3Store

    endpoint = endpoint_of(scheme)
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=_REQUEST_S),
    }
    if endpoint.startswith("http://"):
        options["allow_http"] = True
    settings: dict[str, Any] = {
        "client_options": options,
        "retry_config": {
            "max_retries": 100 if patient else 2,
            "retry_timeout": timedelta(seconds=_patience_s(bucket)),
        },
    }
    if scheme == "s3":
        if endpoint:
            settings["endpoint"] = endpoint
        return S3Store(bucket, **settings)
    return (GCSStore if scheme == "gs" else AzureStore)(bucket, **settings)


def expect(uri: str) -> None:
    """Count a store as one that has answered before."""
    _reached.add(split(uri)[1])


def forget_clients() -> None:
    """Make clients anew from the environment as it is now."""
    _store.cache_clear()
    _check_endpoint.cache_clear()
    _reached.clear()


def storage_options(uri: str) -> dict[str, str]:
    """The same settings for the library that writes the tables' log."""
    scheme, bucket, _ = split(uri)
    endpoint = endpoint_of(scheme)
    options = {
        "timeout": f"{_REQUEST_S}s",
        "max_retries": "100",
        "retry_timeout": f"{_patience_s(bucket):.0f}s",
    }
    if endpoint and scheme == "s3":
        options["AWS_ENDPOINT_URL"] = endpoint
    if endpoint.startswith("http://"):
        options["AWS_ALLOW_HTTP" if scheme == "s3" else "allow_http"] = "true"
    return options


# Patience


def _patience_s(bucket: str) -> float:
    """Long for a store that has answered before, short for one that may be a misspelt address."""
    told = os.environ.get("RESEG_STORE_PATIENCE_S", "")
    if not told:
        return _PATIENCE_S if bucket in _reached else _FIRST_PATIENCE_S
    try:
        seconds = float(told)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"RESEG_STORE_PATIENCE_S is {told!r}; it is a number of seconds above 0")
    return seconds


def _persist(what: str, uri: str, ask: Callable[[Any, str], T]) -> T:
    """`ask` the store about a key until it answers.

    Raises FileNotFoundError, PermissionError or Changed where that is the answer, StoreFailed where
    there is none.
    """
    scheme, bucket, key = split(uri)
    started, pause, renewed = time.monotonic(), _FIRST_PAUSE_S, False
    while True:
        try:
            answer = ask(_store(scheme, bucket), key)
        except FileNotFoundError as error:
            _reached.add(bucket)
            if "NoSuchBucket" in str(error):
                raise _no_bucket(uri) from None
            raise
        except Exception as error:  # noqa: BLE001  (obstore's errors share no public root)
            reason = _reason(error)
            if reason.credentials and not renewed:
                _store.cache_clear()
                renewed = True
                continue
            _raise_lasting(reason, error, what, uri)
            waited_s = time.monotonic() - started
            if waited_s + pause > _patience_s(bucket):
                raise StoreFailed(_no_answer(what, uri, reason, waited_s)) from None
        else:
            _reached.add(bucket)
            return answer
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reason:
    """Why a request failed: the store's own code, the status, or the kind of error.

    credentials: they are refused. none_found: there are none.
    """

    text: str
    code: str
    credentials: bool
    none_found: bool


def _reason(error: BaseException) -> _Reason:
    """What a library's error says, without the rest of it, which may hold request headers."""
    text = str(error)
    code = next(iter([*_CODE.findall(text), *_KNOWN.findall(text)]), "")
    status = next(iter(_STATUS.findall(text)), "")
    kind = type(error).__name__
    if not code and not status:
        lowered = text.lower()
        known = ("connect", "timed out", "timeout", "credential", "body", "dns", "closed")
        word = next((word for word in known if word in lowered), "")
        code = {"connect": "no connection", "body": "the answer broke off"}.get(word, word)
    return _Reason(
        text=" ".join(part for part in (status, code) if part) or kind,
        code=code,
        credentials=code in _CREDENTIALS or kind == "UnauthenticatedError",
        none_found=any(sign in text for sign in _NO_CREDENTIALS),
    )


def _raise_lasting(reason: _Reason, error: BaseException, what: str, uri: str) -> None:
    """Raise what will not get better by asking again."""
    kind = type(error).__name__
    if kind == "PreconditionError":
        raise Changed(f"{uri} is another version") from None
    if reason.credentials:
        raise StoreFailed(
            f"the object store refuses the credentials ({reason.text}) at {what} {uri}; renew them "
            "in the environment or in the machine's role, then give the same command again"
        ) from None
    is_first = split(uri)[1] not in _reached  # else the role's service has a bad minute
    if reason.none_found and is_first:
        raise ConfigError(
            f"there are no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for "
            "Azure AZURE_STORAGE_ACCOUNT_NAME and _KEY), or give the machine a role"
        ) from None
    if kind == "PermissionDeniedError" or reason.code == "AccessDenied":
        raise PermissionError(13, f"the object store denies {what} to this key or role", uri)
    if kind == "InvalidPathError":
        raise ConfigError(
            f"an object below {uri} has a name that cannot be read: {_invalid_path(error)}; rename it"
        ) from None
    if reason.code == "NoSuchBucket":
        raise _no_bucket(uri) from None
    if reason.code in _LASTING or kind == "UnknownConfigurationKeyError":
        raise ConfigError(f"the object store refuses {what} {uri}: {reason.text}") from None


def _no_bucket(uri: str) -> ConfigError:
    return ConfigError(
        f"there is no bucket {split(uri)[1]!r} for {uri}; are its name, the endpoint and the region "
        "right?"
    )


def _invalid_path(error: BaseException) -> str:
    found = re.search(r'Error parsing Path "(.*?)": ', str(error), re.DOTALL)
    return repr(found.group(1) if found else str(error).partition("\n")[0])


def _no_answer(what: str, uri: str, reason: _Reason, waited_s: float) -> str:
    scheme, bucket, _ = split(uri)
    where = endpoint_of(scheme) or f"the provider of {scheme}://"
    return (
        f"the object store at {where} did not serve {what} {uri} in {waited_s:.0f} s "
        f"({reason.text}); is the address right, and the bucket {bucket!r} there? "
        "RESEG_STORE_PATIENCE_S sets how long to go on; what is done is kept"
    )


# Objects


def list_items(uri: str) -> Iterator[Item]:
    """Objects below a prefix, as the store gives them: a page of some 1,000 at a time.

    Without the empty objects that consoles write to show folders. Raises PermissionError, ConfigError or
    StoreFailed; nothing to list is no error.
    """
    held: Item | None = None
    for item in _list_all(uri):
        if held is not None and not item.key.startswith(f"{held.key}/"):
            yield held
        held = item if item.size == 0 else None
        if held is None:
            yield item
    if held is not None:
        yield held


def _list_all(uri: str) -> Iterator[Item]:
    import obstore

    scheme, bucket, prefix = split(uri)
    start = f"{prefix}/" if prefix else ""
    where = start or None
    _persist("listing", uri, lambda store, key: next(iter(obstore.list(store, where)), None))
    pages = obstore.list(_store(scheme, bucket, patient=True), where, chunk_size=1000)
    while True:
        try:
            page = next(pages, None)
        except Exception as error:  # noqa: BLE001  (obstore's errors share no public root)
            reason = _reason(error)
            _raise_lasting(reason, error, "listing", uri)
            raise StoreFailed(_no_answer("listing", uri, reason, _patience_s(bucket))) from None
        if page is None:
            return
        for entry in page:
            if entry["path"] != prefix:  # what a console writes to show an empty folder
                yield _item(entry["path"][len(start) :], entry)


def _item(key: str, entry: Any) -> Item:
    modified: datetime = entry["last_modified"]
    version = entry["e_tag"] or f"{entry['size']}-{modified}"
    return Item(key=key, size=entry["size"], version=version, modified_s=modified.timestamp())


def head(uri: str) -> Item | None:
    """One object, or None where there is none."""
    import obstore
    from obstore.exceptions import PermissionDeniedError

    def ask(store: Any, key: str) -> Any:
        try:
            return obstore.head(store, key)
        except PermissionDeniedError:
            obstore.get_range(store, key, start=0, length=1)  # its answer has a body that says why
            raise

    try:
        return _item("", _persist("looking at", uri, ask))
    except FileNotFoundError:
        return None


def read(uri: str, version: str | None = None) -> bytes:
    """A whole object; a large one by ranges side by side, all of one version.

    version: as listed. Raises FileNotFoundError, PermissionError, or Changed if it is not that
    version, or another before the last range came.
    """
    data, size, version = _persist("reading", uri, lambda store, key: _start(store, key, version))
    return b"".join(_ranges(uri, 0, size, version)) if data is None else data


def _start(store: Any, key: str, version: str | None) -> tuple[bytes | None, int, str | None]:
    """Bytes, size and version of an object; no bytes of a large one."""
    import obstore

    answer = obstore.get(store, key, options=_of_version(version))
    size, found = answer.meta["size"], answer.meta["e_tag"]
    if size > _RANGE_BYTES:
        return None, size, found
    data = bytes(answer.bytes())
    _check_whole(data, size)
    return data, size, found


def _of_version(version: str | None) -> "GetOptions":
    """The condition under which a store answers with this version or not at all."""
    return {"if_match": version} if version and version[:1] == '"' else {}


def _check_whole(data: bytes, size: int) -> None:
    if len(data) != size:
        raise ConnectionError("the answer's body broke off")


def _ranges(uri: str, start: int, end: int, version: str | None) -> Iterator[bytes]:
    """Consecutive ranges of one object, some of them on their way while one is used."""
    offsets = iter(range(start, end, _RANGE_BYTES))
    ahead: deque[Future[bytes]] = deque()
    while True:
        while len(ahead) < _RANGES_AHEAD and (offset := next(offsets, None)) is not None:
            length = min(_RANGE_BYTES, end - offset)
            ahead.append(_fetchers("range").submit(_range, uri, offset, length, version))
        if not ahead:
            return
        yield ahead.popleft().result()


def _range(uri: str, start: int, length: int, version: str | None) -> bytes:
    """Bytes of one object of one version."""
    import obstore

    def ask(store: Any, key: str) -> bytes:
        options: GetOptions = {**_of_version(version), "range": (start, start + length)}
        data = bytes(obstore.get(store, key, options=options).bytes())
        _check_whole(data, length)
        return data

    return _persist("reading", uri, ask)


_pool_lock = threading.Lock()
_pools: dict[tuple[int, str], ThreadPoolExecutor] = {}


def _fetchers(kind: str) -> ThreadPoolExecutor:
    """Threads of this process that fetch. Files wait for their ranges, so each kind has its own."""
    key = (os.getpid(), kind)
    with _pool_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(16, thread_name_prefix=f"fetch-{kind}")
        return _pools[key]


def fetch_ahead(tasks: Iterator[Callable[[], T]], depth: int = 32) -> Iterator[T]:
    """What tasks return, in their order, up to `depth` of them on their way."""
    ahead: deque[Future[T]] = deque()
    for task in tasks:
        ahead.append(_fetchers("file").submit(task))
        if len(ahead) >= depth:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


class RangeReader(RawIOBase):
    """A seekable reader of one version of an object.

    Small reads here and there ask for what they want and no more; once reads follow each other,
    the ranges that come next are fetched ahead.
    """

    def __init__(self, uri: str, size: int, version: str | None) -> None:
        self._uri, self._size, self._version = uri, size, version
        self._position = 0
        self._held, self._held_at = b"", 0
        self._coming: Iterator[bytes] | None = None
        self._in_a_row = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._size)[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        if not self._held_at <= self._position < self._held_at + len(self._held):
            self._fetch(wanted)
        start = self._position - self._held_at
        data = self._held[start : start + wanted]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, wanted: int) -> None:
        """Hold the bytes at the position."""
        follows = self._position == self._held_at + len(self._held)
        self._in_a_row = self._in_a_row + 1 if follows else 0
        if not follows:
            self._coming = None
        if self._coming is None and self._in_a_row >= 2:
            self._coming = _ranges(self._uri, self._position, self._size, self._version)
        if self._coming is not None:
            self._held = next(self._coming)
        else:
            self._held = _range(self._uri, self._position, wanted, self._version)
        self._held_at = self._position


def put(uri: str, data: bytes) -> None:
    """Write an object whole, in place of any other."""
    import obstore

    _persist("writing", uri, lambda store, key: obstore.put(store, key, data))


def put_new(uri: str, data: bytes) -> bool:
    """Write an object only if there is none; False if another is there, which stays.

    After any doubt (a lost answer, a conflict) the object is looked at: equal bytes are ours. So
    writers who must be told apart write what tells them apart.
    """
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    def ask(store: Any, key: str) -> bool:
        try:
            obstore.put(store, key, data, mode="create")
        except Exception as error:  # noqa: BLE001  (whatever it was, the store knows)
            try:
                there = bytes(obstore.get(store, key).bytes())
            except FileNotFoundError:
                if isinstance(error, AlreadyExistsError | PreconditionError):
                    raise ConnectionError("409 Conflict with a writer that left nothing") from None
                raise error from None
            return there == data
        return True

    return _persist("creating", uri, ask)


def delete(uri: str) -> None:
    """Delete an object; one that is not there is no error."""
    import obstore

    try:
        _persist("deleting", uri, lambda store, key: obstore.delete(store, key))
    except FileNotFoundError:
        return
