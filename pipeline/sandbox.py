"""Decoding in a child process: what crashes, hangs or swells there costs one image.

The child has a memory limit, no core dump and no shell; the parent gives each image a time
limit. Requests go through a pipe, pixels come back through a shared file (in `/dev/shm` where
there is one), so they are copied once. A child that dies or hangs is replaced; the image it was
on is tried once more in a fresh child, since the blame may lie with the machine, and then
becomes DecoderCrashed or DecoderTimeout.
"""

import json
import mmap
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt

from pipeline.errors import BadImage, ErrorClass

Kind = Literal["image", "mask"]

_HEADER = struct.Struct("<cQ")
_LENGTH = struct.Struct("<I")
_START_TIMEOUT_S = 60.0
_ATTEMPTS = 2

_CHILD = (
    "import sys; sys.path[:0] = [sys.argv[1]]; "
    "from pipeline.sandbox import serve; serve(*map(int, sys.argv[2:]))"
)


class Sandbox:
    """One decoder child, started on first use. Not thread-safe: one thread each."""

    def __init__(
        self,
        *,
        max_pixels: int = 1 << 26,
        timeout_s: float = 30.0,
        memory_bytes: int = 4 << 30,
        child: str = _CHILD,
    ) -> None:
        self._max_pixels = max_pixels
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._child = child
        self._process: subprocess.Popen[bytes] | None = None
        self._pixels: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def decode(self, data: bytes, kind: Kind) -> list[npt.NDArray[Any]]:
        """Decode one picture: "image" gives arrays HWC, "mask" raw values HW, one a page.

        Raises BadImage.
        """
        failure = BadImage(ErrorClass.DECODER_CRASHED, "the decoder died on it")
        for _ in range(_ATTEMPTS):
            try:
                return self._exchange(data, kind)
            except TimeoutError:
                self.close()
                message = f"decoding took longer than {self._timeout_s:g} s"
                failure = BadImage(ErrorClass.DECODER_TIMEOUT, message)
            except (EOFError, BrokenPipeError):
                self.close()
                failure = BadImage(ErrorClass.DECODER_CRASHED, "the decoder died on it")
        raise failure

    def close(self) -> None:
        """End the child; the next `decode` starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()
            self._process = None
        if self._pixels is not None:
            self._pixels.close()
            self._pixels = None

    def _exchange(self, data: bytes, kind: Kind) -> list[npt.NDArray[Any]]:
        if self._process is None:
            self._start()
        deadline = time.monotonic() + self._timeout_s
        self._send(_HEADER.pack(kind[0].encode(), len(data)), deadline)
        self._send(data, deadline)
        answer = json.loads(self._receive(deadline))
        if "error_class" in answer:
            raise BadImage(ErrorClass(answer["error_class"]), answer["message"])
        return self._copy_pages(answer["pages"], answer["size"])

    def _start(self) -> None:
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._pixels = cast(IO[bytes], tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        descriptor = self._pixels.fileno()
        root = str(Path(__file__).resolve().parent.parent)
        limits = [str(descriptor), str(self._max_pixels), str(self._memory_bytes)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._child, root, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[descriptor],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            bufsize=0,
        )
        os.set_blocking(self._stream("stdin").fileno(), False)
        self._receive(time.monotonic() + _START_TIMEOUT_S)

    def _stream(self, name: str) -> IO[bytes]:
        return cast(IO[bytes], getattr(self._process, name))

    def _send(self, data: bytes, deadline: float) -> None:
        stream = self._stream("stdin").fileno()
        view = memoryview(data)
        while view:
            _, ready, _ = select.select([], [stream], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            view = view[os.write(stream, view[: 1 << 20]) :]

    def _receive(self, deadline: float) -> bytes:
        (length,) = _LENGTH.unpack(self._receive_exactly(_LENGTH.size, deadline))
        return self._receive_exactly(length, deadline)

    def _receive_exactly(self, size: int, deadline: float) -> bytes:
        stream = self._stream("stdout").fileno()
        data = b""
        while len(data) < size:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(stream, size - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def _copy_pages(self, pages: list[dict[str, Any]], size: int) -> list[npt.NDArray[Any]]:
        if size == 0 or self._pixels is None:
            raise BadImage(ErrorClass.CORRUPT_IMAGE, "the picture has no pixels")
        with mmap.mmap(self._pixels.fileno(), size, access=mmap.ACCESS_READ) as view:
            return [
                np.frombuffer(view, page["dtype"], int(np.prod(page["shape"])), page["offset"])
                .reshape(page["shape"])
                .copy()
                for page in pages
            ]


def serve(descriptor: int, max_pixels: int, memory_bytes: int) -> None:
    """The child's loop: read a request, decode, write the pixels to `descriptor`, answer."""
    import resource

    from pipeline.images import decode_image, decode_mask

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _answer(answers, {})
    while header := requests.read(_HEADER.size):
        kind, length = _HEADER.unpack(header)
        try:
            data = requests.read(length)
            pages = (
                decode_image(data, max_pixels) if kind == b"i" else decode_mask(data, max_pixels)
            )
            _answer(answers, _write_pages(descriptor, pages))
        except BadImage as error:
            _answer(answers, {"error_class": error.error_class, "message": error.message})
        except MemoryError:
            message = "decoding needs more memory than allowed"
            _answer(answers, {"error_class": ErrorClass.IMAGE_TOO_LARGE, "message": message})


def _write_pages(descriptor: int, pages: list[npt.NDArray[Any]]) -> dict[str, Any]:
    described, offset, end = [], 0, 0
    for page in pages:
        data = np.ascontiguousarray(page)
        view = memoryview(data.reshape(-1).view(np.uint8).data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
        described.append(
            {"shape": data.shape, "dtype": data.dtype.str, "offset": offset - data.nbytes}
        )
        end = offset
        offset += -offset % 16
    return {"pages": described, "size": end}


def _answer(stream: IO[bytes], value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()
