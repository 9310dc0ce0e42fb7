"""Listing a source of a million pictures in object storage: ours against pyarrow's, in one run.

    python benchmarks/object_listing.py [--keys 1000000] [--wait-ms 20]

A server on loopback makes up the pages of a bucket (1,000 keys each, as S3's), so nothing is stored
and no store is measured; each page waits as long as a store in a data centre would take. Measured are
the bare listing, what `reseg plan` makes of it (cases, slices, shards and their versions), and pyarrow's
listing of the same bucket. Each runs in a process of its own; its peak memory has the interpreter
and the imports in it.
"""

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from pipeline import storage
from pipeline.config import LimitsConfig, SourceConfig
from pipeline.formats import FORMATS, open_source
from pipeline.telemetry import format_table

BUCKET = "archive"
PAGE_KEYS = 1000
SLICES_A_CASE = 20
SPAWN = multiprocessing.get_context("spawn")
HEAD = '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>archive</Name>'
ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>2026-11-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;{number:032x}&quot;</ETag><Size>100000</Size></Contents>"
)


def key_of(number: int) -> str:
    return f"images/case-{number // SLICES_A_CASE:07d}/slice_{number % SLICES_A_CASE:03d}.png"


def serve(num_keys: int, wait_s: float, port_of: "multiprocessing.SimpleQueue[int]") -> None:
    """Answer ListObjectsV2 for ever; a page's token is the number of its first key."""

    class Pages(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            asked = parse_qs(urlsplit(self.path).query)
            first = int(asked.get("continuation-token", ["0"])[0])
            size = min(PAGE_KEYS, int(asked.get("max-keys", [PAGE_KEYS])[0]))
            last = min(first + size, num_keys)
            more = last < num_keys
            token = f"<NextContinuationToken>{last}</NextContinuationToken>" if more else ""
            entries = (ENTRY.format(key=key_of(n), number=n) for n in range(first, last))
            text = (
                f"{HEAD}<KeyCount>{last - first}</KeyCount><IsTruncated>{str(more).lower()}"
                f"</IsTruncated>{token}{''.join(entries)}</ListBucketResult>"
            )
            body = text.encode()
            time.sleep(wait_s)
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: a thousand pages would be a thousand lines."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    port_of.put(server.server_port)
    server.serve_forever()


def list_bare() -> str:
    count = sum(1 for _ in storage.list_files(f"s3://{BUCKET}/images"))
    return f"{count:,} keys"


def list_as_plan() -> str:
    source = open_source(
        f"s3://{BUCKET}/images", SourceConfig(images="{case}/{slice}.png"), LimitsConfig()
    )
    told: list[int] = []
    shards = FORMATS[source.format].list_shards(source, told.append).shards
    return f"{len(shards):,} shards, progress told {len(told):,} times"


def list_with_pyarrow() -> str:
    from pyarrow.fs import FileSelector, S3FileSystem

    files = S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
    found = files.get_file_info(FileSelector(f"{BUCKET}/images", recursive=True))
    return f"{sum(info.is_file for info in found):,} keys"


def measured(work: Callable[[], str]) -> tuple[float, float, float, str]:
    started, cpu = time.monotonic(), time.process_time()
    note = work()
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return time.monotonic() - started, time.process_time() - cpu, peak_mib, note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--wait-ms", type=float, default=20.0)
    options = parser.parse_args()
    port_of = SPAWN.SimpleQueue()
    arguments = (options.keys, options.wait_ms / 1000, port_of)
    server = SPAWN.Process(target=serve, args=arguments, daemon=True)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port_of.get()}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_REGION": "us-east-1",
    }
    rows: list[dict[str, str]] = []
    peer_s = 0.0
    for work in (list_with_pyarrow, list_bare, list_as_plan):
        with ProcessPoolExecutor(1, SPAWN) as pool:
            wall_s, cpu_s, peak_mib, note = pool.submit(measured, work).result()
        peer_s = peer_s or wall_s
        rows.append(
            {
                "what": work.__name__,
                "wall s": f"{wall_s:.1f}",
                "pyarrow's wall / this": f"{peer_s / wall_s:.2f}",
                "cpu s": f"{cpu_s:.1f}",
                "peak MiB": f"{peak_mib:.0f}",
                "found": note,
            }
        )
    print(format_table(rows, rows[0]))
    server.terminate()


if __name__ == "__main__":
    main()
