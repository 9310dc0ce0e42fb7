"""Many machines: what a run asks of a cluster, and what it survives there.

The large ones are in network namespaces with logical GPUs: `pytest -m "storm and root"`, as root.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import netns
import pytest

from pipeline import checkpoint
from pipeline.bundle import load_bundle
from pipeline.formats import open_source
from pipeline.sharding import write_shards
from pipeline.synthetic import write_phantoms

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ["--images", "{case}/{case}_{slice}.png", "--masks", "{case}/{case}_{slice}_mask.png"]
WHY_NOT = netns.why_not()
GPU = {"cpus": 2, "gpus": 1}

on_machines = [
    pytest.mark.storm,
    pytest.mark.root,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


def machines(test: Any) -> Any:
    """Mark a test that needs several machines."""
    for mark in on_machines:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def shards(tmp_path_factory, config) -> Path:
    """Ninety-six phantoms in as many tars, so that a run has a middle."""
    folder = tmp_path_factory.mktemp("cluster")
    write_phantoms(folder / "phantoms", range(96), num_slices=8, side=64)
    chosen = config()
    source = open_source(str(folder / "phantoms"), chosen.source, chosen.limits)
    write_shards(source, str(folder / "shards"), "tar", shard_bytes=1)
    return folder / "shards"


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory, demo_bundle, config, segment_here, read_digests):
    """The masks of an undisturbed run without Ray."""
    out = str(tmp_path_factory.mktemp("expected") / "r")
    segment_here(str(shards), out, demo_bundle, config(patterns=False))
    return read_digests(out)


class Run:
    """`reseg segment` on a cluster, from its head."""

    def __init__(
        self, cluster: netns.Cluster, shards: Path, out: Path, bundle: str, *more: str, stall_s=300
    ) -> None:
        self.out, self._log = out, out.parent / f"{out.name}.err"
        command = [sys.executable, "-m", "jobs.segment", shards, out, "--bundle", bundle, "--json"]
        self._started = time.monotonic()
        more = (*more, "--set", f"resources.stall_timeout_s={stall_s}")
        self.process = cluster.run(*command, "--address", cluster.address, *more, log=self._log)

    def wait_for(self, num_receipts: int) -> None:
        """Until so many shards are done."""
        while len(self.receipts()) < num_receipts:
            assert self.process.poll() is None, f"ended too early: {self._log.read_text()}"
            time.sleep(0.1)

    def receipts(self) -> list[Path]:
        return list(self.out.glob("_runs/*/receipts/*.json"))

    def end(self, what: str = "") -> dict[str, Any]:
        """The summary of a run that succeeded; prints how long it took."""
        since = time.monotonic()
        told, _ = self.process.communicate(timeout=600)
        now = time.monotonic()
        print(f"\n{what}: ended {now - since:.1f} s later, {now - self._started:.1f} s in all")
        assert self.process.returncode == 0, self._log.read_text()
        summary: dict[str, Any] = json.loads(told)
        return summary

    def fail(self, what: str) -> str:
        """The sentence of a run that failed; prints how long it took."""
        since = time.monotonic()
        self.process.communicate(timeout=600)
        print(f"\n{what}: gave up {time.monotonic() - since:.1f} s later")
        assert self.process.returncode == 1, self.process.returncode
        return self._log.read_text()


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


@machines
def test_two_nodes_and_a_head_without_cpus(shards, tmp_path, demo_bundle, expected, read_digests):
    with netns.cluster(GPU, GPU) as cluster:
        summary = Run(cluster, shards, tmp_path / "r", demo_bundle).end("undisturbed")
    assert summary["computed_images"] == 768
    assert read_digests(tmp_path / "r") == expected


@machines
@pytest.mark.parametrize("how", ["kill", "kill_raylet", "terminate"])
def test_a_node_that_goes_costs_time_only(
    how, shards, tmp_path, demo_bundle, expected, read_digests
):
    """One of two nodes with a GPU is gone in mid-run: a power cut, a dead raylet, a spot node."""
    with netns.cluster(GPU, GPU, {"cpus": 1}) as cluster:
        run = Run(cluster, shards, tmp_path / "r", demo_bundle)
        run.wait_for(10)
        getattr(cluster, how)(2)
        summary = run.end(f"{how} at {len(run.receipts())} of 96")
    assert summary["computed_images"] == 768
    assert read_digests(tmp_path / "r") == expected


@machines
@pytest.mark.parametrize("seconds", [12.0, None])
def test_a_cut_link_costs_time_only(seconds, shards, tmp_path, demo_bundle, expected, read_digests):
    """For twelve seconds, and for good: then Ray gives the node up, after about a minute."""
    with netns.cluster(GPU, GPU, {"cpus": 1}) as cluster:
        run = Run(cluster, shards, tmp_path / "r", demo_bundle)
        run.wait_for(10)
        cluster.cut(2)
        if seconds is not None:
            time.sleep(seconds)
            cluster.heal(2)
        summary = run.end(f"cut for {seconds}")
    assert summary["computed_images"] == 768
    assert read_digests(tmp_path / "r") == expected


@machines
def test_a_run_without_nodes_gives_up_and_goes_on_with_the_next_one(
    shards, tmp_path, demo_bundle, expected, read_digests
):
    """The only node with a GPU is gone for good: the watchdog ends the run, and it is resumed."""
    with netns.cluster(GPU, {"cpus": 1}) as cluster:
        run = Run(cluster, shards, tmp_path / "r", demo_bundle, stall_s=40)
        run.wait_for(10)
        cluster.kill(1)
        sentence = run.fail("the last node killed")
        assert "no stage moved for 40 s; still running: " in sentence
        assert "the same command resumes the run" in sentence
        done = len(run.receipts())
        assert 10 <= done < 96
        cluster.add(**GPU)
        summary = Run(cluster, shards, tmp_path / "r", demo_bundle).end(f"resumed at {done} of 96")
    assert summary["resumed"]
    assert read_digests(tmp_path / "r") == expected


@machines
def test_a_node_that_joins_is_used(shards, tmp_path, demo_bundle, expected, read_digests):
    """Its place is taken at once by the actor that waited for it."""
    with netns.cluster(GPU, {"cpus": 1}) as cluster:
        run = Run(cluster, shards, tmp_path / "r", demo_bundle, "--max-gpus", "2")
        run.wait_for(3)
        number = cluster.add(**GPU)
        wait_for(lambda: cluster.processes(number, "MapWorker"))
        print(f"\nits actor is there at {len(run.receipts())} of 96")
        run.end("with a second node")
    assert read_digests(tmp_path / "r") == expected


@machines
def test_only_nodes_with_the_label_hold_the_network(
    shards, tmp_path, demo_bundle, expected, read_digests
):
    with netns.cluster({**GPU, "labels": "kind=a"}, {**GPU, "labels": "kind=b"}) as cluster:
        out = tmp_path / "r"
        run = Run(cluster, shards, out, demo_bundle, "--nodes-like", "kind=b", "--max-gpus", "2")
        seen = set()
        while run.process.poll() is None:
            seen |= {n for n in (0, 1, 2) if cluster.processes(n, "MapWorker")}
            time.sleep(0.2)
        run.end("on one kind of node")
    assert seen == {2}
    assert read_digests(tmp_path / "r") == expected


@machines
@pytest.mark.parametrize("place", ["actor", "raylet and all"])
def test_shards_that_hang_are_computed_elsewhere(
    place, shards, tmp_path, demo_bundle, expected, read_digests
):
    """A frozen actor answers to nobody and dies of nothing; so does a frozen machine's."""
    with netns.cluster(GPU, GPU, {"cpus": 1}) as cluster:
        patience = ("--set", "resources.straggler_floor_s=15")
        run = Run(cluster, shards, tmp_path / "r", demo_bundle, *patience)
        run.wait_for(10)
        frozen = cluster.processes(2, "MapWorker" if place == "actor" else "")
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        summary = run.end(f"{place} frozen")
    assert frozen
    if place == "actor":  # a frozen machine may also be given up as dead before
        assert any("computed again on another" in note for note in summary["notes"])
    assert read_digests(tmp_path / "r") == expected


