"""The flow on Ray: the same masks whatever the layout, and what fails, fails alone."""

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import results
from pipeline.config import ResourceConfig
from pipeline.errors import ConfigError, ErrorClass, RunStalled
from pipeline.flows import segment, stages, stream
from pipeline.flows.cluster import plan_pool
from pipeline.flows.placement import Pool
from pipeline.flows.segment import run_segment
from pipeline.formats import open_source
from pipeline.sharding import write_shards
from pipeline.synthetic import encode_png


@pytest.fixture(scope="module")
def expected(phantoms, tmp_path_factory, demo_bundle, config, segment_here, read_digests):
    """Masks of the phantoms, computed without Ray."""
    out = str(tmp_path_factory.mktemp("expected") / "r")
    segment_here(str(phantoms), out, demo_bundle, config())
    return read_digests(out)


@pytest.mark.parametrize(("actors", "batch_size"), [(1, 1), (2, 7), (3, 32)])
def test_actors_and_batches_change_no_mask(
    actors, batch_size, phantoms, tmp_path, demo_bundle, config, ray_session, expected, read_digests
):
    chosen = config(resources__actors=actors, inference__batch_size=batch_size)
    run_segment(str(phantoms), str(tmp_path / "r"), demo_bundle, chosen)
    assert read_digests(tmp_path / "r") == expected


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_containers_change_no_mask_and_no_measure(
    kind,
    phantoms,
    tmp_path,
    demo_bundle,
    config,
    ray_session,
    expected,
    read_digests,
    read_rows,
    segment_here,
):
    chosen = config()
    source = open_source(str(phantoms), chosen.source, chosen.limits)
    write_shards(source, str(tmp_path / "s"), kind, shard_bytes=40_000)
    run_segment(str(tmp_path / "s"), str(tmp_path / "r"), demo_bundle, config(patterns=False))
    assert read_digests(tmp_path / "r") == expected
    segment_here(str(phantoms), str(tmp_path / "f"), demo_bundle, chosen)
    for table in ("metrics", "cases"):
        ours, theirs = read_rows(tmp_path / "r", table), read_rows(tmp_path / "f", table)
        for row in (*ours, *theirs):
            row.pop("config_digest")
        assert ours == theirs


def test_shards_too_large_for_a_row_are_read_by_the_actor(
    phantoms, tmp_path, demo_bundle, config, segment_here, expected, read_digests, monkeypatch
):
    monkeypatch.setattr(stages, "_MAX_BYTES_IN_ROW", 0)
    segment_here(str(phantoms), str(tmp_path / "r"), demo_bundle, config())
    assert read_digests(tmp_path / "r") == expected


def test_a_new_shard_is_added_and_a_rewritten_one_computes_only_what_changed(
    own_phantoms, tmp_path, demo_bundle, config, ray_session, read_digests
):
    chosen = config()

    def shard():
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        source = open_source(str(own_phantoms), chosen.source, chosen.limits)
        write_shards(source, str(tmp_path / "s"), "tar", shard_bytes=40_000)

    shard()
    arguments = (str(tmp_path / "s"), str(tmp_path / "r"), demo_bundle, config(patterns=False))
    first = run_segment(*arguments)
    shard()
    assert run_segment(*arguments).computed_images == 0
    image = own_phantoms / "phantom_0004" / "phantom_0004_3.png"
    shutil.copy(own_phantoms / "phantom_0005" / "phantom_0005_3.png", image)
    shard()
    second = run_segment(*arguments)
    assert (first.night, second.night) == (0, 1)
    assert second.counts["cases"]["changed"] == 1
    assert second.computed_images == 6


def test_a_poison_image_costs_itself_and_seconds(
    own_phantoms, tmp_path, demo_bundle, config, ray_session, expected, read_rows
):
    """A picture whose decoding outlasts the time limit, next to good ones."""
    poison = encode_png(np.zeros((16000, 16000), np.uint8))
    (own_phantoms / "poison").mkdir()
    (own_phantoms / "poison" / "poison_1.png").write_bytes(poison)
    (own_phantoms / "poison" / "poison_1_mask.png").write_bytes(poison[:100])
    chosen = config(limits__decode_timeout_s=0.4, limits__max_pixels=1 << 28)
    started = time.monotonic()
    run_segment(str(own_phantoms), str(tmp_path / "r"), demo_bundle, chosen)
    assert time.monotonic() - started < 120
    rows = {row["image_id"]: row for row in read_rows(tmp_path / "r", "masks")}
    assert rows["poison/1"]["error_class"] == ErrorClass.DECODER_TIMEOUT
    good = {k: r["mask_sha256"] for k, r in rows.items() if r["status"] == "ok"}
    assert good == {k: expected[k] for k in good}
    assert len(good) == len(expected)
    assert len(rows) == len(expected) + 1


