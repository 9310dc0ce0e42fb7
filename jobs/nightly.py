"""reseg nightly"""

from typing import Any

import click

from jobs._options import (
    EPILOG,
    address_option,
    config_option,
    json_option,
    print_json,
    run,
    run_id_option,
    set_option,
)
from jobs._placement import placement_options, placement_values


@click.command("nightly", epilog=EPILOG)
@config_option
@set_option
@placement_options
@run_id_option
@address_option
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Do a whole night: segment what changed, compare with last night, publish if the gate lets it.

    For cron, Airflow or a Kubernetes CronJob. --config names source, results, bundle and the gate's
    limits; see README, Nightly. Run again, after success or after any end, it does what is left and
    no more. Exit code 4: the gate refused, last night stays published, and the staged night waits for
    `reseg publish`.
    """
    from jobs._summary import print_night
    from pipeline.config import load_config
    from pipeline.errors import GateRefused
    from pipeline.flows.nightly import run_nightly
    from pipeline.policy import NightlyConfig
    from pipeline.telemetry import Progress

    values = config_values(options)
    config = load_config(NightlyConfig, options["config_path"], options["assignments"], values)
    progress = Progress(quiet=as_json)
    try:
        outcome = run_nightly(
            config, run_id=options["run_id"], address=options["address"], report=progress
        )
    finally:
        progress.close()
    print_json(outcome.to_plain()) if as_json else print_night(outcome, config.results)
    if outcome.refused and outcome.verdict is not None:
        raise GateRefused(f"not published: {outcome.verdict.sentence}")


def config_values(options: dict[str, Any]) -> dict[str, Any]:
    """What the options mean as keys of the configuration."""
    return placement_values(options, "segment.resources")


if __name__ == "__main__":
    run(command)
