"""The command line as a user meets it: a fresh process, a folder, an exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ["--images", "{case}/{case}_{slice}.png", "--masks", "{case}/{case}_{slice}_mask.png"]


def call(reseg, *arguments, cwd=None, timeout=240, **environment):
    return subprocess.run(
        [*reseg, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_help_is_fast_and_needs_neither_torch_nor_ray(reseg):
    started = time.monotonic()
    found = call(reseg, "--help")
    assert time.monotonic() - started < 1.5
    assert found.returncode == 0
    for name in (
        "demo",
        "inspect",
        "shard",
        "plan",
        "segment",
        "train",
        "evaluate",
        "bundle",
        "history",
        "paths",
        "explain",
        "show",
    ):
        assert name in found.stdout
        assert call(reseg, name, "--help").returncode == 0
    code = "import sys, jobs.cli; assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_command_is_a_module(reseg, tmp_path):
    found = call([sys.executable, "-m", "jobs.plan"], "--help", cwd=tmp_path)
    assert found.returncode == 0
    assert "Exit codes" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["segment", "NONE", "OUT", "--bundle", "BUNDLE"], "not a folder that exists"),
        (["train", "NONE", "OUT"], "not a folder that exists"),
        (
            ["train", "SOURCE", "OUT", "--images", "{case}/{case}_{slice}.png"],
            "training needs them",
        ),
        (["train", "SOURCE", "OUT"], "no reference masks"),
        (["train", "SOURCE", "SOURCE/x"], "inside the source"),
        (["train", "SOURCE", "FILE/x"], "is a file"),
        (["evaluate", "NONE", "--bundle", "BUNDLE"], "not a folder that exists"),
        (["evaluate", "SOURCE", "--bundle", "NONE"], "is not a bundle"),
        (["segment", "SOURCE", "OUT", "--bundle", "NONE"], "is not a bundle"),
        (["segment", "SOURCE", "OUT", "--bundle", "BUNDLE", "--images", "x.png"], "has no {case}"),
        (
            ["segment", "SOURCE", "OUT", "--bundle", "BUNDLE", "--images", "{case}.gif"],
            "holds no image",
        ),
        (
            ["segment", "SOURCE", "OUT", "--bundle", "BUNDLE", "--set", "infrence.tta=true"],
            "unknown key 'infrence'",
        ),
        (["segment", "SOURCE", "FILE/x", "--bundle", "BUNDLE"], "is a file"),
        (["segment", "SOURCE", "SOURCE/x", "--bundle", "BUNDLE"], "inside the source"),
        (
            ["segment", "SOURCE", "OUT", "--bundle", "BUNDLE", "--config", "NONE"],
            "cannot read the configuration",
        ),
        (["segment", "SOURCE", "OUT", "--bundle", "BUNDLE", "--run-id", "../x"], "--run-id"),
        (
            ["segment", "SOURCE", "OUT", "--bundle", "BUNDLE", "--max-bad-share", "7"],
            "between 0 and 1",
        ),
        (["segment", "http://h/x", "OUT", "--bundle", "BUNDLE"], "scheme 'http'"),
        (["segment", "SOURCE"], "Missing argument"),
        (["history", "OUT"], "no published night"),
        (["paths", "OUT"], "no published night"),
        (["show", "OUT", "x", "-o", "y.png"], "no published night"),
        (["shard", "NONE", "OUT"], "not a folder that exists"),
        (["inspect", "FILE"], "is a file"),
        (["bundle", "verify", "NONE"], "is not a bundle"),
        (["bundle", "import", "--from", "buda", "NONE", "OUT"], "is not a file"),
        (["segmnt"], "No such command"),
    ],
)
def test_wrong_requests_end_with_2_in_a_sentence_and_create_nothing(
    phantoms, demo_bundle, tmp_path, arguments, words, monkeypatch, capfd
):
    (tmp_path / "file").write_text("x")
    names = {
        "NONE": tmp_path / "none",
        "OUT": tmp_path / "out",
        "SOURCE": phantoms,
        "SOURCE/x": phantoms / "x",
        "BUNDLE": demo_bundle,
        "FILE": tmp_path / "file",
        "FILE/x": tmp_path / "file" / "x",
    }
    from jobs.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reseg", *(str(names.get(a, a)) for a in arguments)])
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - started < 6
    out, err = capfd.readouterr()
    assert ended.value.code == 2, err
    assert words in err
    assert out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_the_demo_trains_and_shows_what_it_promises(reseg, tmp_path):
    found = call(reseg, "demo", "--out", "d", "--cases", "6", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    demo = json.loads(found.stdout)
    assert found.stderr == ""
    assert demo["mean_dice"] >= 0.9
    assert demo["computed_images"] == 72
    assert demo["training"]["mean_dice"] >= 0.9
    assert demo["training"]["bundle"].startswith(str(tmp_path))
    from PIL import Image

    picture = Image.open(tmp_path / "d" / "overlay.png")
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {(235, 64, 52), (76, 217, 100)} <= colours
    again = call(reseg, "demo", "--out", "d", "--cases", "6", cwd=tmp_path)
    assert again.stdout.count("Nothing to do") == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.docx").write_text("x")
    refused = call(reseg, "demo", "--out", "mine", cwd=tmp_path)
    assert refused.returncode == 2
    assert "is not a demo" in refused.stderr


def test_the_quick_demo_uses_the_bundle_that_ships(reseg, tmp_path):
    found = call(reseg, "demo", "--quick", "--out", "d", "--cases", "3", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["mean_dice"] >= 0.9
    assert not (tmp_path / "d" / "training").exists()


def test_an_evaluation_from_the_command_line(reseg, phantoms, demo_bundle, tmp_path):
    common = ["evaluate", phantoms, "--bundle", demo_bundle, *PATTERNS]
    found = json.loads(call(reseg, *common, "--json", cwd=tmp_path).stdout)
    assert {"case_id", "label", "dice", "hd95"} <= set(found["cases"][0])
    assert found["mean_dice_low"] < found["mean_dice"] < found["mean_dice_high"]
    again = call(reseg, *common, cwd=tmp_path)
    assert f"mean Dice {found['mean_dice']:.4f} (95 % interval" in again.stdout
    folder = tmp_path / "reseg-evaluation"
    assert {".reseg-evaluation", "cases.csv", "dice.png", "evaluation.json", "results"} == {
        path.name for path in folder.iterdir()
    }


def test_a_night_from_the_command_line(reseg, own_phantoms, demo_bundle, tmp_path):
    out = tmp_path / "results"
    common = [own_phantoms, out, "--bundle", demo_bundle, *PATTERNS, "--json"]
    planned = json.loads(call(reseg, "plan", *common).stdout)
    assert planned["cases"]["new"] == 8
    assert not out.exists()
    done = json.loads(call(reseg, "segment", *common).stdout)
    assert {"run_id", "night", "cases", "images", "computed_images", "seconds"} <= set(done)
    assert (done["night"], done["computed_images"]) == (0, 48)
    assert json.loads(call(reseg, "plan", *common).stdout)["cases"]["unchanged"] == 8
    paths = json.loads(call(reseg, "paths", out, "--json").stdout)
    import duckdb
    import pandas
    from deltalake import DeltaTable

    counted = duckdb.sql(
        "select count(*), count(distinct image_id) from read_parquet(?)", params=[paths["masks"]]
    )
    assert counted.fetchall() == [(48, 48)]
    assert len(DeltaTable(str(out / "cases")).to_pandas()) == 8
    assert isinstance(DeltaTable(str(out / "metrics")).to_pandas(), pandas.DataFrame)
    lineage = json.loads(call(reseg, "explain", out, "phantom_0003/4", "--json").stdout)
    assert lineage["computed_by"]["bundle"]["name"] == "demo-phantom"
    assert lineage["image"]["input_sha256"]
    assert lineage["image"]["numerics"].startswith("cpu-fp32-b2-t1-torch")
    assert "input_sha256" in call(reseg, "explain", out, "phantom_0003/4").stdout
    shown = call(reseg, "show", out, "phantom_0003/4", "-o", tmp_path / "o.png")
    assert shown.returncode == 0, shown.stderr
    assert call(reseg, "show", out, "phantom_0003/4", "-o", tmp_path / "o.png").returncode == 2
    assert call(reseg, "show", out, "no/such", "-o", tmp_path / "p.png").returncode == 2
    assert "phantom" in call(reseg, "inspect", own_phantoms, *PATTERNS).stdout
    assert "demo-phantom" in call(reseg, "history", out).stdout


def _wait_for(condition, timeout=200):
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout
        time.sleep(0.05)


@pytest.mark.parametrize(
    "how",
    [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.storm)],
)
def test_a_stopped_run_is_resumed_and_loses_nothing(
    reseg, tmp_path, demo_bundle, how, segment_here, config, read_digests
):
    from pipeline.results import latest_night_number
    from pipeline.synthetic import write_phantoms

    source, out = tmp_path / "source", tmp_path / "results"
    write_phantoms(source, range(40), num_slices=10, side=96)
    command = [*reseg, "segment", source, out, "--bundle", demo_bundle, *PATTERNS, "--actors", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*map(str, command)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    _wait_for(lambda: len(list(out.glob("_runs/*/receipts/*.json"))) >= 2)
    process.send_signal(how)
    _, told = process.communicate(timeout=120)
    if how != signal.SIGKILL:
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how]
        assert told.strip() == b"interrupted; the same command takes up where it stopped"
    os.killpg(process.pid, signal.SIGKILL) if how == signal.SIGKILL else None
    assert latest_night_number(str(out)) is None
    finished = call(reseg, *map(str, command[len(reseg) :]), "--json")
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout)
    assert summary["resumed"]
    assert len(list(out.glob("_runs/2*"))) == 1
    segment_here(str(source), str(tmp_path / "expected"), demo_bundle, config())
    assert read_digests(out) == read_digests(tmp_path / "expected")
