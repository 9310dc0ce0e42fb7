"""What `reseg submit` sends, to whom, and how it follows: without Ray and without a cluster."""

import json
import shlex
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import click
import pytest

import pipeline
from jobs._following import follow_job, parse
from pipeline.errors import ConfigError, StageFailed
from pipeline.flows import jobserver, submission
from pipeline.flows.jobserver import (
    Job,
    ServerLost,
    connect_server,
    find_token,
    find_url,
    follow,
    is_clear_text,
    stop_and_wait,
)
from pipeline.flows.submission import check_version, free_id, job_environment, make_submission


def submit(command, *arguments, **options):
    """As the command line does, up to sending."""
    submission.check_command(command)
    with click.Context(click.Command("submit"), info_name="reseg submit"):
        parsed = parse(command, arguments)
    options |= {"parameters": parsed.parameters, "values": parsed.values}
    return make_submission(command, parsed.given, **options)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What is sent


def test_relative_places_become_absolute_and_uris_stay(here):
    sent = submit("segment", "in", "s3://b/out", "--bundle", "../net", "--images", "{case}.png")
    assert sent.words[:2] == (str(here / "in"), "s3://b/out")
    assert sent.words[2:] == ("--bundle", str(here.parent / "net"), "--images", "{case}.png")
    assert sent.files == {}


def test_a_default_that_is_a_folder_is_said_aloud(here):
    sent = submit("evaluate", "in", "--bundle", "/net")
    assert sent.words[-2:] == ("--out", str(here / "reseg-evaluation"))
    assert "--out" not in submit("diff", "/r").words


