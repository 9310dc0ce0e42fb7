"""The nightly command as a user runs it: killed anywhere, started twice, read by machines."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import results, runs, upkeep

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "without_ray.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
POINTS = [
    "after-plan",
    "mid-segment",
    "before-commit",
    "between-commits",
    "before-publication",
    "after-commit",
    "before-report",
    "mid-collect",
]


@pytest.fixture
def nightly(own_phantoms, tmp_path, demo_bundle):
    """A source with one published night of half of it, and the command of the next one."""
    out = tmp_path / "results"
    file = tmp_path / "nightly.toml"
    file.write_text(
        f'source = "{own_phantoms}"\nresults = "{out}"\nbundle = "{demo_bundle}"\n'
        "[report]\nworst_cases = 0\n"
        '[segment.source]\nimages = "{case}/{case}_{slice}.png"\n'
        'masks = "{case}/{case}_{slice}_mask.png"\n'
    )
    return out, [sys.executable, str(SCRIPT)], ["nightly", "--config", str(file), "--json"]


def run(command, check=True):
    return subprocess.run(command, env=ENVIRONMENT, check=check, capture_output=True, text=True)


def check_whole(out, night, read_rows):
    """One night that holds all images once, tables that belong together, and nothing open."""
    masks = [row["image_id"] for row in read_rows(out, "masks")]
    metrics = [row["image_id"] for row in read_rows(out, "metrics")]
    assert len(masks) == len(set(masks)) == 48
    assert sorted(masks) == sorted(metrics)
    assert results.latest_night_number(str(out)) == night
    assert runs.open_runs(str(out)) == []
    checked = upkeep.verify_checksums(str(out))
    assert (checked.damaged, checked.unsealed) == ((), ())
    run_id = results.open_night(str(out)).metadata["run_id"]
    assert (out / "_runs" / run_id / "report.html").exists()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "points", [POINTS[1:6:2], pytest.param(POINTS, marks=pytest.mark.storm)], ids=["some", "all"]
)
def test_killed_anywhere_the_same_command_finishes_the_night(nightly, points, read_rows):
    out, program, command = nightly
    for number, point in enumerate(points):
        shutil.rmtree(out, ignore_errors=True)
        killed = run([*program, point, *command], check=False)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
        told = json.loads(run([*program, "-", *command]).stdout)
        assert told["night"] == 0, (number, point)
        check_whole(out, 0, read_rows)
        again = json.loads(run([*program, "-", *command]).stdout)
        assert (again["published"], again["computed_images"]) == (False, 0)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.storm)])
def test_two_commands_started_at_once(nightly, own_phantoms, rounds, read_rows):
    """One publishes; the other finds nothing to do, or says in a sentence who is at it."""
    out, program, command = nightly
    for night in range(rounds):
        if night:
            name = own_phantoms / "phantom_0000" / f"phantom_0000_{night}.png"
            shutil.copy(own_phantoms / "phantom_0001" / "phantom_0001_2.png", name)
        both = [
            subprocess.Popen(
                [*program, "-", *command],
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        answers = [process.communicate(timeout=300) for process in both]
        published = 0
        for process, (told, complaint) in zip(both, answers, strict=True):
            if process.returncode == 0:
                published += json.loads(told)["computed_images"] > 0
            else:
                assert process.returncode == 1
                assert "is running a night" in complaint
                assert complaint.count("\n") == 1
        assert published == 1
        check_whole(out, night, read_rows)


@pytest.mark.timeout(600)
def test_a_refusal_exits_4_and_the_rest_of_the_commands(
    nightly, tmp_path, altered_bundle, demo_bundle
):
    out, program, command = nightly
    program = [*program, "-"]
    run([*program, *command])
    blind = altered_bundle(demo_bundle, tmp_path / "blind", -30.0)
    refused = run([*program, *command[:-1], "--set", f"bundle={blind}"], check=False)
    assert refused.returncode == 4
    assert refused.stdout.startswith(
        "REFUSED by the gate, night 0 stays published: the share of cases"
    )
    assert refused.stderr.startswith("reseg: not published: ")
    run_id = refused.stdout.split(f"reseg publish {out} ")[1].split()[0]
    published = run([*program, "publish", out, run_id, "--because", "trial"])
    assert "Published night 1" in published.stdout
    compared = json.loads(run([*program, "diff", out, "--json"]).stdout)
    assert (compared["from"], compared["to"], compared["cases"]["recomputed"]) == (0, 1, 8)
    assert len(compared["rows"]) == 8
    rolled = json.loads(
        run([*program, "rollback", out, "--to", "0", "--because", "x", "--json"]).stdout
    )
    assert (rolled["night"], rolled["images"]) == (2, 48)
    told = run([*program, "history", out]).stdout
    assert "rolled back to 0: x" in told
    assert "published over the gate: trial" in told
    verified = run([*program, "verify", out, "--sample", "5", "--checksums", "--json"])
    assert json.loads(verified.stdout)["recomputed"]["equal"] == 5
    (part,) = list((out / "masks").glob("*.parquet"))[:1]
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert run([*program, "verify", out, "--checksums"], check=False).returncode == 1
    dry = run([*program, "vacuum", out, "--keep", "1"]).stdout
    assert "Nothing was deleted" in dry
    assert part.exists()