def test_logical_gpus_are_scheduled(
    phantoms, tmp_path, demo_bundle, config, expected, read_digests
):
    """On a cluster of its own with one logical GPU: the pool takes it, the network runs on the CPU."""
    script = (
        "import sys, ray; ray.init(address='local', num_cpus=3, num_gpus=1, include_dashboard=False, "
        "log_to_driver=False, logging_level='error')\n"
        "from pipeline.config import SegmentConfig, load_config, ResourceConfig\n"
        "from pipeline.flows.cluster import plan_pool\n"
        "from pipeline.flows.segment import run_segment\n"
        "pool = plan_pool(ResourceConfig(), 1, 9)\n"
        "assert (pool.num_actors, pool.gpus_per_actor) == (1, 1.0), pool\n"
        "options = {'source.images': '{case}/{case}_{slice}.png', 'source.masks': '{case}/{case}_{slice}_mask.png'}\n"
        "run_segment(*sys.argv[1:], load_config(SegmentConfig, options=options))\n"
    )
    import sys

    out = tmp_path / "r"
    subprocess.run([sys.executable, "-c", script, phantoms, out, demo_bundle], check=True)
    assert read_digests(out) == expected


def test_a_pool_that_would_starve_the_readers_is_refused(ray_session):
    with pytest.raises(ConfigError, match="would hang; set resources.actors lower"):
        plan_pool(ResourceConfig(actors=5), 1, 9)
    with pytest.raises(ConfigError, match="no GPU"):
        plan_pool(ResourceConfig(device="cuda"), 1, 9)
    assert plan_pool(ResourceConfig(), 1, 2).num_actors == 2
    assert plan_pool(ResourceConfig(), 1, 99).num_actors == 4


def test_a_run_that_cannot_move_ends_and_names_the_stage(
    phantoms, tmp_path, demo_bundle, config, ray_session, monkeypatch
):
    """Actors that no node can ever hold: without the watchdog this would wait for good."""
    starving = Pool(num_actors=2, cpus_per_actor=4.0, gpus_per_actor=0)
    monkeypatch.setattr(segment, "plan_pool", lambda *_: starving)
    chosen = config(resources__stall_timeout_s=8.0)
    _Stuck.__name__ = "PredictStage"
    monkeypatch.setattr(stream, "PredictStage", _Stuck)
    with pytest.raises(RunStalled, match="no stage moved for 8 s; still running: .*predict"):
        run_segment(str(phantoms), str(tmp_path / "r"), demo_bundle, chosen)
    assert results.latest_night_number(str(tmp_path / "r")) is None


class _Stuck:
    def __init__(self, job):
        pass

    def __call__(self, batch):
        time.sleep(120)
        return batch


def _workers() -> list[int]:
    """Processes of this test's own Ray session that run the network."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
                parent = _ancestors(int(folder.name))
            except (OSError, ValueError):
                continue
            if b"MapWorker" in command and os.getpid() in parent:
                found.append(int(folder.name))
    return found


def _ancestors(pid: int) -> set[int]:
    seen = set()
    while pid > 1 and pid not in seen:
        seen.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return seen


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.storm)])
def test_killed_workers_lose_and_double_nothing(
    kills, tmp_path, demo_bundle, config, ray_session, read_digests, segment_here
):
    from pipeline.synthetic import write_phantoms

    source = tmp_path / "source"
    write_phantoms(source, range(16 * kills), num_slices=8, side=64)
    segment_here(str(source), str(tmp_path / "expected"), demo_bundle, config())
    killed = []
    stop = threading.Event()

    def kill():
        while len(killed) < kills and not stop.is_set():
            time.sleep(1.5)
            victims = _workers()
            if victims:
                os.kill(victims[len(killed) % len(victims)], signal.SIGKILL)
                killed.append(1)

    killer = threading.Thread(target=kill)
    killer.start()
    chosen = config(resources__actors=2, resources__max_retries=20)
    run_segment(str(source), str(tmp_path / "r"), demo_bundle, chosen)
    stop.set()
    killer.join()
    assert killed
    assert read_digests(tmp_path / "r") == read_digests(tmp_path / "expected")
