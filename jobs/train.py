"""reseg train"""

from typing import Any

import click

from jobs._options import (
    EPILOG,
    address_option,
    config_option,
    device_option,
    json_option,
    print_json,
    run,
    set_option,
    source_options,
    source_values,
)


@click.command("train", epilog=EPILOG)
@click.argument("source")
@click.argument("out")
@click.option("--init", metavar="BUNDLE", help="Start from this bundle's weights and recipe.")
@click.option("--also", multiple=True, metavar="LIST", help="More cases; see `reseg review`.")
@source_options
@config_option
@set_option
@click.option("--epochs", type=click.IntRange(1), help="Times through the training slices.")
@click.option("--workers", type=click.IntRange(1), help="Processes that share each batch.")
@device_option
@address_option
@json_option
def command(source: str, out: str, as_json: bool, **options: Any) -> None:
    """Train a network on the images of SOURCE that have reference masks; OUT/bundle is the result.

    Patients are split by hash into those that train and those that judge. Interrupted or killed,
    the same command goes on where the last checkpoint is; finished, it does nothing. OUT also
    gets curves.png and samples.png, worst cases first. All keys of the configuration are in
    pipeline/defaults/train.toml.
    """
    from jobs._summary import print_training
    from pipeline.config import TrainConfig, load_config
    from pipeline.flows.train import run_train
    from pipeline.telemetry import Progress

    values = config_values(options)
    config = load_config(TrainConfig, options["config_path"], options["assignments"], values)
    progress = Progress(quiet=as_json)
    try:
        result = run_train(source, out, config, address=options["address"], report=progress)
    finally:
        progress.close()
    print_json(result) if as_json else print_training(result)


def config_values(options: dict[str, Any]) -> dict[str, Any]:
    """What the options mean as keys of the configuration."""
    return {
        **source_values(options),
        "model.init": options["init"],
        "epochs": options["epochs"],
        "resources.workers": options["workers"],
        "resources.device": options["device"],
        "also": list(options["also"]) or None,
    }


if __name__ == "__main__":
    run(command)
