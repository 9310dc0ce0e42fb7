"""reseg publish"""

import click

from jobs._options import EPILOG, because_option, json_option, print_json, run


@click.command("publish", epilog=EPILOG)
@click.argument("results")
@click.argument("run_id")
@because_option
@json_option
def command(results: str, run_id: str, because: str, as_json: bool) -> None:
    """Publish the staged night RUN_ID of RESULTS although the gate refused it, on the record.

    Computes nothing. Refused if another night was published since.
    """
    from jobs._summary import print_night
    from pipeline.flows.nightly import publish_refused
    from pipeline.telemetry import Progress

    progress = Progress(quiet=as_json)
    try:
        outcome = publish_refused(results, run_id, because, report=progress)
    finally:
        progress.close()
    print_json(outcome.to_plain()) if as_json else print_night(outcome, results)


if __name__ == "__main__":
    run(command)
