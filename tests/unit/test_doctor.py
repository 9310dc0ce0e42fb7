"""What the doctor says of made-up clusters, and what one machine really reports."""

import http.server
import json
import os
import threading
from dataclasses import replace

import pytest
from click.testing import CliRunner

from pipeline import storage, symptoms
from pipeline.diagnosis import Clock, Evidence, Node, diagnose, judge_folders
from pipeline.errors import ConfigError
from pipeline.flows.doctor import run_doctor
from pipeline.symptoms import Folder, Request

GIB = 1 << 30
VERSIONS = {
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.13.0+cpu",
    "pyarrow": "26.0.1",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "deltalake": "1.6.6",
    "obstore": "0.12.1",
    "reseg": "0.1.0",
    "code": "c0de",
}
MACHINE = {
    "memory_bytes": 64 * GIB,
    "available_bytes": 32 * GIB,
    "shm_bytes": 20 * GIB,
    "spill_folder": "/tmp/ray/session",
    "disk_bytes": 100 * GIB,
    "disk_free_bytes": 50 * GIB,
    "files_soft": 65536,
    "files_hard": 65536,
}
NO_GPU = {"torch": "2.13.0+cpu", "cuda": None, "driver": None, "devices": [], "failures": []}
WITH_GPU = {
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "driver": "580.95.05",
    "devices": ["NVIDIA H100", "NVIDIA H100"],
    "failures": [],
    "warnings": [],
}
STORE = {"put_if_absent": True, "read_after_write": True, "seconds": 0.2}
SHARED = Folder(location="/data", folder="/data", token=".reseg-probe-1")


def node(name: str, *, driver: bool = False, gpus: float = 0, **looks) -> Node:
    """A machine on which all is well but for what is said of it."""
    report = {
        "versions": VERSIONS,
        "machine": MACHINE,
        "gpus": WITH_GPU if gpus else NO_GPU,
        "decoder": {"seconds": 0.2},
        "session": {"token": True},
        "token": {"path": "~/.ray/auth_token", "mode": 0o600},
        "folders": {"/data": {"found": True, "answered": True}},
        "stores": {"s3://bucket/x": STORE},
    }
    if driver:
        report = {"versions": VERSIONS, "stores": report["stores"]}
    report |= looks
    return Node(name=name, report=report, driver=driver, gpus=gpus, object_store_bytes=10 * GIB)


def cluster(*changed: Node, **evidence) -> Evidence:
    """Two sound nodes and the driver, with one machine more for each that is changed."""
    nodes = (node("here", driver=True), node("one"), node("two", gpus=2), *changed)
    evidence.setdefault("ranges", {"python": ">=3.11,<3.14", "torch": ">=2.11,<2.14"})
    return Evidence(nodes=nodes, **evidence)


def bad(evidence: Evidence) -> list[tuple[str, str, str]]:
    return [
        (item.level, item.check, f"{item.seen} -> {item.advice}")
        for item in diagnose(evidence)
        if item.level != "ok"
    ]


def only(evidence: Evidence, level: str, check: str, *words: str) -> None:
    """Exactly one finding that is not ok, of this level, with these words."""
    (found,) = bad(evidence)
    assert found[:2] == (level, check)
    for word in words:
        assert word in found[2]


def test_a_sound_cluster_has_no_finding_but_good_ones():
    evidence = cluster(
        folders=(SHARED,),
        arrived={"/data": frozenset({"one", "two"})},
        stores=("s3://bucket/x",),
        clocks={"one": Clock(skew_s=0.002, uncertainty_s=0.003)},
    )
    assert bad(evidence) == []
    said = {item.check: item.seen for item in diagnose(evidence)}
    assert said["nodes"] == "2 nodes answered"
    assert "2 x NVIDIA H100 (driver 580.95.05, CUDA 13.0) on two" in said["GPUs"]
    assert said["folders"] == "/data is shared by 2 nodes and this machine, both ways"
    assert "within 0.005 s of this machine" in said["clocks"]
    assert "put-if-absent and read-after-write hold" in said["stores"]


def test_problems_come_first():
    broken = node("three", machine={**MACHINE, "files_soft": 1024}, decoder={"error": "no"})
    levels = [item.level for item in diagnose(cluster(broken))]
    assert levels[:2] == ["problem", "warning"]
    assert set(levels[2:]) == {"ok"}


