"""`reseg submit` and `reseg jobs` on a cluster that asks for a token."""

import json
import subprocess
import sys
import time

import pytest
from token_cluster import token_head

CANARY = "CANARY-that-nobody-may-see"
IMAGES = ("--images", "{case}/{case}_{slice}.png", "--masks", "{case}/{case}_{slice}_mask.png")


@pytest.fixture(scope="module")
def head():
    with token_head() as started:
        yield started


@pytest.fixture(scope="module")
def run(head, reseg):
    """Run a program as a user with the token, and with a secret, would."""

    def start(*words, program=None, **changes):
        environment = head.environment(
            RAY_API_SERVER_ADDRESS=head.url,
            AWS_SECRET_ACCESS_KEY=CANARY,
            AWS_SESSION_TOKEN=CANARY,
            AWS_REGION="eu-nowhere-1",
        )
        return subprocess.run(
            [*(program or reseg), *map(str, words)],
            env=environment | changes,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
        )

    return start


@pytest.fixture(scope="module")
def work(phantoms, demo_bundle, tmp_path_factory):
    """The words of a small run; its results."""
    results = tmp_path_factory.mktemp("submit") / "r"
    return ("segment", phantoms, results, "--bundle", demo_bundle, *IMAGES), results


@pytest.fixture(scope="module")
def finished(run, work):
    words, _ = work
    done = run("submit", "--follow", *words, "--run-id", "night-1", "--limit", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_run_sent_to_the_cluster_publishes_and_its_log_is_seen(finished, work, read_digests):
    assert "Published night 0" in finished.stdout
    assert finished.stderr.splitlines()[-1] == "night-1: succeeded"
    assert len(read_digests(work[1])) == 18


def test_the_same_run_is_refused_by_name_and_listed_with_its_owner(finished, run, work):
    again = run("submit", *work[0], "--run-id", "night-1")
    assert again.returncode == 2
    assert "night-1 was submitted before and has succeeded" in again.stderr
    listed = json.loads(run("jobs", "list", "--json").stdout)["jobs"]
    assert [(job["id"], job["status"], job["exit_code"]) for job in listed] == [
        ("night-1", "SUCCEEDED", 0)
    ]
    assert listed[0]["operator"]


def test_without_the_token_nobody_gets_in(head, run, work, tmp_path):
    refused = run("submit", *work[0], RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert refused.returncode == 2 and "there is none" in refused.stderr
    refused = run("submit", *work[0], RAY_AUTH_TOKEN="guessed")
    assert refused.returncode == 2 and "not that of the cluster" in refused.stderr
    assert "guessed" not in refused.stderr and "Traceback" not in refused.stderr
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.url]
    bare = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_MODE": "disabled"}
    refused = run("--", "touch", str(tmp_path / "touched"), program=ray, **bare)
    assert refused.returncode != 0 and "Missing authentication token" in refused.stderr
    assert not (tmp_path / "touched").exists()


def test_a_doctor_looks_at_the_cluster_through_its_dashboard(run, head, tmp_path):
    done = run("doctor", "--address", head.url, "--json", tmp_path, tmp_path / "to-come")
    told = json.loads(done.stdout)
    assert len(told["nodes"]) == 1, done.stdout
    seen = [finding["seen"] for finding in told["findings"]]
    assert f"{tmp_path} is shared by 1 node and the head, both ways" in seen
    assert any("to-come does not exist yet" in text for text in seen)
    assert sum(text.startswith("here: ") for text in seen) >= 3
    missing = run("doctor", "--address", head.url, "--json", tmp_path / "no" / "folder")
    assert missing.returncode == 1 and "nor does the folder" in missing.stdout


def test_who_names_a_token_shows_it_to_the_head_too(run, head, work, tmp_path):
    """And is told which address is for what."""
    done = run("doctor", "--address", head.address, tmp_path)
    assert "1 node answered" in done.stdout, done.stdout + done.stderr
    url = run(*work[0], "--address", head.url)
    assert url.returncode == 2 and "`reseg submit`" in url.stderr


def test_the_exit_code_is_true_and_a_failed_run_may_go_again(run, work, tmp_path, monkeypatch):
    """From a configuration that travels; its own exit code 2, which Ray's client would make a 1."""
    (tmp_path / "night.toml").write_text(
        f'source = "none"\nresults = "{tmp_path}/r"\nbundle = "{work[0][4]}"\n'
    )
    monkeypatch.chdir(tmp_path)
    words = ("--json", "nightly", "--config", "night.toml", "--run-id", "doomed")
    done = run("submit", "--follow", *words)
    told = json.loads(done.stdout)
    assert done.returncode == 2, done.stderr
    assert (told["id"], told["status"], told["exit_code"]) == ("doomed", "FAILED", 2)
    assert f"{tmp_path}/none is not a folder that exists" in done.stderr
    assert json.loads(run("submit", *words).stdout)["id"] == "doomed.2"


def test_a_secret_of_the_sender_is_nowhere(finished, run, head, work):
    """After all others here: in what was printed, in Ray's session folder, in the results."""
    unknown = run("jobs", "logs", "unknown", "--follow")
    assert unknown.returncode == 2 and "knows no job unknown" in unknown.stderr
    token = head.token_path.read_text()
    assert not {CANARY, token} & set(finished.stdout.split() + finished.stderr.split())
    seen_region = False
    for root in (head.folder, work[1]):
        for file in root.rglob("*"):
            if file.is_file() and not file.is_symlink():
                data = file.read_bytes()
                assert CANARY.encode() not in data, file
                assert token.encode() not in data, file
                seen_region = seen_region or b"eu-nowhere-1" in data
    assert seen_region  # else the folder that was searched holds no environment at all


@pytest.mark.storm
def test_a_training_that_is_stopped_keeps_its_checkpoint_and_goes_on(run, phantoms, tmp_path):
    words = ["train", phantoms, tmp_path / "t", *IMAGES, "--set", "resources.threads=1"]
    words += ["--set", "model.options.width=4", "--set", "split.validation=0.5", "--epochs", 2000]
    sent = json.loads(run("submit", "--json", *words).stdout)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "t").rglob("*.safetensors")):
        assert time.monotonic() < deadline, run("jobs", "logs", sent["id"]).stdout
        time.sleep(1)
    busy = run("submit", *words)
    assert busy.returncode == 2 and "on this cluster already, running" in busy.stderr
    stopped = run("jobs", "stop", sent["id"], "--json")
    assert json.loads(stopped.stdout)["status"] == "STOPPED", stopped.stderr
    assert "takes up where it stopped" in run("jobs", "logs", sent["id"]).stdout
    again = json.loads(run("submit", "--json", *words).stdout)
    assert again["id"] == f"{sent['id']}.2"
    assert json.loads(run("jobs", "stop", again["id"], "--json").stdout)["was_running"]