def test_the_line_survives_a_shell(here):
    odd = "a b;$(touch x)'\"{case}"
    sent = submit("segment", odd, "r", "--bundle", "b", "--images", odd, "--run-id", "r1")
    out = subprocess.run(
        ["sh", "-c", sent.line().replace("python -m jobs.segment", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert out[:4] == ["--run-id", "r1", str(here / odd), str(here / "r")]
    assert out[-1] == odd
    assert not (here / "x").exists()


def test_what_looks_like_an_option_stays_what_it_was():
    sent = submit("publish", "/r", "--because", "-", "--", "-run")
    assert sent.words == ("--because", "-", "--", "/r", "-run")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["demo"], ConfigError, "cannot be submitted"),
        (["segment", "a", "b", "--bundel", "c"], click.UsageError, "--bundle"),
        (["segment", "a", "b"], click.UsageError, "--bundle"),
        (["segment", "a", "http://x/y", "--bundle", "c"], ConfigError, "not served"),
        (["segment", "a", "b", "--bundle", "c", "--run-id", "a/b"], ConfigError, "--run-id"),
        (["segment", "a", "b", "--bundle", "c", "--set", "x=1"], ConfigError, "unknown key 'x'"),
        (["segment", "a", "b", "--bundle", "c", "--address", "h:1"], ConfigError, "comes before"),
        (["segment", "a", "", "--bundle", "c"], ConfigError, "a path is empty"),
        (["segment", "a", "b", "--bundle", "c", "--follow"], click.UsageError, "comes before"),
        (["segment", "a", "b", "--bundle", "c", "--max-bad-share", "7"], ConfigError, "0 and 1"),
        (["segment", "a", "b", "--bundle", "c", "--images", "{foo}"], ConfigError, "{foo}"),
        (["train", "a", "b", "--mask-values", "a=b"], ConfigError, "not of the form 0=0"),
        (["train", "a", "b", "--workers", "3", "--set", "batch_size=2"], ConfigError, "batch"),
        (["segment", "a", "b", "--bundle", "c", "--nodes-like", "x"], ConfigError, "KEY=VALUE"),
        (["nightly", "--nodes-like", "bad key!=v"], ConfigError, "is no label of a node"),
        (["nightly"], ConfigError, "source is not said"),
        (["nightly", "--config", "none.toml"], ConfigError, "cannot read"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(words, error, message, here):
    with pytest.raises(error) as raised:
        submit(*words)
    told = getattr(raised.value, "format_message", raised.value.__str__)()
    assert message in told


NIGHT = """
source = "in"
results = "s3://b/r"
bundle = "net"
[report]
path = "page.html"
[groups]
table = "sites.csv"
"""


def test_only_the_configuration_and_its_table_travel(here):
    (here / "conf").mkdir()
    (here / "conf" / "night.toml").write_text(NIGHT)
    (here / "sites.csv").write_text("case_id,group\na,b\n")
    (here / "secret.txt").write_text("x")
    sent = submit("nightly", "--config", "conf/night.toml", "--set", "source=other")
    assert set(sent.files) == {"night.toml", "sites.csv"}
    assert sent.words[:2] == ("--config", "night.toml")
    settings = dict(w.partition("=")[::2] for w in sent.words if "=" in w)
    assert settings == {
        "source": f'"{here}/other"',
        "bundle": f'"{here}/net"',
        "report.path": f'"{here}/page.html"',
        "groups.table": '"sites.csv"',
    }


def test_what_travels_means_there_what_it_meant_here(here, tmp_path_factory, monkeypatch):
    from pipeline.config import load_config
    from pipeline.policy import NightlyConfig

    (here / "night.toml").write_text(NIGHT)
    (here / "sites.csv").write_text("case_id,group\na,b\n")
    sent = submit("nightly", "--config", "night.toml")
    there = tmp_path_factory.mktemp("there")
    for name, data in sent.files.items():
        (there / name).write_bytes(data)
    monkeypatch.chdir(there)
    config = load_config(NightlyConfig, "night.toml", sent.words[3::2])
    assert (config.source, config.bundle) == (f"{here}/in", f"{here}/net")
    assert (there / config.groups.table).read_text() == "case_id,group\na,b\n"


def test_too_much_is_not_carried(here):
    (here / "night.toml").write_text(NIGHT)
    (here / "sites.csv").write_bytes(b"x" * (1 << 20))
    with pytest.raises(ConfigError, match="at most 1,048,576 travel"):
        submit("nightly", "--config", "night.toml")


def test_without_a_folder_to_travel_in_a_configuration_becomes_settings(here):
    from pipeline.config import TrainConfig, load_config

    (here / "t.toml").write_text(
        'labels = ["a", "b c"]\nalso = ["more.toml"]\n[loss.terms]\ndice = 2.0\n'
        '[[recipe.preprocess]]\nstep = "zscore"\n[model]\ninit = "net"\n'
    )
    sent = submit("train", "in", "out", "--config", "t.toml", inline=True)
    assert sent.files == {} and "--config" not in sent.words
    config = load_config(TrainConfig, None, sent.words[3::2])
    assert config.labels == ("a", "b c")
    assert dict(config.loss.terms) == {"dice": 2.0}
    assert config.recipe.preprocess == ({"step": "zscore"},)
    assert (config.model.init, config.also) == (f"{here}/net", (f"{here}/more.toml",))
    (here / "night.toml").write_text(NIGHT)
    with pytest.raises(ConfigError, match="a pod reads it from a URI"):
        submit("nightly", "--config", "night.toml", inline=True)


def test_the_limit_of_gpus_becomes_the_commands_own():
    train = ("train", "/a", "/b")
    assert submit(*train, num_gpus=4).words[-2:] == ("--workers", "4")
    assert submit(*train, "--workers", "2", num_gpus=4).words[-2:] == ("--workers", "2")
    with pytest.raises(ConfigError, match="more than the --gpus 4"):
        submit(*train, "--set", "resources.workers=5", num_gpus=4)
    with pytest.raises(ConfigError, match="leave out --gpus"):
        submit("vacuum", "/r", num_gpus=1)


def test_segment_passes_the_limit_of_gpus_on():
    sent = submit("segment", "/a", "/b", "--bundle", "/c", num_gpus=3)
    assert sent.words[-2:] == ("--max-gpus", "3")


# Under which name


def test_a_run_is_known_by_its_id_and_a_training_by_its_folder(here):
    assert submit("segment", "a", "b", "--bundle", "c", "--run-id", "n7").name == "n7"
    fresh = submit("segment", "a", "b", "--bundle", "c")
    assert fresh.run_id == fresh.name and f"--run-id {fresh.name}" in fresh.line()
    first, again = submit("train", "a", "out/x y"), submit("train", "b", "./out/x y")
    assert first.name == again.name and first.name.startswith("train-x-y-")
    assert submit("train", "a", "out2/x y").name != first.name
    assert "--run-id" not in submit("vacuum", "r").line()
    assert submit("review", "/r", "--run-id", "n7").words == ("/r", "--run-id", "n7")


def test_a_run_goes_a_second_time_only_after_it_failed():
    sent = submit("segment", "/a", "/b", "--bundle", "/c", "--run-id", "n")
    assert free_id(sent, {}) == "n"
    assert free_id(sent, {"n": ("n", "FAILED")}) == "n.2"
    assert free_id(sent, {"n": ("n", "FAILED"), "n.2": ("n", "STOPPED")}) == "n.3"
    assert free_id(sent, {"n": ("n", "FAILED"), "n.2": ("n.2", "RUNNING")}) == "n.3"
    for status in ("PENDING", "RUNNING"):
        with pytest.raises(
            ConfigError, match=r"n is on this cluster .* as job n\.2.*jobs stop n\.2"
        ):
            free_id(sent, {"n": ("n", "FAILED"), "n.2": ("n", status)})
    with pytest.raises(ConfigError, match="n was submitted .* succeeded; .* another --run-id"):
        free_id(sent, {"n": ("n", "SUCCEEDED")})


def test_a_lost_race_for_the_id_is_the_same_sentence():
    sent = submit("segment", "/a", "/b", "--bundle", "/c", "--run-id", "n")
    answer = (
        "Request failed with status code 400: ValueError: Job with submission_id n already exists."
    )
    with (
        pytest.raises(ConfigError, match=r"n is on this cluster already.*reseg jobs stop n"),
        jobserver._asking("http://h", "n", sent),
    ):
        raise RuntimeError(answer)


# With what


def test_the_environment_carries_addresses_and_no_secret():
    environment = {
        "AWS_ENDPOINT_URL": "http://store:8333",
        "AWS_REGION": "eu",
        "AWS_ACCESS_KEY_ID": "CANARY",
        "AWS_SECRET_ACCESS_KEY": "CANARY",
        "AWS_SESSION_TOKEN": "CANARY",
        "RAY_AUTH_TOKEN": "CANARY",
        "RESEG_API_TOKEN": "CANARY",
        "RESEG_OF_SOMEBODY": "CANARY",
        "RESEG_TRACEBACK": "1",
        "HOME": "/root",
    }
    sent = job_environment(environment)
    assert "CANARY" not in sent.values()
    assert sent["AWS_ENDPOINT_URL"] == "http://store:8333" and sent["RESEG_TRACEBACK"] == "1"
    assert sent["RESEG_VERSION"] == pipeline.__version__
    assert not sent.keys() & {"HOME", "RAY_AUTH_TOKEN"}
    for endpoint in ("http://me:hidden@store", "http://store/?sig=hidden", "http://store#hidden"):
        with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL holds a user name") as raised:
            job_environment({"AWS_ENDPOINT_URL": endpoint})
        assert "hidden" not in str(raised.value)


def test_a_job_ends_at_once_on_a_cluster_of_another_version():
    check_version({})
    check_version({"RESEG_VERSION": pipeline.__version__})
    with pytest.raises(ConfigError, match="sent by reseg 9.9"):
        check_version({"RESEG_VERSION": "9.9"})


def test_a_job_computes_on_the_cluster_that_ray_names(monkeypatch):
    import ray

    from pipeline.flows.cluster import connect

    # as other tests of this process left it
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"cannot connect to Ray at '127\.0\.0\.1:1'"):
        connect(None, 1).__enter__()
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"URL of a dashboard.* `reseg submit`"):
        connect(None, 1).__enter__()


# To whom


def test_the_address_is_the_dashboards():
    assert find_url("http://h:8265/", {}) == "http://h:8265"
    assert (
        find_url(None, {"RAY_ADDRESS": "h:6379", "RAY_API_SERVER_ADDRESS": "https://h"})
        == "https://h"
    )
    assert find_url(None, {"RAY_ADDRESS": "http://h:1"}) == "http://h:1"
    for address in ("h:8265", "ray://h:10001", "http://", "http://h:x", "http://h/?a=b"):
        with pytest.raises(ConfigError, match="not the URL"):
            find_url(address, {})
    for address in ("http://me:hidden@h", "http://h/?token=hidden"):
        with pytest.raises(ConfigError) as raised:
            find_url(address, {})
        assert "hidden" not in str(raised.value)
    with pytest.raises(ConfigError, match="RAY_API_SERVER_ADDRESS=h:8265 is not the URL"):
        find_url(None, {"RAY_API_SERVER_ADDRESS": "h:8265"})
    with pytest.raises(ConfigError, match="no cluster is named"):
        find_url(None, {"RAY_ADDRESS": "h:6379"})
    assert is_clear_text("http://head:8265") and is_clear_text("http://127.evil.example")
    assert not is_clear_text("http://127.0.0.1:1") and not is_clear_text("https://head")


def test_the_token_is_found_where_ray_finds_it_and_never_quoted(tmp_path):
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert find_token({"RAY_AUTH_TOKEN": "direct", "RAY_AUTH_TOKEN_PATH": str(file)}) == "direct"
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(file)}) == "from-file"
    with pytest.raises(ConfigError, match="there is none"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "no")})
    for bad in ("two hidden words", "hidden\nhidden", "hiddené", "  "):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="holds no token") as raised:
            find_token({"RAY_AUTH_TOKEN_PATH": str(file)})
        assert "hidden" not in str(raised.value)


