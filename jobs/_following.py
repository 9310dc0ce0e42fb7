"""What `reseg submit` and `reseg jobs` share: reading a command to be sent, following a job."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from jobs._options import _Terminated, source_values
from pipeline.flows.submission import KINDS, Given

if TYPE_CHECKING:
    from pipeline.flows.jobserver import Job, JobServer

_OF_SUBMIT = ("--follow", "--gpus", "--print", "--image", "--schedule", "--allow-unauthenticated")

cluster_option = click.option(
    "--address", help="URL of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A command's parameters as given, the names of all that it has, and what they mean as keys of
    its configuration."""

    given: tuple[Given, ...]
    parameters: frozenset[str]
    values: Mapping[str, Any]


def parse(name: str, arguments: Sequence[str]) -> Parsed:
    """Read the arguments of a command that is to be sent, checked as that command checks them.

    Places count as given where they have a default, which would be another folder elsewhere.
    Raises click.UsageError, ConfigError.
    """
    module: Any = import_module(f"jobs.{name}")
    command: click.Command = module.command
    try:
        context = command.make_context(f"reseg {name}", list(arguments))
    except click.NoSuchOption as error:
        if error.option_name not in _OF_SUBMIT:
            raise
        flag = error.option_name
        raise click.UsageError(
            f"{flag} comes before the command: reseg submit {flag} ... {name} ...", error.ctx
        ) from None
    known = {parameter.name: parameter for parameter in command.params}
    given = []
    for key, value in context.params.items():
        said = context.get_parameter_source(key) is ParameterSource.COMMANDLINE
        if not said and (key not in KINDS[name].places or not value):
            continue
        parameter = known[key]
        flag = parameter.opts[-1] if isinstance(parameter, click.Option) else ""
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        given.append(Given(name=key, flag=flag, values=tuple(str(item) for item in values)))
    return Parsed(
        given=tuple(given),
        parameters=frozenset(map(str, known)),
        values=getattr(module, "config_values", source_values)(dict(context.params)),
    )


def say_how(server: "JobServer", job_id: str) -> None:
    """How to follow a job and how to stop it."""
    click.echo(f"follow it: reseg jobs logs {job_id} --follow --address {server.url}", err=True)
    click.echo(f"stop it:   reseg jobs stop {job_id} --address {server.url}", err=True)


def follow_job(server: "JobServer", job_id: str, *, to_stderr: bool = False) -> "Job":
    """Show a job's log to its end; on Ctrl-C ask whether to stop the job, and end with 130.

    Where nobody can be asked the job is left running.
    """
    from pipeline.flows.jobserver import follow

    def write(text: str) -> None:
        click.echo(text, nl=False, err=to_stderr)

    def note(text: str) -> None:
        click.echo(f"{job_id}: {text}", err=True)

    try:
        job = follow(server, job_id, write, note)
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, _Terminated)
        _leave_or_stop(server, job_id, ask=not terminated)  # who ends us does not answer
        sys.exit(143 if terminated else 130)
    code = job.true_exit_code()
    if job.status == "FAILED" and job.exit_code is None:
        note((job.message.strip().splitlines() or ["it failed before it began"])[-1][:300])
    note("succeeded" if code == 0 else f"{job.status.lower()}, exit code {code}")
    return job


def _leave_or_stop(server: "JobServer", job_id: str, *, ask: bool) -> None:
    from pipeline.flows.jobserver import stop_and_wait

    stop = False
    if ask and sys.stdin.isatty() and sys.stderr.isatty():
        try:
            stop = click.confirm("\nStop the job too?", default=False, err=True)
        except (click.Abort, KeyboardInterrupt):
            click.echo(err=True)
    if not stop:
        click.echo(f"{job_id} goes on without being followed.", err=True)
        say_how(server, job_id)
        return
    job, _ = stop_and_wait(server, job_id)
    click.echo(f"{job_id}: {job.status.lower()}", err=True)