@pytest.mark.parametrize(
    ("versions", "level", "words"),
    [
        ({"ray": "2.61.0"}, "problem", ["ray differs", "2.61.0 on three", "one image"]),
        ({"pillow": None}, "problem", ["pillow is not installed on three"]),
        ({"python": "3.12.1"}, "problem", ["python differs", "3.12.1 on three"]),
        ({"python": "3.11.9"}, "warning", ["patch differs", "3.11.9 on three"]),
        ({"code": "0ther"}, "problem", ["different code", "0ther on three", "same wheel"]),
    ],
)
def test_versions_that_differ_name_the_node(versions, level, words):
    only(cluster(node("three", versions=VERSIONS | versions)), level, "versions", *words)


def test_torch_for_cpus_and_for_gpus_is_the_same_torch():
    assert bad(cluster(node("three", versions=VERSIONS | {"torch": "2.13.0+cu130"}))) == []


def test_a_version_that_reseg_does_not_support_is_a_problem_even_alone():
    alone = node("here", driver=True, versions=VERSIONS | {"torch": "2.9.1"})
    evidence = Evidence(nodes=(alone,), ranges={"torch": ">=2.11,<2.14"})
    only(evidence, "problem", "versions", "torch 2.9.1 on here", ">=2.11,<2.14")


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (NO_GPU, "problem", ["gives away 2 GPUs on three", "built for CPUs", "wheel for CUDA"]),
        (
            {**WITH_GPU, "devices": [], "warnings": ["the NVIDIA driver is too old"]},
            "problem",
            ["(CUDA 13.0) sees none: the NVIDIA driver is too old", "driver 580.95.05"],
        ),
        (
            {**WITH_GPU, "devices": [], "driver": None},
            "problem",
            ["sees none", "--num-gpus 0"],
        ),
        ({**WITH_GPU, "devices": ["A"]}, "problem", ["sees 1"]),
        ({**WITH_GPU, "devices": ["A"] * 3}, "warning", ["has 3 GPUs, Ray gives 2 away"]),
        (
            {**WITH_GPU, "failures": ["0: no kernel image is available"]},
            "problem",
            ["cannot compute on GPU 0: no kernel image"],
        ),
        ({**WITH_GPU, "failures": ["1: CUDA out of memory"]}, "warning", ["end what uses the GPU"]),
        ({"driver": None, "error": "torch cannot be used: x"}, "problem", ["x (on three)"]),
    ],
)
def test_a_gpu_that_is_promised_has_to_compute(facts, level, words):
    promised = node("three", gpus=2)
    promised = replace(promised, report={**promised.report, "gpus": facts})
    only(cluster(promised), level, "GPUs", *words)


def test_a_driver_without_a_gpu_build_of_torch_is_a_warning_on_a_machine_alone():
    alone = node("here", driver=True, gpus=0)
    report = {**alone.report, "gpus": {**NO_GPU, "driver": "580.95.05"}}
    evidence = Evidence(nodes=(replace(alone, report=report),))
    only(evidence, "warning", "GPUs", "driver 580.95.05 is loaded on here", "built for CPUs")


@pytest.mark.parametrize(
    ("facts", "level", "check", "words"),
    [
        ({"disk_free_bytes": 4 * GIB}, "problem", "disk", ["96%", "4.0 GiB", "object-spilling"]),
        ({"disk_free_bytes": 12 * GIB}, "warning", "disk", ["88%"]),
        ({"disk_bytes": 12 * GIB, "disk_free_bytes": 9 * GIB}, "warning", "disk", ["9.0 GiB"]),
        ({"available_bytes": GIB}, "warning", "memory", ["1.0 GiB of 64.0 GiB"]),
        ({"shm_bytes": 64 << 20}, "warning", "memory", ["has 64 MiB", "10.0 GiB", "shm-size=10g"]),
        ({"files_soft": 1024}, "warning", "machine", ["1,024 files on three", "ulimit"]),
    ],
)
def test_a_machine_that_is_too_small(facts, level, check, words):
    only(cluster(node("three", machine=MACHINE | facts)), level, check, *words)