@contextmanager
def dashboard(token, status=200, body='{"ray_version": "1.0"}'):
    """Something that answers as a dashboard does; it remembers what it was told."""
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            said = self.headers.get("Authorization")
            heard.append(said)
            allowed = token is None or said == f"Bearer {token}"
            self.send_response(status if allowed else 403 if said else 401)
            self.end_headers()
            self.wfile.write(body.encode() if allowed else b"no")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heard
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def bare_server(monkeypatch):
    """A JobServer without Ray's client."""

    def start(self, url, headers, ray_version):
        self.url, self.headers, self.ray_version = url, headers, ray_version

    monkeypatch.setattr(jobserver.JobServer, "__init__", start)


def test_a_cluster_that_asks_nobody_is_refused_and_told_no_token(monkeypatch, bare_server):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary")
    with dashboard(None) as (url, heard):
        with pytest.raises(ConfigError, match="for anybody .*RAY_AUTH_MODE=token"):
            connect_server(url)
        assert connect_server(url, allow_open=True).headers == {}
        assert heard == [None, None]


def test_a_token_goes_only_to_who_asks_and_a_wrong_one_is_one_sentence(monkeypatch, bare_server):
    with dashboard("right") as (url, heard):
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        assert connect_server(url).headers == {"Authorization": "Bearer right"}
        assert heard == [None, "Bearer right"]
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        with pytest.raises(ConfigError, match="not that of the cluster") as raised:
            connect_server(url)
        assert "wrong" not in str(raised.value)


