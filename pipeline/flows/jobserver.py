"""Ray's job server, over HTTP: send a job, follow it to its end, stop it, list what there is.

The server runs any command for whoever may ask it, so a cluster that asks for no token is refused.
The token goes only to a server that asked for one, and into no message.
"""

import asyncio
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import quote, urlsplit

import pipeline
from pipeline import storage
from pipeline.errors import ConfigError, ResegError, StageFailed
from pipeline.flows.submission import Submission, free_id, job_environment, refusal

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_PROBE_TIMEOUT_S = 10.0
_REQUEST_TIMEOUT_S = 60.0
_QUIET_S = 20.0
"""A connection that says nothing for so long may be dead: the job's state is asked for."""
_PATIENCE_S = 300.0
_LAST_WORDS_S = 15.0
_LONGEST_PAUSE_S = 30.0
_STOP_TIMEOUT_S = 240.0
_TERMINATED, _LOST = 143, 1


class ServerLost(ResegError):
    """The job server does not answer; the job may well go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the cluster knows it.

    run: the name that its attempts share. exit_code: None while it runs, and where it has none.
    """

    id: str
    run: str
    command: str
    status: str
    operator: str
    started_s: float
    ended_s: float | None
    message: str
    exit_code: int | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    def true_exit_code(self) -> int:
        """What the job's own process ended with, as a shell would say it."""
        if self.exit_code is not None:
            return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code
        return {"SUCCEEDED": 0, "STOPPED": _TERMINATED}.get(self.status, _LOST)

    def to_plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "id": self.id,
            "run": self.run,
            "command": self.command,
            "status": self.status,
            "operator": self.operator,
            "started_s": self.started_s,
            "ended_s": self.ended_s,
            "exit_code": self.true_exit_code() if self.ended else None,
        }


class Followed(Protocol):
    """What following and stopping need of a server."""

    def job(self, job_id: str) -> Job: ...

    def tail(self, job_id: str) -> Iterator[str]: ...

    def stop(self, job_id: str) -> None: ...


# Where, and as whom