def test_open_files_of_a_driver_count_by_the_hard_limit_which_ray_raises_them_to():
    laptop = node("here", driver=True, machine={**MACHINE, "files_soft": 1024})
    assert bad(Evidence(nodes=(laptop,))) == []


@pytest.mark.parametrize(
    ("answer", "arrived", "words"),
    [
        ({"found": False}, {"one", "two"}, ["not shared: three cannot see the probe", "mount"]),
        (
            {"found": True, "answered": False, "failure": "Permission denied"},
            {"one", "two"},
            ["three cannot write in /data: Permission denied"],
        ),
        ({"found": True, "answered": True}, {"one", "two"}, ["what three wrote does not arrive"]),
    ],
)
def test_a_path_that_is_not_shared_names_the_nodes(answer, arrived, words):
    evidence = cluster(
        node("three", folders={"/data": answer}),
        folders=(SHARED,),
        arrived={"/data": frozenset(arrived)},
    )
    only(evidence, "problem", "folders", *words)


def test_a_hung_mount_is_not_shared_either():
    hung = node("three", folders={"error": "no answer in 54 s"})
    evidence = cluster(hung, folders=(SHARED,), arrived={"/data": frozenset({"one", "two"})})
    only(evidence, "problem", "folders", "three cannot see the probe")


def test_a_location_that_cannot_be_written_is_compared_by_what_it_lists():
    readonly = Folder(location="/data", folder="/data", seen="ab", failure="Read-only file system")
    only(cluster(folders=(readonly,)), "warning", "folders", "Read-only", "2 nodes list the same")
    other = node("three", folders={"/data": {"found": False}})
    only(cluster(other, folders=(readonly,)), "problem", "folders", "three cannot see what is here")
    gone = replace(readonly, seen="", failure="it does not exist")
    only(cluster(folders=(gone,)), "problem", "folders", "/data cannot be used: it does not exist")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"put_if_absent": False}, ["put-if-absent does not hold", "RESEG_STORE_LOCK"]),
        ({"read_after_write": False}, ["read-after-write does not hold"]),
        ({"error": "nothing answers"}, ["from three: nothing answers", "credentials"]),
        ({"error": "411 Length Required"}, ["AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"]),
    ],
)
def test_a_store_on_which_commits_are_not_safe(facts, words):
    stores = {"s3://bucket/x": facts if "error" in facts else STORE | facts}
    evidence = cluster(node("three", stores=stores), stores=("s3://bucket/x",))
    only(evidence, "problem", "stores", "s3://bucket/x", *words)


def test_a_store_that_can_only_be_read_is_fine_for_a_source():
    denied = {"s3://bucket/x": {"denied": "access denied"}}
    evidence = cluster(node("three", stores=denied), stores=("s3://bucket/x",))
    only(evidence, "warning", "stores", "listed, but not written, from three", "for a source")


@pytest.mark.parametrize(
    ("skew_s", "uncertainty_s", "level", "words"),
    [
        (4.2, 0.01, "warning", ["three is 4.2 s ahead of this machine", "0.01 s", "chrony"]),
        (-90, 0.01, "problem", ["90.0 s behind this machine"]),
        (2.0, 1.5, None, []),
    ],
)
def test_clocks_count_only_as_far_as_they_are_known(skew_s, uncertainty_s, level, words):
    evidence = cluster(clocks={"three": Clock(skew_s=skew_s, uncertainty_s=uncertainty_s)})
    if level:
        only(evidence, level, "clocks", *words)
    else:
        assert bad(evidence) == []


def test_a_clock_away_from_the_store_is_told_apart():
    away = node("three", store_clock={"skew_s": 1000.0, "uncertainty_s": 0.6})
    only(cluster(away), "problem", "clocks", "1000.0 s ahead of the object store", "15 minutes")


@pytest.mark.parametrize(
    ("statuses", "level", "words"),
    [
        ({"/api/version": 200, "/api/jobs/": 401}, "problem", ["/api/version without a token"]),
        ({"/api/version": 200, "/api/jobs/": 200}, "problem", ["/api/jobs/ and /api/version"]),
        ({"/api/version": 302, "/api/jobs/": 401}, "warning", ["answers 302", "not 401"]),
        ({"error": "Connection refused"}, "warning", ["could not be asked", "--dashboard"]),
        ({"/api/version": 401, "/api/jobs/": 403}, None, []),
    ],
)
def test_a_dashboard_has_to_refuse_strangers(statuses, level, words):
    evidence = cluster(node("head", dashboard=statuses), dashboard="http://127.0.0.1:8265")
    if level:
        only(evidence, level, "access", *words)
    else:
        assert bad(evidence) == []