def test_another_ray_another_server_and_no_server_are_sentences(monkeypatch, bare_server):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    sent = submit("vacuum", "/r")
    with dashboard("right") as (url, _), pytest.raises(ConfigError, match=r"has Ray 1\.0, this"):
        connect_server(url).submit(sent, "me")
    with dashboard(None, body="<html>") as (url, _), pytest.raises(ConfigError, match="not as"):
        connect_server(url)
    with dashboard(None, 302, "") as (url, _), pytest.raises(ConfigError, match="answers 302"):
        connect_server(url)
    with pytest.raises(ConfigError, match="no Ray dashboard answers"):
        connect_server(url)
    with dashboard(None) as (url, _), pytest.raises(ConfigError, match="does not speak TLS"):
        connect_server(url.replace("http:", "https:"))


def test_a_certificate_that_only_the_log_reader_distrusts_is_told_at_once(monkeypatch, bare_server):
    import aiohttp

    class Client:
        async def tail_job_logs(self, job_id):
            raise aiohttp.ClientConnectorCertificateError(None, ValueError("self-signed"))
            yield

    server = jobserver.JobServer("https://h", {}, "1")
    server._client = Client()
    monkeypatch.setattr(server, "job", lambda _: JOB, raising=False)
    with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
        list(server.tail("n"))


