"""Training from a folder to a bundle, without Ray: resume, damage, bad input, export."""

import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import checkpoint, lock, preparation
from pipeline.bundle import load_bundle, load_model, verify_bundle
from pipeline.config import TrainConfig, load_config
from pipeline.errors import Busy, ConfigError, ErrorClass, SourceError, TooManyBadImages
from pipeline.training import NonFiniteLoss, run_worker

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"
SMALL = {
    "source.images": "{case}/{case}_{slice}.png",
    "source.masks": "{case}/{case}_{slice}_mask.png",
    "labels": ["lesion"],
    "epochs": 3,
    "batch_size": 4,
    "model.options": {"width": 4, "depth": 2},
    "split.validation_patients": ["phantom_0006", "phantom_0007"],
    "optimizer.lr": 1e-2,
    "schedule.warmup_steps": 5,
    "numerics.dtype": "fp32",
    "resources.readers": 1,
}


DROPOUT = {"model__options": {"width": 4, "depth": 2, "dropout": 0.2}}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


def configured(**changes) -> TrainConfig:
    return load_config(
        TrainConfig, options=SMALL | {k.replace("__", "."): v for k, v in changes.items()}
    )


def make_job(source, out, config):
    """What `run_train` does before its workers start."""
    request = preparation.check_request(str(source), str(out), config)
    job = preparation.make_job(request)
    index = preparation.read_index(request.out)
    if index is None:
        index = preparation.index_here(job.index_job, preparation.shard_groups(request))
    preparation.check_index(job, index)
    preparation.freeze(request)
    preparation.write_index(request.out, index)
    return preparation.with_index(job, index)


def train(source, out, config=None, tell=lambda _: False, **changes):
    return run_worker(
        make_job(source, out, config or configured(**changes)), device="cpu", tell=tell
    )


def losses(out) -> list[float]:
    _, tensors = checkpoint.load(str(out), checkpoint.names(str(out), "step-")[-1])
    return tensors["losses"].tolist()


def stop_after(steps: int):
    """A `tell` that wants to stop once so many updates are done; asked at every update."""
    return lambda state: state.get("step", 0) >= steps


@pytest.fixture
def always_told(monkeypatch):
    """Workers ask at every update whether to stop, not twice a second."""
    from pipeline import training

    monkeypatch.setattr(training, "_TELL_EVERY_S", 0.0)


def test_a_training_becomes_a_bundle_that_segments(
    phantoms, tmp_path, config, segment_here, read_rows
):
    result = train(phantoms, tmp_path / "out", epochs=8, sampling__by="foreground")
    assert result["mean_dice"] > 0.5
    assert result["steps"] == 8 * 9
    bundle = load_bundle(result["bundle"])
    assert bundle.labels == ("lesion",)
    assert bundle.digest == result["bundle_digest"]
    assert bundle.scores["validation"]["mean_dice"] == result["mean_dice"]
    assert [c["case_id"] for c in bundle.scores["validation"]["cases"]] == [
        "phantom_0006",
        "phantom_0007",
    ]
    assert bundle.provenance["config"]["optimizer"]["lr"] == 1e-2
    assert "validation_patients" not in json.dumps(bundle.provenance)
    assert len(bundle.provenance["curves"]) == 8
    verify_bundle(bundle)
    for picture in ("curves.png", "samples.png"):
        assert min(Image.open(tmp_path / "out" / picture).size) > 100
    segment_here(str(phantoms), str(tmp_path / "r"), result["bundle"], config())
    rows = {row["case_id"]: row["dice"] for row in read_rows(tmp_path / "r", "cases")}
    for case in result["cases"]:
        assert rows[case["case_id"]] == pytest.approx(case["dice"], abs=1e-9)