def test_an_open_node_and_an_open_token_are_problems():
    open_node = node("three", session={"token": False})
    only(cluster(open_node), "problem", "access", "without a token on three", "RAY_AUTH_MODE=token")
    readable = node("three", token={"path": "~/.ray/auth_token", "mode": 0o644})
    only(cluster(readable), "problem", "access", "mode 0644", "chmod 600 ~/.ray/auth_token")


def test_a_dashboard_beyond_loopback_is_a_warning():
    statuses = {"/api/version": 401, "/api/jobs/": 401}
    evidence = cluster(node("head", dashboard=statuses), dashboard="http://10.0.0.1:8265")
    only(evidence, "warning", "access", "beyond its own machine")


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        ("no answer in 90 s", "raylet log"),
        ("ModuleNotFoundError: No module named 'pipeline'", "install the reseg of this machine"),
    ],
)
def test_a_node_that_does_not_answer_is_a_problem_by_itself(failure, advice):
    only(cluster(Node(name="three", failure=failure)), "problem", "nodes", failure, advice)


def test_a_bundle_that_differs_or_is_damaged_is_a_problem():
    good = node("three", bundle={"digest": "aa"})
    only(
        cluster(good, node("four", bundle={"digest": "bb"}), bundle="/bundle"),
        "problem",
        "bundle",
        "aa on three, bb on four",
    )
    damaged = node("four", bundle={"error": "/bundle is not a bundle"})
    only(cluster(good, damaged, bundle="/bundle"), "problem", "bundle", "(on four)", "every node")


# What one machine really reports


def test_this_machine_reports_plain_values_that_hold_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-secret")
    looks = ("versions", "machine", "decoder", "token")
    found = symptoms.look(Request(looks=looks))
    assert set(found) == set(looks)
    assert not [facts for facts in found.values() if "error" in facts]
    assert "canary" not in json.dumps(found)
    assert found["versions"]["ray"].startswith("2.")
    assert found["machine"]["disk_free_bytes"] > 0
    assert bad(Evidence(nodes=(Node(name="x", report={"versions": found["versions"]}),))) == []


