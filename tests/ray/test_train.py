"""Training on Ray: two workers, killed ones, a killed driver; always the same losses."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.bundle import load_bundle

CONFIG = """
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
dropout = 0.1
[schedule]
warmup_steps = 5
[resources]
workers = 2
threads = 1
readers = 1
"""


def losses_of(out: Path) -> list[float]:
    for name in reversed(checkpoint.names(str(out), "step-")):
        try:
            return checkpoint.load(str(out), name)[1]["losses"].tolist()
        except checkpoint.DamagedCheckpoint:
            continue  # being written, or removed, at this very moment
    return []


def start(reseg, source: Path, out: Path, config: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*reseg, "train", source, out, "--config", config, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen[bytes]) -> dict:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err.decode()
    return json.loads(out)


def descendants(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                children = [int(child) for child in task.read_text().split()]
            except OSError:
                continue
            found += children
            todo += children
    return found


def train_workers(driver: int) -> list[int]:
    """The processes of this driver's session that Ray Train runs the workers in."""
    found = []
    for pid in descendants(driver):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::RayTrainWorker" in line or b"ray::_RayTrainWorker" in line:
            found.append(pid)
    return found


def wait_for(condition, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.fixture(scope="module")
def unbroken(reseg, phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "train.toml").write_text(CONFIG)
    result = finish(start(reseg, phantoms, folder / "out", folder / "train.toml"))
    return folder / "train.toml", losses_of(folder / "out"), result


@pytest.mark.timeout(600)
def test_killed_worker_killed_driver_and_resume_give_the_unbroken_losses(
    unbroken, reseg, phantoms, tmp_path
):
    config, whole, result = unbroken
    assert len(whole) == 16
    assert result["workers"] == 2
    out = tmp_path / "out"
    driver = start(reseg, phantoms, out, config)
    wait_for(lambda: 2 <= len(losses_of(out)) < 12)
    victims = wait_for(lambda: train_workers(driver.pid))
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    before = len(losses_of(out))
    wait_for(lambda: len(losses_of(out)) > before)  # Ray started both again, and they went on
    assert driver.poll() is None
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert len(losses_of(out)) < 16
    resumed = finish(start(reseg, phantoms, out, config))
    assert losses_of(out) == whole
    assert resumed["mean_dice"] == result["mean_dice"]
    weights = [load_bundle(one["bundle"]).weights_sha256 for one in (resumed, result)]
    assert weights[0] == weights[1]


@pytest.mark.storm
@pytest.mark.timeout(600)
def test_a_worker_that_is_stuck_is_replaced(unbroken, reseg, phantoms, tmp_path):
    config, whole, _ = unbroken
    out, impatient = tmp_path / "out", tmp_path / "impatient.toml"
    impatient.write_text(config.read_text() + "stall_timeout_s = 15\n")
    driver = start(reseg, phantoms, out, impatient)
    wait_for(lambda: 2 <= len(losses_of(out)) < 12)
    stuck = wait_for(lambda: train_workers(driver.pid))[1]
    os.kill(stuck, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        finish(driver)
    finally:
        with suppress(ProcessLookupError):
            os.kill(stuck, signal.SIGKILL)
    print(f"\nended {time.monotonic() - stopped:.0f} s after a worker stopped")
    assert losses_of(out) == whole


@pytest.mark.storm
def test_control_c_writes_a_checkpoint_and_the_same_command_goes_on(
    unbroken, reseg, phantoms, tmp_path
):
    config, whole, _ = unbroken
    out = tmp_path / "out"
    driver = start(reseg, phantoms, out, config)
    wait_for(lambda: 2 <= len(losses_of(out)) < 12)
    os.kill(driver.pid, signal.SIGINT)
    _, err = driver.communicate(timeout=180)
    assert driver.returncode == 130, err.decode()
    assert b"takes up where it stopped" in err
    finish(start(reseg, phantoms, out, config))
    assert losses_of(out) == whole


@pytest.mark.storm
def test_a_training_with_fewer_workers_goes_on_with_the_rest_of_the_epoch(
    unbroken, reseg, phantoms, tmp_path
):
    config, whole, _ = unbroken
    out = tmp_path / "out"
    driver = start(reseg, phantoms, out, config)
    wait_for(lambda: len(losses_of(out)) >= 2)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    done = len(losses_of(out))
    alone = tmp_path / "alone.toml"
    alone.write_text(CONFIG.replace("workers = 2", "workers = 1"))
    result = finish(start(reseg, phantoms, out, alone))
    assert any("with 1 workers, before 2" in note for note in result["notes"])
    assert len(losses_of(out)) == 16
    assert losses_of(out)[:done] == whole[:done]


def test_bad_requests_fail_before_ray_starts(reseg, phantoms, tmp_path):
    (tmp_path / "train.toml").write_text(CONFIG)
    for extra, message in (
        (["--set", "optimizer.rate=1"], "unknown key 'rate'"),
        (
            ["--set", "loss.terms.cross_entropy=1.0"],
            "does not go with a recipe that ends in sigmoid",
        ),
        (["--init", str(tmp_path / "nowhere")], "is not a bundle"),
        (["--set", "recipe.ready=nonesuch"], "unknown recipe 'nonesuch'"),
        (["--set", "model.options.widht=8"], "unknown key 'widht'"),
        (["--set", "recipe.side=64"], "has no resize step"),
    ):
        done = subprocess.run(
            [
                *reseg,
                "train",
                phantoms,
                tmp_path / "out",
                "--config",
                tmp_path / "train.toml",
                *extra,
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