def find_url(address: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The dashboard's URL, said or from the environment. Raises ConfigError."""
    found = address
    if address is None:
        candidates = [environment.get(name, "") for name in _ADDRESS_VARIABLES]
        found = next((c for c in candidates if c.startswith(("http://", "https://"))), None)
        if not found and candidates[0]:
            raise ConfigError(
                f"RAY_API_SERVER_ADDRESS={storage.shown(candidates[0])} is not the URL of a "
                "dashboard, as http://HEAD:8265"
            )
    if not found:
        raise ConfigError(
            "no cluster is named: give --address http://HEAD:8265, its dashboard, or set "
            "RAY_API_SERVER_ADDRESS"
        )
    try:
        parts = urlsplit(found)
        well_formed = parts.scheme in ("http", "https") and bool(parts.hostname)
        well_formed = well_formed and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        well_formed = False
    if not well_formed or parts.query or parts.fragment:
        raise ConfigError(
            f"--address {storage.shown(found)!r} is not the URL of a dashboard, as http://HEAD:8265"
        )
    return found.rstrip("/")


def is_clear_text(url: str) -> bool:
    """Whether a token sent there could be read on the way."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return parts.scheme == "http" and not (
        host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host)
    )


def find_token(environment: Mapping[str, str] = os.environ) -> str:
    """The token, from where Ray takes it. Raises ConfigError, which never quotes it."""
    where, token = "RAY_AUTH_TOKEN", environment.get("RAY_AUTH_TOKEN", "")
    if not token:
        path = environment.get("RAY_AUTH_TOKEN_PATH", "")
        file = Path(path or "~/.ray/auth_token").expanduser()
        where = str(file)
        try:
            token = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(
                f"the cluster asks for a token and there is none: {file} does not exist; put the "
                "cluster's token there (mode 0600), or its path into RAY_AUTH_TOKEN_PATH"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            brief = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"the token in {file} cannot be read: {brief}") from None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where} holds no token: one word of plain characters")
    return token


def connect_server(address: str | None, *, allow_open: bool = False) -> "JobServer":
    """Reach a job server as somebody it trusts. Raises ConfigError.

    allow_open: also take one that asks nobody for a token.
    """
    url = find_url(address)
    headers: dict[str, str] = {}
    answer = _ask_version(url, headers)
    if answer.status_code in (401, 403):
        headers = {"Authorization": f"Bearer {find_token()}"}
        answer = _ask_version(url, headers)
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"the token that was found is not that of the cluster at {url}: take the one that "
                "its head was started with, in RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN or "
                "~/.ray/auth_token"
            )
    try:
        ray_version = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{url} answers {answer.status_code}, but not as a Ray dashboard does; is it the "
            "dashboard's address, as http://HEAD:8265?"
        ) from None
    if not headers and not allow_open:
        raise ConfigError(
            f"the cluster at {url} runs commands for anybody who reaches it, without a token: start "
            "all its nodes with RAY_AUTH_MODE=token and one token (`ray get-auth-token --generate`), "
            "or say --allow-unauthenticated where nobody else reaches it"
        )
    return JobServer(url, headers, ray_version)


def _ask_version(url: str, headers: Mapping[str, str]) -> Any:
    import requests

    try:
        return requests.get(
            f"{url}/api/version",
            headers=dict(headers),
            timeout=_PROBE_TIMEOUT_S,
            allow_redirects=False,
        )
    except requests.exceptions.SSLError as error:
        if "CERTIFICATE" not in str(error).upper():
            raise ConfigError(f"{url} does not speak TLS; is it http://?") from None
        raise ConfigError(
            f"the certificate of {url} is not trusted here; name its authority's file in "
            "REQUESTS_CA_BUNDLE and SSL_CERT_FILE"
        ) from None
    except (requests.exceptions.RequestException, UnicodeError):
        raise ConfigError(
            f"no Ray dashboard answers at {url}: is the head up, and the tunnel to it open?"
        ) from None


class JobServer:
    """A connection to the job server of one cluster."""

    def __init__(self, url: str, headers: Mapping[str, str], ray_version: str) -> None:
        self.url, self.ray_version = url, ray_version
        with _no_other_address(), _asking(url):
            from ray.job_submission import JobSubmissionClient

            for name in _TALKATIVE:
                logging.getLogger(name).setLevel(logging.ERROR)
            self._client = cast(Any, JobSubmissionClient(url, headers=dict(headers)))
        # by itself the client waits for ever on a dead link
        patient = self._client._do_request
        self._client._do_request = partial(patient, timeout=_REQUEST_TIMEOUT_S)

    def _check_version(self) -> None:
        ours = version("ray")
        if self.ray_version != ours:
            raise ConfigError(
                f"the cluster at {self.url} has Ray {self.ray_version}, this machine has {ours}: "
                "install the same on both"
            )

    def jobs(self) -> list[Job]:
        """All jobs that came from `reseg submit`, newest first. Raises ServerLost."""
        with _asking(self.url):
            found = [_to_job(item) for item in self._client.list_jobs() if item.submission_id]
        return sorted((job for job in found if job.run), key=lambda j: -j.started_s)

    def job(self, job_id: str) -> Job:
        """One job. Raises ConfigError if there is none, ServerLost."""
        with _asking(self.url, job_id):
            return _to_job(self._client.get_job_info(quote(job_id, safe="")))

    def submit(self, submission: Submission, operator: str) -> Job:
        """Send a job. Raises ConfigError if its run is on its way or done already.

        The cluster must have the Ray of this machine.
        """
        self._check_version()
        with _asking(self.url):
            taken = {
                item.submission_id: ((item.metadata or {}).get("reseg_run", ""), item.status.value)
                for item in self._client.list_jobs()
                if item.submission_id
            }
        job_id = free_id(submission, taken)
        environment: dict[str, Any] = {"env_vars": job_environment(os.environ)}
        with tempfile.TemporaryDirectory(prefix="reseg-submit-") as folder:
            for name, data in submission.files.items():
                (Path(folder) / name).write_bytes(data)
            if submission.files:
                environment["working_dir"] = folder
            with _asking(self.url, job_id, submission):
                self._client.submit_job(
                    entrypoint=submission.line(),
                    submission_id=job_id,
                    runtime_env=environment,
                    metadata={
                        "reseg_run": submission.name,
                        "reseg_command": submission.command,
                        "reseg_version": pipeline.__version__,
                        "operator": operator,
                    },
                )
        return self.job(job_id)

    def stop(self, job_id: str) -> None:
        """Ask a job to end: SIGTERM now, SIGKILL after the time that it was sent with."""
        with _asking(self.url, job_id):
            self._client.stop_job(quote(job_id, safe=""))

    def log(self, job_id: str) -> str:
        """All that a job has printed so far."""
        with _asking(self.url, job_id):
            return str(self._client.get_job_logs(quote(job_id, safe="")))

    def tail(self, job_id: str) -> Iterator[str]:
        """A job's log from its beginning as it grows, and nothing every 20 s in which it does not.

        Raises ServerLost, ConfigError if there is no such job.
        """
        import aiohttp

        self.job(job_id)  # the dashboard logs a refused tail with its headers, the token among them
        loop = asyncio.new_event_loop()
        stream = self._client.tail_job_logs(quote(job_id, safe=""))

        async def following() -> str | None:
            return await anext(stream, None)

        task: asyncio.Task[str | None] | None = None
        try:
            while True:
                task = loop.create_task(following())
                while not task.done():
                    loop.run_until_complete(asyncio.wait({task}, timeout=_QUIET_S))
                    if not task.done():
                        yield ""
                text = task.result()
                if text is None:
                    return
                yield text
        except aiohttp.ClientSSLError:  # of a kind that requests has taken
            raise ConfigError(
                f"the certificate of {self.url} is not trusted by what reads logs; name its "
                "authority's file in SSL_CERT_FILE, as in REQUESTS_CA_BUNDLE"
            ) from None
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise ServerLost(_brief(error)) from None
        finally:
            with suppress(Exception):
                if task is not None and not task.done():
                    task.cancel()
                    loop.run_until_complete(asyncio.wait({task}))
                loop.run_until_complete(stream.aclose())
            loop.close()


def _to_job(item: Any) -> Job:
    known = item.metadata or {}
    started_s = (item.start_time or 0) / 1000
    return Job(
        id=item.submission_id or "",
        run=known.get("reseg_run", ""),
        command=known.get("reseg_command", ""),
        status=item.status.value,
        operator=known.get("operator", ""),
        started_s=started_s,
        ended_s=item.end_time / 1000 if item.end_time else None,
        message=item.message or "",
        exit_code=item.driver_exit_code,
    )


@contextmanager
def _no_other_address() -> Iterator[None]:
    """Ray's client would go to the address in the environment instead of the one it is given."""
    saved = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


@contextmanager
def _asking(url: str, job_id: str = "", submission: Submission | None = None) -> Iterator[None]:
    """Failures of Ray's client as errors of ours. Raises ConfigError, StageFailed, ServerLost."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise ConfigError(f"the cluster at {url} does not take the token any more") from None
    except (OSError, requests.exceptions.RequestException) as error:
        raise ServerLost(f"{url} does not answer: {_brief(error)}") from None
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if submission is not None and "already exists" in text:
            raise ConfigError(refusal(submission, job_id, "PENDING")) from None
        if job_id and "does not exist" in text:
            raise ConfigError(
                f"the cluster at {url} knows no job {job_id}; `reseg jobs list` shows those it knows"
            ) from None
        raise StageFailed(f"the cluster at {url} refused: {_brief(error)}") from None


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]


# To its end


def follow(
    server: Followed,
    job_id: str,
    write: Callable[[str], None],
    note: Callable[[str], None],
    *,
    pause: Callable[[float], None] = time.sleep,
) -> Job:
    """Write a job's log as it grows until the job has ended; the ended job.

    A lost connection is tried again for some minutes. note: takes what is said about the job.
    Raises ServerLost when that was in vain, ConfigError if the cluster forgot the job.
    """
    reader = _LogReader(write)
    waited_s, pause_s = 0.0, 1.0
    while True:
        before, lost = reader.written, None
        job: Job | None = None
        complete = False
        try:
            complete = _read_on(server, job_id, reader, note)
        except ServerLost as error:
            lost = error
        try:
            job = server.job(job_id)
        except ServerLost as error:
            lost = error
        if job is not None and job.ended and (complete or waited_s >= _LAST_WORDS_S):
            return job
        if reader.written > before:
            waited_s, pause_s = 0.0, 1.0
        if lost is not None:
            _be_patient(lost, waited_s, job_id, note)
        pause(pause_s)
        waited_s += pause_s
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _be_patient(
    lost: ServerLost, waited_s: float, job_id: str, note: Callable[[str], None]
) -> None:
    """Raises ServerLost once it has been tried for long enough."""
    if waited_s >= _PATIENCE_S:
        raise ServerLost(
            f"{lost}; tried for {waited_s:.0f} s; the job may well go on, as "
            f"`reseg jobs logs {job_id} --follow` will show"
        )
    if waited_s == 0:
        note(f"the connection is lost ({lost}); trying again")


class _LogReader:
    """Writes what of a log was not written before; each tail starts at the beginning."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._position = self.written = 0

    def start_over(self) -> None:
        self._position = 0

    def take(self, text: str) -> None:
        fresh = text[max(0, self.written - self._position) :]
        self._position += len(text)
        if fresh:
            self._write(fresh)
            self.written = self._position


def _read_on(
    server: Followed, job_id: str, reader: _LogReader, note: Callable[[str], None]
) -> bool:
    """Read the log until the server ends it; False if it went quiet although the job has ended."""
    reader.start_over()
    told = ""
    for text in server.tail(job_id):
        reader.take(text)
        if not text:
            job = server.job(job_id)
            if job.ended:
                return False
            if job.status == "PENDING" and job.message and job.message != told:
                told = job.message
                note(f"waiting: {told}")
    return True


def stop_and_wait(
    server: Followed, job_id: str, *, pause: Callable[[float], None] = time.sleep
) -> tuple[Job, bool]:
    """Ask a job to end and wait until it has: the job, and whether it was still running before.

    Raises StageFailed if it goes on for minutes.
    """
    job = server.job(job_id)
    if job.ended:
        return job, False
    server.stop(job_id)
    waited_s = 0.0
    while not (job := server.job(job_id)).ended:
        if waited_s >= _STOP_TIMEOUT_S:
            raise StageFailed(
                f"{job_id} was asked to stop {waited_s:.0f} s ago and is still {job.status}"
            )
        pause(1.0)
        waited_s += 1.0
    return job, True
