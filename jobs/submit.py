"""reseg submit"""

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from jobs._following import cluster_option, follow_job, parse, say_how
from jobs._options import EPILOG, json_option, print_json, run

if TYPE_CHECKING:
    from pipeline.flows.submission import Submission


@click.command("submit", epilog=EPILOG, context_settings={"allow_interspersed_args": False})
@click.argument("name", metavar="COMMAND")
@click.argument("arguments", metavar="ARGS", nargs=-1, type=click.UNPROCESSED)
@cluster_option
@click.option(
    "--gpus",
    "num_gpus",
    type=click.IntRange(1),
    help="Use no more GPUs than this; in a manifest 1.",
)
@click.option("--follow", is_flag=True, help="Show the job's log, and end with its exit code.")
@click.option(
    "--allow-unauthenticated", "allow_open", is_flag=True, help="Even where no token is asked for."
)
@click.option(
    "--print", "manifest", type=click.Choice(["kubernetes"]), help="Print a manifest, send nothing."
)
@click.option("--image", help="Of the manifest: the image with Ray and reseg.")
@click.option("--schedule", metavar="CRON", help="Of the manifest: when to run, as '0 2 * * *'.")
@json_option
def command(name: str, arguments: tuple[str, ...], **options: Any) -> None:
    """Run COMMAND ARGS, as segment or nightly, as a job of a Ray cluster.

    What is wrong with ARGS is told before anything is sent. The job has the id of its run: the same
    run is sent again only after it failed or was stopped, and then goes on. Paths must be shared;
    the file of --config travels. `reseg jobs` lists, follows and stops jobs.
    """
    from pipeline.flows.jobserver import connect_server, find_url, is_clear_text
    from pipeline.flows.submission import check_command, make_submission
    from pipeline.planning import operator

    check_command(name)
    _check_together(options)
    parsed = parse(name, arguments)
    if options["manifest"] and {"max_gpus", "workers"} & parsed.parameters:
        options["num_gpus"] = options["num_gpus"] or 1
    submission = make_submission(
        name,
        parsed.given,
        parameters=parsed.parameters,
        values=parsed.values,
        num_gpus=options["num_gpus"],
        inline=bool(options["manifest"]),
    )
    if options["manifest"]:
        if options["schedule"] and any(item.name == "run_id" for item in parsed.given):
            raise click.UsageError("--run-id and --schedule: each night is a run of its own")
        click.echo(_manifest(submission, options), nl=False)
        return
    url = find_url(options["address"])
    if is_clear_text(url):
        click.echo(f"warning: {url} is not encrypted, nor is the token; take a tunnel", err=True)
    server = connect_server(url, allow_open=options["allow_open"])
    job = server.submit(submission, operator())
    told = {"id": job.id, "words": [name, *submission.words], "address": server.url}
    if options["follow"]:
        ended = follow_job(server, job.id, to_stderr=options["as_json"])
        if options["as_json"]:
            print_json(told | ended.to_plain())
        sys.exit(ended.true_exit_code())
    print_json(told) if options["as_json"] else click.echo(f"Submitted {job.id}.")
    say_how(server, job.id)


def _check_together(options: dict[str, Any]) -> None:
    if options["manifest"]:
        for name in ("follow", "address", "as_json", "allow_open"):
            if options[name]:
                flag = {"as_json": "json", "allow_open": "allow-unauthenticated"}.get(name, name)
                raise click.UsageError(f"--{flag} has no meaning with --print, which sends nothing")
    elif options["image"] or options["schedule"]:
        raise click.UsageError("--image and --schedule go with --print kubernetes")


def _warn(submission: "Submission") -> None:
    """What a pod will not find."""
    local = [word for word in submission.words if word.startswith("/")]
    if local:
        places = ", ".join(local)
        click.echo(f"warning: the pods mount no volume, and these are paths: {places}", err=True)
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if "//127." in endpoint or "//localhost" in endpoint:
        click.echo(f"warning: AWS_ENDPOINT_URL={endpoint} is this machine, not a pod's", err=True)


def _manifest(submission: "Submission", options: dict[str, Any]) -> str:
    from pipeline.flows.submission import job_environment
    from pipeline.kubernetes import render

    if not options["image"]:
        raise click.UsageError("--print kubernetes needs --image, the image with Ray and reseg")
    _warn(submission)
    return render(
        [submission.command, *submission.words],
        run_id=submission.run_id,
        image=options["image"],
        num_gpus=options["num_gpus"] or 0,
        schedule=options["schedule"],
        environment=job_environment(os.environ),
    )


if __name__ == "__main__":
    run(command)
