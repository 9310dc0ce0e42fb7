"""The doctor on real nodes: what they answer, and that one that does not never holds it up."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.flows.doctor import run_doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def findings(ray_session, monkeypatch):
    """What the doctor says of the session's cluster, by check."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*locations, **options):
        diagnosis = run_doctor([str(location) for location in locations], **options)
        found: dict[str, list] = {}
        for finding in diagnosis.findings:
            found.setdefault(finding.check, []).append(finding)
        return diagnosis, found

    return call


def test_a_node_answers_shares_a_folder_and_is_found_open(findings, tmp_path):
    diagnosis, found = findings(tmp_path)
    assert len(diagnosis.nodes) == 1
    assert found["nodes"][0].seen == "1 node answered"
    assert found["folders"][0].seen.endswith("is shared by 1 node and this machine, both ways")
    assert os.listdir(tmp_path) == []
    assert found["versions"][0].level == "ok"
    assert found["versions"][0].seen.startswith("supported, the same on 2 machines")
    assert found["clocks"][0].level == "ok"
    (access,) = found["access"]  # the tests' cluster asks for no token and has no dashboard
    assert access.level == "problem"
    assert "takes commands without a token" in access.seen
    assert not diagnosis.healthy


def test_a_node_that_does_not_answer_in_time_is_a_problem_and_no_wait(
    findings, tmp_path, monkeypatch
):
    def hang(_request):
        time.sleep(120)

    monkeypatch.setattr("pipeline.flows.doctor._look_on_node", hang)
    diagnosis, found = findings(tmp_path, timeout_s=2)
    assert found["nodes"][0].level == "problem"
    assert "no answer in 2 s" in found["nodes"][0].seen
    assert diagnosis.seconds < 60
    assert os.listdir(tmp_path) == []


@pytest.mark.storm
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_two_nodes_with_and_without_a_token(mode, tmp_path):
    """A cluster of its own in processes of its own; the GPU that it promises does not exist."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    shared = tmp_path / "shared"
    shared.mkdir()
    code = (
        "import subprocess, sys\n"
        "from ray.cluster_utils import Cluster\n"
        "small = dict(object_store_memory=100 << 20, dashboard_agent_listen_port=0)\n"
        f"head = dict(num_cpus=0, include_dashboard=True, dashboard_port={port}, **small)\n"
        "cluster = Cluster(initialize_head=True, head_node_args=head)\n"
        "cluster.add_node(num_cpus=1, num_gpus=1, **small)\n"
        "command = [sys.executable, '-m', 'jobs.doctor', '--address', cluster.address, '--json']\n"
        f"done = subprocess.run([*command, {str(shared)!r}], stdout=open({str(tmp_path / 'out')!r}, 'w'))\n"
        "cluster.shutdown()\n"
        "sys.exit(done.returncode)\n"
    )
    environment = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(token)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    found = json.loads((tmp_path / "out").read_text())
    assert len(found["nodes"]) == 2
    problems = [item for item in found["findings"] if item["level"] == "problem"]
    assert any("gives away 1 GPU" in item["seen"] for item in problems)
    open_doors = [item["seen"] for item in problems if item["check"] == "access"]
    assert len(open_doors) == (2 if mode == "disabled" else 0)
    assert os.listdir(shared) == []