def cpu_model() -> str:
    """Name, family and model of the processor: oneDNN chooses its order of additions by it."""
    info = Path("/proc/cpuinfo")
    values = dict(
        re.split(r"\s*:\s*", line, maxsplit=1)
        for line in (info.read_text().split("\n\n")[0].splitlines() if info.exists() else [])
        if ":" in line
    )
    return " ".join(values.get(key, "") for key in ("model name", "cpu family", "model"))


def test_the_first_20_losses_are_golden(phantoms, tmp_path):
    train(phantoms, tmp_path / "out")
    golden = json.loads(GOLDEN.read_text())
    found = losses(tmp_path / "out")[:20]
    here = [torch.__version__, torch.backends.cpu.get_cpu_capability(), cpu_model()]
    if here == golden["platform"]:
        assert found == golden["losses"]
    assert found == pytest.approx(golden["losses"], rel=1e-3)
    assert np.mean(found[-5:]) < np.mean(found[:5])


@pytest.fixture(scope="module")
def unbroken(phantoms, tmp_path_factory):
    """A training that nothing happened to, with dropout: its losses and its weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("unbroken") / "out"
    result = train(phantoms, out, **DROPOUT)
    torch.set_num_threads(before)
    return losses(out), weights_of(result)


@pytest.mark.parametrize("steps", [5, 9, 20])
def test_a_stopped_training_goes_on_with_the_same_bits(
    steps, phantoms, tmp_path, always_told, unbroken
):
    assert train(phantoms, tmp_path / "cut", tell=stop_after(steps), **DROPOUT) is None
    assert len(losses(tmp_path / "cut")) in (steps + 1, steps + 2)
    resumed = train(phantoms, tmp_path / "cut", **DROPOUT)
    assert (losses(tmp_path / "cut"), weights_of(resumed)) == unbroken


def weights_of(result) -> str:
    return load_bundle(result["bundle"]).weights_sha256


@pytest.mark.parametrize("damage", ["flip", "cut", "values", "digest"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(
    damage, phantoms, tmp_path, always_told, unbroken
):
    out = tmp_path / "cut"
    train(phantoms, out, tell=stop_after(22), **DROPOUT)
    names = checkpoint.names(str(out), "step-")
    assert len(names) == 2
    folder = out / checkpoint.FOLDER
    tensors = folder / f"{names[-1]}.safetensors"
    if damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "values":
        (folder / f"{names[-1]}.json").write_text("{}")
    else:
        (folder / f"{names[-1]}.digest").write_text("")
    resumed = train(phantoms, out, **DROPOUT)
    assert any("the one before it is used" in note for note in resumed["notes"])
    assert (losses(out), weights_of(resumed)) == unbroken


def test_no_flipped_or_cut_checkpoint_is_accepted(tmp_path):
    out = str(tmp_path)
    tensors = {"a": torch.randn(50, 20), "b": torch.arange(10)}
    checkpoint.save(out, "step-1", {"step": 1, "x": [0.1, 2]}, tensors)
    values, loaded = checkpoint.load(out, "step-1")
    assert values["x"] == [0.1, 2]
    assert torch.equal(loaded["a"], tensors["a"])
    rng = random.Random(0)
    for _ in range(300):
        file = tmp_path / checkpoint.FOLDER / rng.choice(["step-1.safetensors", "step-1.json"])
        good = file.read_bytes()
        bad = bytearray(good)
        if rng.random() < 0.8:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        else:
            bad = bad[: rng.randrange(len(bad))]
        file.write_bytes(bad)
        with pytest.raises(checkpoint.DamagedCheckpoint):
            checkpoint.load(out, "step-1")
        file.write_bytes(good)
    checkpoint.load(out, "step-1")


def test_new_checkpoints_are_kept_though_all_old_ones_are_damaged(phantoms, tmp_path, always_told):
    out = tmp_path / "out"
    train(phantoms, out, tell=stop_after(20))
    for file in (out / checkpoint.FOLDER).glob("step-*.safetensors"):
        file.write_bytes(b"rubbish")
    assert train(phantoms, out, tell=stop_after(5)) is None
    assert checkpoint.names(str(out), "step-")[-1] <= checkpoint.step_name(8)
    result = train(phantoms, out)
    assert len(losses(out)) == 27
    assert not result["notes"]


def test_a_damaged_best_checkpoint_is_replaced_by_the_last_weights(phantoms, tmp_path):
    out = tmp_path / "out"
    train(phantoms, out)
    shutil.rmtree(out / "bundle")
    (out / "result.json").unlink()
    for file in (out / checkpoint.FOLDER).glob("best-*.safetensors"):
        file.write_bytes(b"rubbish")
    result = train(phantoms, out)
    assert any("the last weights are exported instead" in note for note in result["notes"])
    assert result["mean_dice"] == result["last_dice"]
    verify_bundle(load_bundle(result["bundle"]))


def test_other_data_under_the_same_checkpoints_are_refused(own_phantoms, tmp_path, always_told):
    out = tmp_path / "out"
    train(own_phantoms, out, tell=stop_after(12))
    (out / "index.parquet").unlink()
    shutil.rmtree(own_phantoms / "phantom_0003")
    with pytest.raises(ConfigError, match="trained on other data"):
        train(own_phantoms, out)


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    out = str(tmp_path)
    lock.take_lock(out)
    lock.take_lock(out)  # of this very process: left behind, or ours
    file = tmp_path / "lock.json"
    values = json.loads(file.read_text())
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        file.write_text(json.dumps({**values, "pid": sleeper.pid}))
        with pytest.raises(Busy, match=f"process {sleeper.pid} on .* is training"):
            lock.take_lock(out)
    finally:
        sleeper.kill()
        sleeper.wait()
    lock.take_lock(out)  # its owner is gone
    for age, free in ((10, False), (1000, True)):
        seen = values["seen"] - age
        file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "seen": seen}))
        if free:
            lock.take_lock(out)
        else:
            with pytest.raises(Busy, match="on elsewhere"):
                lock.take_lock(out)
    lock.release_lock(out)
    assert not file.exists()


def test_best_and_last_two_checkpoints_are_kept(phantoms, tmp_path):
    train(phantoms, tmp_path / "out", epochs=5)
    assert checkpoint.names(str(tmp_path / "out"), "step-") == [
        checkpoint.step_name(36),
        checkpoint.step_name(45),
    ]
    assert 1 <= len(checkpoint.names(str(tmp_path / "out"), "best-")) <= 2


def test_a_finished_training_is_not_trained_again(phantoms, tmp_path):
    result = train(phantoms, tmp_path / "out")
    again = preparation.finished_result(str(tmp_path / "out"))
    assert again["bundle_digest"] == result["bundle_digest"]


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(
    phantoms, tmp_path
):
    make_job(phantoms, tmp_path / "out", configured())
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.01 there, 0\.02 now"):
        make_job(phantoms, tmp_path / "out", configured(optimizer__lr=0.02))
    make_job(phantoms, tmp_path / "out", configured(resources__workers=2))
    shutil.copytree(phantoms, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="source_uri"):
        make_job(tmp_path / "elsewhere", tmp_path / "out", configured())


def test_a_folder_of_something_else_is_left_alone(phantoms, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match="exists and is no training"):
        make_job(phantoms, tmp_path / "out", configured())


def test_a_loss_that_explodes_ends_the_training_and_names_the_last_checkpoint(phantoms, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"at step \d+ .*no worker was updated"):
        train(
            phantoms,
            tmp_path / "out",
            optimizer__lr=1e30,
            optimizer__clip_norm=0.0,
            optimizer__name="sgd",
            schedule__warmup_steps=0,
        )


def test_early_stopping_ends_before_the_last_epoch(phantoms, tmp_path):
    result = train(phantoms, tmp_path / "out", epochs=40, early_stop=2, optimizer__lr=1e-9)
    assert result["epochs"] < 40


def test_validation_now_and_then_and_in_the_last_epoch(phantoms, tmp_path):
    result = train(phantoms, tmp_path / "out", epochs=3, validate_every=2)
    curves = load_bundle(result["bundle"]).provenance["curves"]
    assert ["score" in record for record in curves] == [False, True, True]


def test_test_patients_are_scored_once_and_never_trained_on(phantoms, tmp_path):
    result = train(phantoms, tmp_path / "out", split__test_patients=["phantom_0005"])
    assert result["num_cases"] == {"train": 5, "validation": 2, "test": 1}
    assert [row["case_id"] for row in result["test_cases"]] == ["phantom_0005"]
    assert result["test_dice"] == result["test_cases"][0]["dice"]


def test_a_test_case_that_vanished_is_told(own_phantoms, tmp_path):
    config = configured(split__test_patients=["phantom_0005"], max_bad_share=0.3, epochs=1)
    job = make_job(own_phantoms, tmp_path / "out", config)
    shutil.rmtree(own_phantoms / "phantom_0005")
    result = run_worker(job, device="cpu")
    assert list(result["bad_cases"]) == ["phantom_0005"]
    assert result["test_dice"] is None


def test_a_calibrated_threshold_is_the_best_one_and_goes_into_the_bundle(phantoms, tmp_path):
    result = train(phantoms, tmp_path / "out", calibrate_threshold=True)
    steps = load_bundle(result["bundle"]).recipe.to_plain()["postprocess"]
    assert {"step": "threshold", "at": result["threshold"]} in steps
    assert 0.1 <= result["threshold"] <= 0.9
    plain = train(phantoms, tmp_path / "plain")
    assert result["mean_dice"] >= plain["mean_dice"]
    found = np.mean([row["dice"] for row in result["cases"]])
    assert result["mean_dice"] == pytest.approx(found)
    if result["threshold"] != 0.5:
        assert result["cases"] != plain["cases"]


def test_patches_weights_and_every_loss_train(phantoms, tmp_path):
    terms = {"dice": 1.0, "boundary": 1.0, "focal": 0.5, "tversky": 0.5, "bce": 0.1}
    result = train(
        phantoms,
        tmp_path / "out",
        epochs=1,
        sampling__patch=80,
        loss__terms=terms,
        augment__elastic_px=2.0,
        numerics__activation_checkpointing=True,
        optimizer__accumulate=2,
        tensorboard=True,
    )
    assert result["steps"] == 9
    assert list((tmp_path / "out" / "tensorboard").glob("events.out.*"))


def test_cases_beyond_the_memory_are_forgotten_and_read_again(phantoms, tmp_path, monkeypatch):
    from pipeline.loading import CaseReader

    held = []
    make_room = CaseReader.make_room

    def watched(self, needed):
        make_room(self, needed)
        held.append((len(self._kept), len(needed), self._used))

    monkeypatch.setattr(CaseReader, "make_room", watched)
    assert train(phantoms, tmp_path / "out", sampling__cache_bytes=1)["steps"] == 27
    assert all(kept <= needed + 1 for kept, needed, _ in held)
    assert max(used for _, _, used in held) < 8 * 6 * 64 * 64 * 5


# several labels, fine-tuning


@pytest.fixture
def two_labels(own_phantoms):
    """Phantoms whose masks hold 1 in the left half of lesions and 2 in the right."""
    for path in own_phantoms.glob("*/*_mask.png"):
        mask = (np.asarray(Image.open(path)) > 0).astype(np.uint8)
        mask[:, 32:] *= 2
        Image.fromarray(mask).save(path)
    return own_phantoms


def test_fine_tuning_with_other_labels_keeps_all_but_the_head(phantoms, two_labels, tmp_path):
    first = train(phantoms, tmp_path / "first")
    tuned = configured(labels=["left", "right"], model__init=first["bundle"], model__options={})
    job = make_job(two_labels, tmp_path / "second", tuned)
    assert job.options["width"] == 4
    assert job.options["out_channels"] == 3
    from pipeline.training import initial_model

    known = load_model(load_bundle(first["bundle"])).state_dict()
    fresh = initial_model(job).state_dict()
    for name, value in fresh.items():
        assert torch.equal(value, known[name]) == (not name.startswith("head.")), name
    result = run_worker(job, device="cpu")
    assert load_bundle(result["bundle"]).labels == ("left", "right")
    assert {row["label_name"] for row in result["cases"]} == {"left", "right"}


def test_heads_are_taken_over_by_the_names_of_labels(two_labels, tmp_path):
    from pipeline.training import initial_model

    first = train(two_labels, tmp_path / "first", epochs=1, labels=["left", "right"])
    swapped = configured(
        labels=["right", "new", "left"], model__init=first["bundle"], model__options={}
    )
    masks = list(two_labels.glob("*/*_mask.png"))
    for path in masks:
        mask = np.asarray(Image.open(path)).copy()
        mask[:3][mask[:3] == 0] = 3
        Image.fromarray(mask).save(path)
    job = make_job(two_labels, tmp_path / "second", swapped)
    known = load_model(load_bundle(first["bundle"])).head.weight
    fresh = initial_model(job).head.weight
    assert torch.equal(fresh[[0, 1, 3]], known[[0, 2, 1]])


def test_a_relative_bundle_is_found_from_wherever_workers_run(phantoms, tmp_path, monkeypatch):
    train(phantoms, tmp_path / "first", epochs=1)
    monkeypatch.chdir(tmp_path)
    tuned = configured(model__init="first/bundle", model__options={})
    job = make_job(phantoms, tmp_path / "second", tuned)
    monkeypatch.chdir("/")
    assert run_worker(job, device="cpu") is not None


def test_initial_weights_that_do_not_fit_are_refused(phantoms, tmp_path):
    first = train(phantoms, tmp_path / "first", epochs=1)
    for options, message in (
        ({"in_channels": 3}, r"takes 1 channels, this training 3"),
        ({"width": 8}, r"of another architecture"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_job(
                phantoms,
                tmp_path / "second",
                configured(model__init=first["bundle"], model__options=options),
            )


# bad input


def test_no_masks_at_all(phantoms, tmp_path):
    with pytest.raises(SourceError, match="no reference masks"):
        make_job(
            phantoms, tmp_path / "out", configured(source__masks="{case}/{case}_{slice}_x.png")
        )


def test_a_value_outside_the_labels(two_labels, tmp_path):
    with pytest.raises((SourceError, TooManyBadImages), match="ClassOutOfRange"):
        make_job(two_labels, tmp_path / "out", configured(source__mask_values="0=0,1=1,2=2"))


def test_one_class_only(own_phantoms, tmp_path):
    for path in own_phantoms.glob("*/*_mask.png"):
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    with pytest.raises(SourceError, match="no reference mask has a pixel of 'lesion'"):
        make_job(own_phantoms, tmp_path / "out", configured())


def test_nobody_to_judge_by(phantoms, tmp_path):
    config = configured(split__validation_patients=[], split__validation=0.0)
    with pytest.raises(ConfigError, match="no patient is left for validation"):
        make_job(phantoms, tmp_path / "out", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.clip_norm": float("nan")}, "optimizer.clip_norm = nan is not a finite number"),
        ({"loss.smooth": float("inf")}, "is not a finite number"),
        ({"loss.focal_gamma": -3.0}, "focal_gamma cannot be negative"),
        ({"model.options": {"dropout": 7.0}}, r"dropout must be in \[0, 1\)"),
        ({"model.options": {"in_channels": 10**9}}, "too large"),
        ({"model.options": {"out_channels": 5}}, "1 labels need 1: leave it out"),
        ({"seed": 2**63}, "seed is between"),
        ({"sampling.slices_per_epoch": 10**14}, "absurd"),
        ({"epochs": 10**22}, "sane"),
        ({"labels": [" "]}, "cannot be a name"),
        ({"name": "a/b"}, "cannot be a name"),
        ({"source.mask_values": "0=0,255=300"}, "labels are 0 to 254"),
        ({"resources.workers": 5}, "5 workers cannot share a batch of 4"),
        ({"sampling.patch": 4, "batch_size": 1}, "cannot be trained on 1 slices of 4 x 4"),
    ],
)
def test_requests_that_cannot_work_are_told_before_anything_is_written(
    changes, message, phantoms, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        make_job(phantoms, tmp_path / "out", load_config(TrainConfig, options=SMALL | changes))
    assert not (tmp_path / "out").exists()


def test_a_split_that_cannot_work_is_told_before_an_image_is_opened(phantoms, tmp_path):
    config = configured(split__validation_patients=[], split__validation=0.0)
    with pytest.raises(ConfigError, match="no patient is left for validation"):
        preparation.check_request(str(phantoms), str(tmp_path / "out"), config)


def test_an_empty_source(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SourceError, match="holds no image"):
        make_job(tmp_path / "nothing", tmp_path / "out", configured())


def test_fewer_slices_than_a_batch(phantoms, tmp_path):
    with pytest.raises(ConfigError, match="smaller than one batch of 64"):
        make_job(phantoms, tmp_path / "out", configured(batch_size=64))


def test_slices_of_several_sizes_need_a_patch(own_phantoms, tmp_path):
    for path in (own_phantoms / "phantom_0001").iterdir():
        Image.open(path).crop((0, 0, 48, 32)).save(path)
    with pytest.raises(ConfigError, match=r"2 sizes .*set sampling\.patch"):
        make_job(own_phantoms, tmp_path / "out", configured())
    assert train(own_phantoms, tmp_path / "out", epochs=1, sampling__patch=48)["steps"] == 9


def test_bad_images_are_left_out_counted_and_stop_above_the_share(own_phantoms, tmp_path):
    for number in (1, 2):
        (own_phantoms / "phantom_0000" / f"phantom_0000_{number}.png").write_bytes(b"rubbish")
    config = configured(max_bad_share=0.03)
    with pytest.raises(TooManyBadImages, match=r"2 of 48 images .*2 NotAnImage"):
        make_job(own_phantoms, tmp_path / "a", config)
    job = make_job(own_phantoms, tmp_path / "b", configured())
    counts = preparation.count_index(preparation.read_index(job.out), 1)
    assert [item[2] for item in counts.bad] == [ErrorClass.NOT_AN_IMAGE] * 2
    result = run_worker(job, device="cpu")
    assert result["bad"] == {"NotAnImage": 2}
    assert [item[:2] for item in result["bad_images"]] == [
        ["phantom_0000", "1"],
        ["phantom_0000", "2"],
    ]
    assert preparation.finished_result(job.out)["bad"] == result["bad"]


def test_a_case_that_changes_while_training_is_left_out_and_told(own_phantoms, tmp_path):
    job = make_job(own_phantoms, tmp_path / "out", configured(max_bad_share=0.3))
    changed = own_phantoms / "phantom_0002" / "phantom_0002_3.png"
    Image.fromarray(255 - np.asarray(Image.open(changed))).save(changed)
    (own_phantoms / "phantom_0007" / "phantom_0007_1.png").unlink()
    result = run_worker(job, device="cpu")
    assert list(result["bad_cases"]) == ["phantom_0002", "phantom_0007"]
    assert {row["case_id"] for row in result["cases"]} == {"phantom_0006"}
    strict = dataclasses.replace(
        job, out=str(tmp_path / "strict"), config=configured(max_bad_share=0.01)
    )
    shutil.copytree(tmp_path / "out", tmp_path / "strict", ignore=shutil.ignore_patterns("check*"))
    with pytest.raises(TooManyBadImages, match="2 cases .*phantom_0002: ChangedDuringRun"):
        run_worker(strict, device="cpu")
