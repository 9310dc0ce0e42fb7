"""reseg diff"""

from typing import Any

import click

from jobs._options import EPILOG, config_option, json_option, print_json, run, set_option


@click.command("diff", epilog=EPILOG)
@click.argument("results")
@click.option(
    "--from", "before", type=click.IntRange(0), help="Night before; default: --to less 1."
)
@click.option("--to", "after", type=click.IntRange(0), help="Night after; default: the published.")
@click.option("--groups", metavar="PATTERN", help="Group of a case, as '{group}_*'.")
@click.option("-o", "--out", type=click.Path(), help="Folder for cases.parquet and images.parquet.")
@click.option("--force", is_flag=True, help="Overwrite these files if they are there.")
@config_option
@set_option
@json_option
def command(results: str, as_json: bool, **options: Any) -> None:
    """Say what differs between two nights of RESULTS, case by case, and how populations moved.

    Masks that are equal are never read. --config takes the [groups] of a nightly configuration.
    """
    from jobs._summary import print_diff
    from pipeline.config import load_config
    from pipeline.diffing import diff_nights
    from pipeline.policy import NightlyConfig
    from pipeline.telemetry import Progress

    groups = {"groups.pattern": options["groups"]}
    config = load_config(NightlyConfig, options["config_path"], options["assignments"], groups)
    progress = Progress(quiet=as_json)
    try:
        found = diff_nights(
            results, options["before"], options["after"], config.groups, progress=progress
        )
        if options["out"]:
            found.save(options["out"], force=options["force"])
    finally:
        progress.close()
    print_json(found.to_plain()) if as_json else print_diff(found)


if __name__ == "__main__":
    run(command)
