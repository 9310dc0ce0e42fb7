"""reseg jobs"""

import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from jobs._following import cluster_option, follow_job
from jobs._options import EPILOG, json_option, print_json, run

if TYPE_CHECKING:
    from pipeline.flows.jobserver import Job


@click.group("jobs", epilog=EPILOG)
def command() -> None:
    """Jobs that `reseg submit` sent to a cluster."""


@command.command("list", epilog=EPILOG)
@cluster_option
@json_option
def list_(address: str | None, as_json: bool) -> None:
    """List the jobs that the cluster remembers, newest first."""
    from pipeline.flows.jobserver import connect_server
    from pipeline.telemetry import format_table

    jobs = connect_server(address, allow_open=True).jobs()
    if as_json:
        print_json({"jobs": [job.to_plain() for job in jobs]})
    elif jobs:
        rows = [_row(job) for job in jobs]
        click.echo(format_table(rows, rows[0]))
    else:
        click.echo("The cluster knows no job of reseg.")


@command.command("logs", epilog=EPILOG)
@click.argument("job_id", metavar="ID")
@click.option("--follow", is_flag=True, help="Go on until the job ends; end with its exit code.")
@cluster_option
def logs(job_id: str, follow: bool, address: str | None) -> None:
    """Print what a job has printed."""
    from pipeline.flows.jobserver import connect_server

    server = connect_server(address, allow_open=True)
    if not follow:
        click.echo(server.log(job_id), nl=False)
        return
    sys.exit(follow_job(server, job_id).true_exit_code())


@command.command("stop", epilog=EPILOG)
@click.argument("job_id", metavar="ID")
@cluster_option
@json_option
def stop(job_id: str, address: str | None, as_json: bool) -> None:
    """End a job politely, and say how it ended.

    The same submit takes its run up again. The job gets SIGTERM, time to write a checkpoint (two
    and a half minutes), and only then SIGKILL.
    """
    from pipeline.flows.jobserver import connect_server, stop_and_wait

    server = connect_server(address, allow_open=True)
    if not server.job(job_id).ended:
        click.echo(f"stopping {job_id}, which may take minutes", err=True)
    job, was_running = stop_and_wait(server, job_id)
    if as_json:
        print_json(job.to_plain() | {"was_running": was_running})
    elif was_running:
        click.echo(f"{job_id}: {job.status.lower()} after {_duration(job)}.")
    else:
        click.echo(f"{job_id} had ended before: {job.status.lower()}, {_duration(job)}.")


def _row(job: "Job") -> dict[str, Any]:
    code = job.true_exit_code() if job.ended else None
    return {
        "id": job.id,
        "command": job.command,
        "status": job.status.lower(),
        "exit code": "" if code is None else str(code),
        "started (UTC)": f"{datetime.fromtimestamp(job.started_s, UTC):%Y-%m-%d %H:%M:%S}",
        "took": _duration(job),
        "by": job.operator,
    }


def _duration(job: "Job") -> str:
    seconds = max(0.0, (job.ended_s or time.time()) - job.started_s)
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


if __name__ == "__main__":
    run(command)
