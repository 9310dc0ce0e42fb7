"""Reading from object storage: ours against pyarrow's own S3 file system, in one run, as ratios.

A real store (SeaweedFS) on loopback, behind a proxy that makes each answer wait, since a store in a
data centre takes some 20 ms to its first byte and loopback takes none. Small files are read as
`reseg segment` reads a folder of pictures, a shard as a tar reader does, in order and in small pieces.

    python benchmarks/object_reading.py --wait-ms 20
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from fault_proxy import proxied
from object_store import KEY, SECRET, ObjectStore
from pyarrow.fs import S3FileSystem

from pipeline import objectstore, storage


def timed(work: Callable[[], int]) -> tuple[float, int]:
    started = time.monotonic()
    size = work()
    return time.monotonic() - started, size


def ours_small(uri: str, names: list[str]) -> int:
    tasks = (partial(storage.read, storage.join(uri, name)) for name in names)
    return sum(len(data) for data in storage.read_ahead(uri, tasks))


def theirs_small(files: S3FileSystem, place: str, names: list[str]) -> int:
    total = 0
    for name in names:
        with files.open_input_stream(f"{place}/{name}") as stream:
            total += len(stream.readall())
    return total


def in_pieces(file: object, piece: int = 64 << 10) -> int:
    total = 0
    while data := file.read(piece):  # type: ignore[attr-defined]
        total += len(data)
    return total


def ours_shard(uri: str) -> int:
    with storage.open_reader(uri) as file:
        return in_pieces(file)


def theirs_shard(files: S3FileSystem, place: str) -> int:
    with files.open_input_stream(place, buffer_size=1 << 20) as stream:
        return in_pieces(stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--kib", type=int, default=100, help="of each small file")
    parser.add_argument("--shard-mib", type=int, default=128)
    parser.add_argument("--wait-ms", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = ObjectStore(Path(folder) / "store").start()
        try:
            with proxied(store.endpoint) as proxy:
                os.environ.update(store.environment(proxy.endpoint))
                compare(options, store.make_bucket(), proxy)
        finally:
            store.kill()


def compare(options: argparse.Namespace, bucket: str, proxy: object) -> None:
    names = [f"{number:05d}" for number in range(options.files)]
    data = os.urandom(options.kib << 10)
    writes = (partial(objectstore.put, f"{bucket}/small/{name}", data) for name in names)
    list(storage.read_ahead(bucket, writes))
    storage.write(f"{bucket}/shard", os.urandom(options.shard_mib << 20))
    files = S3FileSystem(
        access_key=KEY,
        secret_key=SECRET,
        scheme="http",
        endpoint_override=os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"),
        region="us-east-1",
    )
    place = bucket.removeprefix("s3://")
    proxy.give(method="GET", wait_s=options.wait_ms / 1000, times=10**9)  # type: ignore[attr-defined]
    pairs = {
        f"{options.files} files of {options.kib} KiB": (
            partial(ours_small, f"{bucket}/small", names),
            partial(theirs_small, files, f"{place}/small", names),
        ),
        f"one shard of {options.shard_mib} MiB, in order": (
            partial(ours_shard, f"{bucket}/shard"),
            partial(theirs_shard, files, f"{place}/shard"),
        ),
    }
    for what, (ours, theirs) in pairs.items():
        ratios = []
        for _ in range(options.repeats):
            ours_s, size = timed(ours)
            theirs_s, expected = timed(theirs)
            assert size == expected
            ratios.append(theirs_s / ours_s)
            print(f"{what}: reseg {ours_s:.2f} s, pyarrow {theirs_s:.2f} s", flush=True)
        ratios.sort()
        print(f"{what}: {ratios[len(ratios) // 2]:.2f} times as fast as pyarrow (median)")


if __name__ == "__main__":
    main()
