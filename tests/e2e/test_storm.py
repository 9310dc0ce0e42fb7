"""Many kills, many images: minutes long, on demand (`pytest -m storm`)."""

import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import results
from pipeline.synthetic import encode_png, write_phantoms

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ["--images", "{case}/{case}_{slice}.png", "--masks", "{case}/{case}_{slice}_mask.png"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

pytestmark = [pytest.mark.storm, pytest.mark.timeout(3600)]


class Reader(threading.Thread):
    """Polls the results all the while; remembers every state of a night that it saw."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.polls, self.seen, self.wrong = str(out), 0, set(), []
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                night = results.open_night(self.out)
                if night is not None:
                    rows = (
                        results.read_table(night, "masks", ["image_id"])
                        .column("image_id")
                        .to_pylist()
                    )
                    scores = results.read_table(night, "metrics", ["image_id"]).num_rows
                    self.seen.add((night.number, len(rows), len(set(rows)), scores))
                self.polls += 1
            except Exception as error:  # noqa: BLE001  (any surprise is a finding)
                self.wrong.append(repr(error))
            time.sleep(0.05)


def test_ten_killed_drivers_lose_double_and_half_publish_nothing(
    reseg, tmp_path, demo_bundle, segment_here, config, read_digests
):
    source, out = tmp_path / "source", tmp_path / "results"
    write_phantoms(source, range(96), num_slices=10, side=96)
    rng = random.Random(5)
    reader = Reader(out)
    reader.start()
    kills = 0
    command = [*reseg, "segment", source, out, "--bundle", demo_bundle, *PATTERNS, "--json"]
    expected_images = 960
    for night in range(2):
        while True:
            process = subprocess.Popen(
                [*map(str, command)],
                env=ENVIRONMENT,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            if kills < 5 * (night + 1):
                try:
                    process.wait(timeout=rng.uniform(2, 25))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills += 1
                    continue
            told, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            summary = json.loads(told)
            break
        if summary["night"] == 0:
            for index in range(30):
                victim = source / f"phantom_{index:04d}" / f"phantom_{index:04d}_2.png"
                victim.write_bytes((source / "phantom_0090" / "phantom_0090_5.png").read_bytes())
    reader.stop.set()
    reader.join()
    segment_here(str(source), str(tmp_path / "expected"), demo_bundle, config())
    assert read_digests(out) == read_digests(tmp_path / "expected")
    assert reader.wrong == []
    assert reader.seen <= {(n, expected_images, expected_images, expected_images) for n in range(2)}
    print(f"{kills} kills, {reader.polls} polls, states seen: {sorted(reader.seen)}")


def _segment(reseg, source, out, bundle):
    """Run the command under a clock and a scale; its summary, seconds and peak memory in MB."""
    script = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('jobs.segment', run_name='__main__')\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [reseg[0], "-c", script, "reseg", str(source), str(out), "--bundle", bundle, "--json"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout), time.monotonic() - started, int(done.stderr.split()[-1])


def test_ten_thousand_small_images(reseg, tmp_path, demo_bundle):
    rng = np.random.default_rng(0)
    for number, count in (("few", 1_000), ("many", 10_000)):
        for index in range(count):
            path = tmp_path / number / f"{index % 100:02d}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(rng.integers(0, 256, (32, 32), np.uint8)))
    few, few_s, few_mb = _segment(reseg, tmp_path / "few", tmp_path / "r-few", demo_bundle)
    many, many_s, many_mb = _segment(reseg, tmp_path / "many", tmp_path / "r-many", demo_bundle)
    assert (few["computed_images"], many["computed_images"]) == (1_000, 10_000)
    assert many_mb - few_mb < 80, "the driver's memory must not grow with the images"
    again, again_s, again_mb = _segment(reseg, tmp_path / "many", tmp_path / "r-many", demo_bundle)
    assert again["computed_images"] == 0
    assert again_s < 10
    for index in range(10):
        path = tmp_path / "many" / f"{index:02d}" / f"{index}.png"
        path.write_bytes(encode_png(rng.integers(0, 256, (32, 32), np.uint8)))
    changed, _, _ = _segment(reseg, tmp_path / "many", tmp_path / "r-many", demo_bundle)
    assert changed["cases"]["changed"] == changed["computed_images"] == 10
    print(
        f"1,000: {few_s:.1f} s, driver {few_mb} MB; 10,000: {many_s:.1f} s, driver {many_mb} MB; "
        f"again: {again_s:.1f} s, driver {again_mb} MB"
    )