def test_a_look_that_hangs_costs_only_itself(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(symptoms, "decoder", release.wait)
    found = symptoms.look(Request(looks=("versions", "decoder"), timeout_s=0.5))
    release.set()
    assert found["decoder"] == {"error": "no answer in 0.5 s"}
    assert found["versions"]["numpy"]


def test_a_shared_folder_is_answered_and_left_as_it_was(tmp_path):
    folder = symptoms.plant(str(tmp_path))
    request = Request(looks=("folders",), answer="one", folders=(folder,))
    assert symptoms.look(request)["folders"][str(tmp_path)] == {"found": True, "answered": True}
    assert symptoms.answer_arrived(folder, "one")
    symptoms.unplant(folder)
    assert os.listdir(tmp_path) == []


def test_results_that_do_not_exist_yet_are_probed_in_their_parent(tmp_path):
    folder = symptoms.plant(str(tmp_path / "results"))
    assert folder.token in os.listdir(tmp_path)
    alone = Evidence(nodes=(Node(name="here", driver=True),), folders=(folder,))
    (finding,) = judge_folders(alone)
    assert (finding.level, "does not exist yet" in finding.seen) == ("warning", True)
    symptoms.unplant(folder)
    assert os.listdir(tmp_path) == []
    assert "does not exist" in symptoms.plant(str(tmp_path / "no" / "results")).failure


def test_another_folder_of_the_same_name_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(symptoms, "_PROBE_WAIT_S", 0.0)
    folder = symptoms.plant(str(tmp_path))
    os.unlink(tmp_path / folder.token)
    found = symptoms.find_probe(folder, Request(looks=(), answer="one"))
    assert found == {"found": False, "answered": False}
    assert os.listdir(tmp_path) == []


def test_an_answer_that_comes_too_late_takes_itself_back(tmp_path, monkeypatch):
    folder = symptoms.plant(str(tmp_path))
    leave = symptoms._leave

    def late(path: str, content: str) -> None:
        symptoms.unplant(folder)
        leave(path, content)

    monkeypatch.setattr(symptoms, "_leave", late)
    symptoms.find_probe(folder, Request(looks=(), answer="one"))
    assert os.listdir(tmp_path) == []


def test_a_file_is_compared_by_its_content(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(b"one")
    folder = symptoms.plant(str(path))
    assert not folder.token and symptoms.find_probe(folder, Request(looks=()))["found"]
    path.write_bytes(b"two")
    assert not symptoms.find_probe(folder, Request(looks=()))["found"]


def test_a_store_is_asked_through_the_probe_of_storage(monkeypatch):
    def probe(uri: str) -> storage.Probe:
        if uri.endswith("gone"):
            raise ConfigError(f"{uri}/.probe-0a1b2c/one is not served")
        return storage.Probe(put_if_absent=False, read_after_write=True, seconds=0.1)

    monkeypatch.setattr(storage, "probe", probe)
    monkeypatch.setattr(storage, "list_files", lambda _: iter([]))
    found = symptoms.look(Request(looks=("stores",), stores=("s3://a/b", "s3://a/gone")))["stores"]
    assert found["s3://a/b"]["put_if_absent"] is False
    assert found["s3://a/gone"] == {"error": "s3://a/gone is not served"}
    monkeypatch.setattr(storage, "list_files", lambda _: iter(["a file"]))
    assert symptoms.probe_store("s3://a/gone") == {"denied": "s3://a/gone is not served"}


@pytest.fixture
def dashboard():
    """A server that asks for a token on one of two paths, and notes what it was sent."""
    sent = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            sent.append(dict(self.headers))
            self.send_response(200 if self.path == "/api/version" else 401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()


def test_the_dashboard_is_asked_without_a_token(dashboard, monkeypatch):
    url, sent = dashboard
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-of-a-token")
    assert symptoms.dashboard_statuses(url) == {"/api/version": 200, "/api/jobs/": 401}
    assert "canary" not in str(sent)


def test_the_clock_of_a_store_is_read_from_any_answer(dashboard, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", dashboard[0])
    found = symptoms.store_clock()
    assert abs(found["skew_s"]) <= found["uncertainty_s"] + 0.1


# The command


@pytest.fixture
def doctor(monkeypatch):
    """The command on this machine alone, without starting torch in a child."""
    from jobs.doctor import command

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.flows.doctor._in_session", lambda: False)
    monkeypatch.setattr(symptoms, "gpus", lambda _: NO_GPU)
    monkeypatch.setattr(symptoms, "machine", lambda _: MACHINE)
    monkeypatch.setattr(symptoms, "token_file", lambda: {"path": "~/.ray/auth_token", "mode": None})
    return lambda *arguments: CliRunner().invoke(command, list(map(str, arguments)))


def test_a_sound_machine_alone_ends_with_0_and_says_what_was_looked_at(doctor, tmp_path):
    found = doctor(tmp_path)
    assert found.exit_code == 0, found.output
    last = found.output.splitlines()[-1]
    assert last.startswith("All is well on this machine: ")
    assert "folders" in last and "decoder" in last
    assert os.listdir(tmp_path) == []


def test_a_problem_ends_with_1_and_comes_first(doctor, dashboard):
    found = doctor("--dashboard", dashboard[0])
    assert found.exit_code == 1
    first, second, third, *_ = found.output.splitlines()
    assert first == "Problems:"
    assert "/api/version without a token" in second
    assert third.strip().startswith("-> ")


def test_json_is_one_object(doctor, tmp_path, demo_bundle):
    found = json.loads(doctor(tmp_path, "--bundle", demo_bundle, "--json").stdout)
    assert found["healthy"] is True
    assert found["problems"] == found["warnings"] == 0
    assert {"versions", "decoder", "folders", "bundle"} <= {f["check"] for f in found["findings"]}


def test_wrong_requests_are_refused(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for request in ({"locations": ["ftp://x/y"]}, {"dashboard": "127.0.0.1:8265"}):
        with pytest.raises(ConfigError) as refused:
            run_doctor(**request)
        assert refused.value.exit_code == 2
