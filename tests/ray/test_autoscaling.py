"""A cluster that starts its nodes on demand: Ray's own autoscaler over nodes that are processes here.

The provider is the one that Ray tests itself with. It is named as an external one, because the
file of defaults that belongs to its short name is not in Ray's wheel.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
HEAD_TYPE = "ray.head.default"  # the provider knows no other
STORE_BYTES = 100_000_000
IDLE_S = 6.0

pytestmark = [pytest.mark.storm, pytest.mark.timeout(600)]

DRIVER = """
import json, sys, time
import ray
from pipeline.config import SegmentConfig, load_config
from pipeline.errors import ResegError
from pipeline.flows.segment import run_segment

address, patience_s, *arguments, options = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="error")


def nodes_with_gpus():
    return sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())


told, seen = {"before": nodes_with_gpus()}, []
started = time.monotonic()
try:
    config = load_config(SegmentConfig, options=json.loads(options))
    summary = run_segment(*arguments, config, report=lambda *what: seen.append(what[2]))
    told |= {"images": summary.computed_images, "seconds": summary.seconds}
except ResegError as error:
    told["error"] = str(error)
told |= {"failed_after_s": time.monotonic() - started, "after": nodes_with_gpus(), "seen": sorted({*seen})}
started = time.monotonic()
while nodes_with_gpus() and time.monotonic() - started < float(patience_s):
    time.sleep(0.5)
print(json.dumps({**told, "left": nodes_with_gpus(), "gone_after_s": time.monotonic() - started}))
"""


@contextmanager
def autoscaling(most_gpus: int) -> Iterator[Callable[..., dict[str, Any]]]:
    """A head without CPUs, and up to so many nodes with a GPU, of which none is up yet."""
    folder = Path(tempfile.mkdtemp(prefix="ra", dir="/tmp"))  # sockets want a short path
    address = f"{_own_address()}:{_free_port()}"
    (folder / "cluster.json").write_text(json.dumps(_cluster(address, most_gpus)))
    plain = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RESEG_TEST_CLUSTER": str(folder),
    }
    head = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus", "0"),
        *("--node-ip-address", address.partition(":")[0], "--port", address.partition(":")[2]),
        *("--include-dashboard", "false", "--dashboard-agent-listen-port", "0"),
        *("--object-store-memory", str(STORE_BYTES), "--temp-dir", str(folder)),
        f"--autoscaling-config={folder / 'cluster.json'}",
    ]

    def drive(*arguments: Any, patience_s: float = 90.0, **options: Any) -> dict[str, Any]:
        words = [address, patience_s, *arguments, json.dumps(options)]
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, *map(str, words)],
            env=plain,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(f"\n{told}")
        return told

    try:
        subprocess.run(command, env={**plain, **head}, check=True, capture_output=True)
        yield drive
    finally:
        _end_all(f"RESEG_TEST_CLUSTER={folder}")
        shutil.rmtree(folder, ignore_errors=True)


def _cluster(address: str, most_gpus: int) -> dict[str, Any]:
    shape = {"CPU": 2, "GPU": 1, "object_store_memory": STORE_BYTES}
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")
    commands = (f"{who}setup_commands" for who in ("", "head_", "worker_"))
    starts = (f"{who}_start_ray_commands" for who in ("head", "worker"))
    return {
        "cluster_name": "fake",
        "max_workers": 4,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "auth": {"ssh_user": "nobody"},  # without it no node is ever taken down
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": shape,
                "node_config": {},
                "min_workers": 0,
                "max_workers": most_gpus,
            },
        },
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "docker": {},
        **{key: [] for key in (*lists, *commands, *starts)},
    }


def _own_address() -> str:
    from ray._private.services import get_node_ip_address

    return str(get_node_ip_address())


def _free_port() -> int:
    """A port outside the range that Ray gives to its workers."""
    for port in range(21_000, 31_000, 37):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("", port))
            return port
    raise AssertionError("no free port")


def _end_all(mark: str) -> None:
    """End what was started with this in its environment, until nothing is left of it."""
    deadline = time.monotonic() + 30
    while (left := [*_marked(mark.encode())]) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def _marked(mark: bytes) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


PATTERNS = {
    "source.images": "{case}/{case}_{slice}.png",
    "source.masks": "{case}/{case}_{slice}_mask.png",
}


def test_a_node_with_a_gpu_comes_for_the_run_and_goes_when_idle(
    phantoms, tmp_path, demo_bundle, config, segment_here, read_digests
):
    with autoscaling(most_gpus=2) as drive:
        told = drive(phantoms, tmp_path / "r", demo_bundle, **PATTERNS, **{"resources.max_gpus": 2})
    assert told["before"] == 0
    assert told["images"] == 48
    assert "waiting for a GPU" in told["seen"]
    assert (told["after"], told["left"]) == (2, 0)
    segment_here(str(phantoms), str(tmp_path / "expected"), demo_bundle, config())
    assert read_digests(tmp_path / "r") == read_digests(tmp_path / "expected")


def test_nobody_falls_back_to_the_cpu_in_silence_and_waiting_has_an_end(
    phantoms, tmp_path, demo_bundle
):
    with autoscaling(most_gpus=0) as drive:
        arguments = (phantoms, tmp_path / "r", demo_bundle)
        told = drive(*arguments, **PATTERNS)
        assert "--device cuda asks for a GPU" in told["error"]
        options = {"resources.device": "cuda", "resources.wait_for_nodes_s": 12}
        told = drive(*arguments, **PATTERNS, **options)
        assert "no room for a GPU in 12 s: has the cluster such a node type" in told["error"]
        assert told["failed_after_s"] < 30
