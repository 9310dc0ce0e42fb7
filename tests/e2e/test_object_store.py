"""Nights in object storage through the command line, while the store is killed and comes back."""

import json
import subprocess
import threading
import time
from pathlib import Path

import pytest
from object_store import upload

from pipeline import results, runs, storage
from pipeline.errors import ResegError
from pipeline.synthetic import write_phantoms

pytestmark = [pytest.mark.storm, pytest.mark.timeout(1800)]

PATTERNS = (
    *("--images", "{case}/{case}_{slice}.png"),
    *("--masks", "{case}/{case}_{slice}_mask.png"),
)


class Killer(threading.Thread):
    """Kills the store twice while a run files its receipts, each time for so many seconds."""

    def __init__(self, store, out: str, down_s: float) -> None:
        super().__init__(daemon=True)
        self.store, self.out, self.down_s = store, out, down_s
        self.kills, self.ended = 0, threading.Event()
        self.start()

    def _num_receipts(self) -> int:
        try:
            for run_id in runs.open_runs(self.out):
                folder = runs.run_uri(self.out, run_id, "receipts")
                return sum(1 for _ in storage.list_files(folder))
        except (ResegError, OSError):
            pass
        return 0

    def run(self) -> None:
        for wanted in (2, 9):
            while self._num_receipts() < wanted:
                if self.ended.wait(0.1):
                    return
            self.store.kill()
            self.kills += 1
            time.sleep(self.down_s)
            self.store.start()

    def stop(self) -> None:
        self.ended.set()
        self.join()


@pytest.fixture
def archive(tmp_path) -> Path:
    write_phantoms(tmp_path / "images", range(60), num_slices=6, side=128)
    return tmp_path / "images"


@pytest.mark.parametrize("patience_s", [300, 3], ids=["by_retry", "by_resume"])
def test_three_nights_while_the_store_is_killed_twice_in_each(
    object_store, bucket, archive, tmp_path, reseg, demo_bundle, altered_bundle, monkeypatch,
    read_digests, patience_s,
):  # fmt: skip
    monkeypatch.setenv("RESEG_STORE_PATIENCE_S", str(patience_s))
    first = demo_bundle
    second = altered_bundle(demo_bundle, tmp_path / "second", 0.001)
    for name, folder in (("first", first), ("second", second)):
        upload(Path(folder), f"{bucket}/bundles/{name}")
    exits: list[int] = []

    def night(number: int, bundle: str) -> None:
        upload(archive, f"{bucket}/images")
        policy = tmp_path / "nightly.toml"
        policy.write_text(
            f'source = "{bucket}/images"\nresults = "{bucket}/results"\n'
            f'bundle = "{bucket}/bundles/{bundle}"\n'
            "[segment.source]\n"
            'images = "{case}/{case}_{slice}.png"\nmasks = "{case}/{case}_{slice}_mask.png"\n'
            "[gate]\nmax_missing_share = 0.5\n"
        )
        killer = Killer(object_store, f"{bucket}/results", 6.0)
        command = [*reseg, "nightly", "--config", str(policy), "--json"]
        for _ in range(6):
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            exits.append(done.returncode)
            if done.returncode == 0:
                break
            assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
            assert "object store" in done.stderr or "resumes" in done.stderr, done.stderr[-2000:]
            while not killer.ended.is_set() and not _answers(bucket):
                time.sleep(0.2)
        killer.stop()
        assert done.returncode == 0, done.stderr[-2000:]
        assert killer.kills == 2
        assert json.loads(done.stdout)["night"] == number
        local = [*reseg, "segment", str(archive), str(tmp_path / "local"), *PATTERNS]
        where = first if bundle == "first" else second
        done = subprocess.run([*local, "--bundle", where], capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        assert read_digests(f"{bucket}/results") == read_digests(tmp_path / "local")

    night(0, "first")
    for path in archive.glob("phantom_000*/*_2.png"):
        path.write_bytes(path.with_name(path.name.replace("_2.png", "_3.png")).read_bytes())
    write_phantoms(archive, range(60, 90), num_slices=6, side=128)
    night(1, "first")
    night(2, "second")
    assert [entry["night"] for entry in results.history(f"{bucket}/results")] == [2, 1, 0]
    if patience_s > 100:
        assert set(exits) == {0}
    else:
        assert 1 in exits
    done = subprocess.run(
        [*reseg, "verify", f"{bucket}/results", "--checksums"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _answers(bucket: str) -> bool:
    try:
        return storage.file_info(f"{bucket}/none") is None
    except (ResegError, OSError):
        return False
