"""reseg doctor"""

import sys
from typing import TYPE_CHECKING, Any

import click

from jobs._options import json_option, print_json, run

if TYPE_CHECKING:
    from pipeline.flows.doctor import Diagnosis


@click.command(
    "doctor", epilog="Exit codes: 0 no problem (warnings are none), 1 problems, 2 wrong request."
)
@click.argument("locations", nargs=-1, metavar="[LOCATION]...")
@click.option("--address", help="HOST:PORT of a Ray cluster, or the URL of its dashboard.")
@click.option("--bundle", default="", metavar="FOLDER", help="A trained network to load.")
@click.option("--dashboard", default="", metavar="URL", help="Ray's dashboard, if not found.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(5),
    default=90,
    show_default=True,
    metavar="SECONDS",
    help="How long a node may take to answer.",
)
@json_option
def command(locations: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Check this machine and every node of a cluster before a night depends on them.

    Versions, GPUs, decoder, memory, disk, clocks, who gets in without a token; and for each
    LOCATION, a folder or s3:// URI of sources or results, that all of them reach it and that
    commits are safe there. Given a URL, as http://HEAD:8265, a job looks at the cluster from there.
    Without --address it is that of RAY_ADDRESS, if any.
    """
    from pipeline.flows.doctor import run_doctor
    from pipeline.telemetry import Progress

    progress = Progress(quiet=as_json)
    try:
        diagnosis = run_doctor(locations, report=progress, **options)
    finally:
        progress.close()
    print_json(diagnosis.to_plain()) if as_json else _print(diagnosis)
    if not diagnosis.healthy:
        sys.exit(1)


def _print(diagnosis: "Diagnosis") -> None:
    width = max((len(finding.check) for finding in diagnosis.findings), default=0)
    for level, title in (("problem", "Problems"), ("warning", "Warnings"), ("ok", "All right")):
        found = [finding for finding in diagnosis.findings if finding.level == level]
        if found:
            click.echo(f"{title}:")
        for finding in found:
            click.echo(f"  {finding.check:<{width}}  {finding.seen}")
            if finding.advice:
                click.echo(f"  {'':<{width}}  -> {finding.advice}")
    click.echo(diagnosis.sentence)


if __name__ == "__main__":
    run(command)
