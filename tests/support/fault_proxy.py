"""A proxy in front of a real store that loses answers, cuts bodies, waits and refuses, as it is told.

Faults are taken in the order in which they were given, each for so many requests; what no fault matches
is passed on untouched. The `Host` of the client travels on, so signatures stay right.
"""

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(kw_only=True)
class Fault:
    """What happens to the next `times` requests that match.

    refuse: answer with this status (and S3 error code, or body, with the first
    key that was asked about for {key}) without passing the request on. lose: pass it on,
    then reset the connection instead of answering. drop: reset at once. cut: send only so many bytes
    of the answer's body. wait_s: before the answer's first byte. without: request headers
    that do not travel on, as with a gateway that does not know them.
    """

    method: str = ".*"
    path: str = ".*"
    header: str | None = None
    times: int = 1
    skip: int = 0
    refuse: int | None = None
    code: str = "InternalError"
    body: str = ""
    lose: bool = False
    drop: bool = False
    cut: int | None = None
    wait_s: float = 0.0
    without: tuple[str, ...] = ()
    seen: int = field(default=0, init=False)

    def takes(self, handler: BaseHTTPRequestHandler) -> bool:
        """Whether this request is one of those; counts it."""
        if self.times <= 0 or not re.fullmatch(self.method, handler.command):
            return False
        if not re.search(self.path, handler.path):
            return False
        if self.header is not None and handler.headers.get(self.header) is None:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        self.seen += 1
        return True


class FaultProxy:
    """The proxy: `endpoint` for clients, `faults` to be given, `requests` as they came."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that went away is what is being tested."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def give(self, **values: object) -> Fault:
        """Add a fault; how often it struck is in its `seen`."""
        fault = Fault(**values)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def fault_for(self, handler: BaseHTTPRequestHandler) -> Fault | None:
        """The first fault that takes a request, which is noted."""
        with self._lock:
            self.requests.append((handler.command, handler.path))
            return next((fault for fault in self.faults if fault.takes(handler)), None)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def _handle(self) -> None:
        fault = self.owner.fault_for(self) or Fault(times=0)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault.drop:
            return self._reset()
        if fault.refuse is not None:
            time.sleep(fault.wait_s)
            asked = re.search(rb"<Key>(.*?)</Key>", body)
            told = fault.body.replace("{key}", asked.group(1).decode() if asked else "")
            text = told or f"<Error><Code>{fault.code}</Code><Message>told</Message></Error>"
            return self._answer(fault.refuse, [("Content-Type", "application/xml")], text.encode())
        status, headers, data = self._forward(body, fault.without)
        if fault.lose:
            return self._reset()
        time.sleep(fault.wait_s)
        return self._answer(status, headers, data, cut=fault.cut)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def _forward(
        self, body: bytes, without: tuple[str, ...]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.owner.upstream, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            gone = {name.lower() for name in without}
            for name, value in self.headers.items():
                if name.lower() not in gone:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            headers = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("transfer-encoding", "connection")
            ]
            return answer.status, headers, answer.read()
        except OSError:
            return 503, [], b"<Error><Code>SlowDown</Code></Error>"
        finally:
            connection.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, cut: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        length = {n.lower(): v for n, v in headers}.get("content-length")
        size = length if self.command == "HEAD" and length else str(len(data))
        self.send_header("Content-Length", size)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self._reset()

    def _reset(self) -> None:
        """End the connection as a crash does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextmanager
def proxied(upstream: str) -> Iterator[FaultProxy]:
    """A proxy for the duration of a test."""
    proxy = FaultProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
