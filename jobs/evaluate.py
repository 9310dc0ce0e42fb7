"""reseg evaluate"""

from typing import Any

import click

from jobs._options import (
    EPILOG,
    address_option,
    bundle_option,
    config_option,
    device_option,
    json_option,
    print_json,
    run,
    set_option,
    source_options,
    source_values,
)


@click.command("evaluate", epilog=EPILOG)
@click.argument("source")
@bundle_option
@click.option("--out", default="reseg-evaluation", show_default=True, help="Folder to write to.")
@source_options
@config_option
@set_option
@device_option
@address_option
@json_option
def command(source: str, bundle: str, out: str, as_json: bool, **options: Any) -> None:
    """Score a bundle on the images of SOURCE that have reference masks, case by case.

    Writes cases.csv (worst first), dice.png (a bar a case) and evaluation.json; the masks are in
    OUT/results. Dice is over whole cases, in native pixels; a case that is empty in both has none.
    """
    from jobs._summary import print_evaluation
    from pipeline.config import SegmentConfig, load_config
    from pipeline.flows.evaluate import run_evaluate
    from pipeline.telemetry import Progress

    values = source_values(options) | {"resources.device": options["device"]}
    config = load_config(SegmentConfig, options["config_path"], options["assignments"], values)
    progress = Progress(quiet=as_json)
    try:
        found = run_evaluate(
            source, bundle, out, config, address=options["address"], report=progress
        )
    finally:
        progress.close()
    print_json(found.to_plain()) if as_json else print_evaluation(found)


if __name__ == "__main__":
    run(command)
