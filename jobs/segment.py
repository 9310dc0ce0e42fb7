"""reseg segment"""

from typing import Any

import click

from jobs._options import (
    EPILOG,
    address_option,
    bundle_option,
    config_option,
    device_option,
    json_option,
    limit_option,
    print_json,
    run,
    run_id_option,
    set_option,
    source_options,
    source_values,
)
from jobs._placement import placement_options, placement_values


@click.command("segment", epilog=EPILOG)
@click.argument("source")
@click.argument("results")
@bundle_option
@source_options
@config_option
@set_option
@click.option("--max-bad-share", type=float, help="Do not publish above this share; default 0.05.")
@click.option("--actors", type=click.IntRange(1), help="Processes that hold the network.")
@click.option("--batch-size", type=click.IntRange(1), help="Slices handed over at once.")
@device_option
@placement_options
@run_id_option
@limit_option
@address_option
@json_option
def command(source: str, results: str, bundle: str, as_json: bool, **options: Any) -> None:
    """Compute what is new, changed or stale in SOURCE, and publish one night in RESULTS.

    Interrupted or killed, the same command takes up where it stopped. With nothing to do it ends
    at once. A bad image becomes a row with a reason; see README, Bad images.
    """
    from jobs._summary import print_summary
    from pipeline.config import SegmentConfig, load_config
    from pipeline.flows.segment import run_segment
    from pipeline.telemetry import Progress

    values = config_values(options)
    config = load_config(SegmentConfig, options["config_path"], options["assignments"], values)
    shared = {key: options[key] for key in ("run_id", "limit", "address")}
    progress = Progress(quiet=as_json)
    try:
        summary = run_segment(source, results, bundle, config, report=progress, **shared)
    finally:
        progress.close()
    print_json(summary.to_plain()) if as_json else print_summary(summary, results)


def config_values(options: dict[str, Any]) -> dict[str, Any]:
    """What the options mean as keys of the configuration."""
    return {
        **source_values(options),
        **placement_values(options, "resources"),
        "max_bad_share": options["max_bad_share"],
        "resources.actors": options["actors"],
        "resources.device": options["device"],
        "inference.batch_size": options["batch_size"],
    }


if __name__ == "__main__":
    run(command)