# To its end


JOB = Job(
    id="n",
    run="n",
    command="segment",
    status="RUNNING",
    operator="me",
    started_s=1.0,
    ended_s=None,
    message="",
    exit_code=None,
)


class FakeServer:
    """Tells one log and one state after the other; an exception among them is raised."""

    url = "http://h"

    def __init__(self, tails, states):
        self.tails, self.states, self.stopped = list(tails), list(states), []

    def tail(self, job_id):
        for text in self.tails.pop(0) if len(self.tails) > 1 else self.tails[0]:
            if isinstance(text, BaseException):
                raise text
            yield text

    def job(self, job_id):
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, BaseException):
            raise state
        return state

    def stop(self, job_id):
        self.stopped.append(job_id)


def ended(status="SUCCEEDED", exit_code=0):
    return replace(JOB, status=status, exit_code=exit_code, ended_s=2.0)


def test_a_log_is_written_once_though_the_connection_was_lost():
    server = FakeServer(
        [["one\n", "tw", ServerLost("gone")], [ServerLost("gone")], ["one\ntwo\nth", "ree\n"]],
        [JOB, ServerLost("gone"), ended(exit_code=3)],
    )
    written, notes, pauses = [], [], []
    job = follow(server, "n", written.append, notes.append, pause=pauses.append)
    assert "".join(written) == "one\ntwo\nthree\n"
    assert job.true_exit_code() == 3
    assert notes == ["the connection is lost (gone); trying again"]
    assert pauses == [1.0, 2.0]


def test_a_server_that_stays_away_is_given_up_after_minutes():
    pauses = []
    server = FakeServer([[ServerLost("gone")]], [ServerLost("gone")])
    with pytest.raises(ServerLost, match="the job may well go on"):
        follow(server, "n", print, lambda _: None, pause=pauses.append)
    assert 300 <= sum(pauses) < 400 and max(pauses) <= 30


def test_a_job_that_the_cluster_forgot_is_no_lost_connection():
    server = FakeServer([[ServerLost("404")]], [ConfigError("knows no job n")])
    with pytest.raises(ConfigError, match="knows no job"):
        follow(server, "n", print, lambda _: None, pause=lambda _: pytest.fail("waited"))


def test_a_silent_connection_to_an_ended_job_is_opened_again():
    server = FakeServer([["a\n", "", ""], ["a\n", "b\n"]], [JOB, ended(), ended(), ended()])
    written = []
    follow(server, "n", written.append, lambda _: None, pause=lambda _: None)
    assert "".join(written) == "a\nb\n"


def test_an_ended_job_whose_log_is_gone_still_tells_its_code():
    lost = ended("FAILED", None)
    server = FakeServer([[ServerLost("gone")]], [lost])
    job = follow(server, "n", print, lambda _: None, pause=lambda _: None)
    assert job.true_exit_code() == 1


