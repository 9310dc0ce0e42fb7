"""reseg shadow"""

from typing import Any

import click

from jobs._options import (
    EPILOG,
    address_option,
    bundle_option,
    config_option,
    json_option,
    print_json,
    run,
    set_option,
)


@click.command("shadow", epilog=EPILOG)
@click.argument("source")
@click.argument("results")
@bundle_option
@config_option
@set_option
@click.option("--sample", default=100, show_default=True, type=click.IntRange(1), help="Cases.")
@address_option
@json_option
def command(source: str, results: str, bundle: str, as_json: bool, **options: Any) -> None:
    """Try a candidate --bundle on a sample of SOURCE against what RESULTS publishes, and advise.

    The sample is spread over groups and sizes of lesion. With the [labelled] set of a nightly
    --config it is also scored there, paired with the published network. Publishes nothing.
    """
    from jobs._summary import print_shadow
    from pipeline.config import load_config
    from pipeline.flows.shadow import run_shadow
    from pipeline.policy import NightlyConfig
    from pipeline.telemetry import Progress

    config = None
    if options["config_path"] or options["assignments"]:
        config = load_config(NightlyConfig, options["config_path"], options["assignments"])
    progress = Progress(quiet=as_json)
    shared = {key: options[key] for key in ("sample", "address")}
    try:
        found = run_shadow(source, results, bundle, config, report=progress, **shared)
    finally:
        progress.close()
    print_json(found.to_plain()) if as_json else print_shadow(found)


if __name__ == "__main__":
    run(command)
