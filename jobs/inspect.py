"""reseg inspect"""

from typing import Any

import click

from jobs._options import (
    EPILOG,
    config_option,
    json_option,
    print_json,
    run,
    set_option,
    source_options,
    source_values,
)


@click.command("inspect", epilog=EPILOG)
@click.argument("source")
@source_options
@config_option
@set_option
@json_option
def command(source: str, as_json: bool, **options: Any) -> None:
    """Say what SOURCE holds: format, cases, images, masks, sizes, and what its listing shows amiss.

    Opens a few images to tell their size and type; reads nothing else.
    """
    from pipeline.config import SegmentConfig, load_config
    from pipeline.inspection import inspect_source
    from pipeline.telemetry import Progress

    values = source_values(options)
    config = load_config(SegmentConfig, options["config_path"], options["assignments"], values)
    progress = Progress(quiet=as_json)
    found = inspect_source(source, config, progress)
    progress.close()
    if as_json:
        print_json(found)
        return
    width = max(map(len, found))
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{n:,} x {k}" for k, n in value.items()) or "none"
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        elif isinstance(value, int):
            value = f"{value:,}"
        click.echo(f"{name.replace('_', ' '):<{width}}  {value}")


if __name__ == "__main__":
    run(command)