def test_what_a_pending_job_waits_for_is_said_once():
    pending = replace(JOB, status="PENDING", message="no GPU yet")
    server = FakeServer([["", "", "a"]], [pending, pending, ended()])
    notes = []
    follow(server, "n", lambda _: None, notes.append, pause=lambda _: None)
    assert notes == ["waiting: no GPU yet"]


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (ended(), 0),
        (ended("FAILED", 4), 4),
        (ended("FAILED", -9), 137),
        (ended("FAILED", None), 1),
        (ended("STOPPED", None), 143),
    ],
)
def test_the_exit_code_is_the_jobs_own(job, code):
    assert job.true_exit_code() == code


def test_stopping_waits_and_tells_how_it_ended():
    server = FakeServer([[]], [JOB, JOB, ended("STOPPED", None)])
    job, was_running = stop_and_wait(server, "n", pause=lambda _: None)
    assert (job.status, was_running, server.stopped) == ("STOPPED", True, ["n"])
    server = FakeServer([[]], [ended()])
    assert stop_and_wait(server, "n")[1] is False and server.stopped == []
    with pytest.raises(StageFailed, match="still RUNNING"):
        stop_and_wait(FakeServer([[]], [JOB]), "n", pause=lambda _: None)


def test_ctrl_c_leaves_the_job_where_nobody_can_be_asked(capsys):
    server = FakeServer([["a\n", KeyboardInterrupt()]], [JOB])
    with pytest.raises(SystemExit) as ending:
        follow_job(server, "n")
    assert ending.value.code == 130 and server.stopped == []
    told = capsys.readouterr()
    assert told.out == "a\n"
    assert "goes on" in told.err and "reseg jobs stop n --address http://h" in told.err


@pytest.mark.parametrize(("answer", "stopped"), [("y", ["n"]), ("", []), ("n", [])])
def test_ctrl_c_on_a_terminal_asks(answer, stopped, monkeypatch, capsys):
    server = FakeServer([[KeyboardInterrupt()]], [JOB, ended("STOPPED", None)])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: answer)
    with pytest.raises(SystemExit) as ending:
        follow_job(server, "n")
    assert (ending.value.code, server.stopped) == (130, stopped)


def test_sigterm_leaves_the_job_and_asks_nobody_even_on_a_terminal(monkeypatch):
    from jobs._options import _Terminated

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: pytest.fail("asked"))
    with pytest.raises(SystemExit) as ending:
        follow_job(FakeServer([[_Terminated()]], [JOB]), "n")
    assert ending.value.code == 143


# For Kubernetes


def test_a_manifest_is_printed_and_nobody_is_asked(here, monkeypatch):
    import yaml
    from click.testing import CliRunner

    from jobs.submit import command

    monkeypatch.setattr(jobserver, "connect_server", lambda *_, **__: pytest.fail("asked"))
    words = ["--print", "kubernetes", "--image", "r/reseg:1", "--schedule", "0 2 * * *"]
    (here / "n.toml").write_text('source = "/a"\nresults = "/r"\nbundle = "/b"\n')
    out = CliRunner().invoke(command, [*words, "nightly", "--config", "n.toml"])
    assert out.exit_code == 0, out.output
    manifest = yaml.safe_load(out.stdout)
    assert manifest["kind"] == "RayCronJob"
    run = shlex.split(manifest["spec"]["jobTemplate"]["entrypoint"])
    assert run[:3] == ["python", "-m", "jobs.nightly"]
    assert "--run-id" not in run and 'results="/r"' in run
    assert "--image" in CliRunner().invoke(command, [*words[:2], "vacuum", "/r"]).output
    for more in ("--json", "--follow", "--allow-unauthenticated"):
        out = CliRunner().invoke(command, [*words, more, "nightly", "--config", "n.toml"])
        assert out.exit_code == 2 and f"{more} has no meaning with --print" in out.output
    named = CliRunner().invoke(command, [*words, "nightly", "--config", "n.toml", "--run-id", "n"])
    assert named.exit_code == 2 and "a run of its own" in named.output
    assert json.dumps(manifest)