TRAINING = """
labels = ["lesion"]
epochs = 4
batch_size = 8
checkpoint_steps = 2
[source]
images = "{case}/{case}_{slice}.png"
masks = "{case}/{case}_{slice}_mask.png"
[split]
validation_patients = ["phantom_0006", "phantom_0007"]
[model.options]
width = 8
depth = 3
[resources]
threads = 1
readers = 1
"""


def losses_of(out: Path) -> list[float]:
    for name in reversed(checkpoint.names(str(out), "step-")):
        with suppress(checkpoint.DamagedCheckpoint):
            return checkpoint.load(str(out), name)[1]["losses"].tolist()
    return []


@pytest.fixture(scope="module")
def unbroken(reseg, phantoms, tmp_path_factory) -> list[float]:
    """The losses of two workers on one machine."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "train.toml").write_text(TRAINING)
    options = ["--config", folder / "train.toml", "--workers", "2", "--device", "cpu", "--json"]
    command = [*reseg, "train", phantoms, folder / "out", *options]
    subprocess.run([*map(str, command)], check=True, env=netns.ENVIRONMENT, capture_output=True)
    return losses_of(folder / "out")


@machines
@pytest.mark.parametrize("fault", ["none", "replaced", "lost"])
def test_training_across_nodes(fault, unbroken, phantoms, tmp_path):
    """Undisturbed; a worker's node killed and another one started; a worker's node killed for good.

    With as many workers the losses are those of one machine; with fewer they go on nearly so.
    """
    (tmp_path / "train.toml").write_text(TRAINING)
    out = tmp_path / "out"
    with netns.cluster({"cpus": 1}, {"cpus": 1}, {"cpus": 1}) as cluster:
        command = [sys.executable, "-m", "jobs.train", phantoms, out, "--workers", "2", "--json"]
        more = [
            "--device",
            "cpu",
            "--config",
            tmp_path / "train.toml",
            "--address",
            cluster.address,
        ]
        if fault == "lost":
            more += ["--set", "resources.min_workers=1"]
        process = cluster.run(*command, *more, log=tmp_path / "train.err")
        wait_for(lambda: process.poll() is not None or len(losses_of(out)) >= 2)
        assert process.poll() is None, (tmp_path / "train.err").read_text()
        homes = [n for n in (1, 2, 3) if cluster.processes(n, "RayTrainWorker")]
        assert len(homes) == 2
        since = time.monotonic()
        if fault != "none":
            cluster.kill(homes[1])
        if fault == "replaced":
            cluster.add(cpus=1)
        process.communicate(timeout=600)
        print(f"\ntraining, {fault}: ended {time.monotonic() - since:.1f} s later")
        assert process.returncode == 0, (tmp_path / "train.err").read_text()
    losses = losses_of(out)
    assert len(losses) == len(unbroken) == 16
    assert losses == (pytest.approx(unbroken, rel=0.05) if fault == "lost" else unbroken)
    assert load_bundle(str(out / "bundle")).labels


def test_a_head_without_cpus_and_one_node_with_a_gpu(
    phantoms, tmp_path, demo_bundle, config, segment_here, read_digests
):
    """The smallest cluster: in processes of one machine, without namespaces."""
    script = (
        "import sys, ray\n"
        "from ray.cluster_utils import Cluster\n"
        "store = dict(object_store_memory=100_000_000, dashboard_agent_listen_port=0)\n"
        "cluster = Cluster(True, head_node_args=dict(num_cpus=0, include_dashboard=False, **store))\n"
        "cluster.add_node(num_cpus=2, num_gpus=1, **store)\n"
        "from pipeline.config import SegmentConfig, load_config\n"
        "from pipeline.flows import segment\n"
        "values = {'source.images': sys.argv[4], 'source.masks': sys.argv[5]}\n"
        "config = load_config(SegmentConfig, options=values)\n"
        "segment.run_segment(*sys.argv[1:4], config, address=cluster.address)\n"
        "cluster.shutdown()\n"
    )
    out = tmp_path / "r"
    arguments = [phantoms, out, demo_bundle, PATTERNS[1], PATTERNS[3]]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    started = time.monotonic()
    subprocess.run(command, check=True, env=netns.ENVIRONMENT)
    print(f"\n{time.monotonic() - started:.1f} s")
    (log,) = out.glob("_runs/*/log.jsonl")
    (pool,) = [e for e in map(json.loads, log.read_text().splitlines()) if e["event"] == "compute"]
    assert (pool["num_actors"], pool["gpus_per_actor"]) == (1, 1.0)
    segment_here(str(phantoms), str(tmp_path / "expected"), demo_bundle, config())
    assert read_digests(out) == read_digests(tmp_path / "expected")
