"""reseg shard"""

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


@click.command("shard", epilog=EPILOG)
@click.argument("source")
@click.argument("destination")
@click.option(
    "--to", "kind", type=click.Choice(["parquet", "tar"]), default="parquet", show_default=True
)
@click.option("--shard-mb", type=click.IntRange(1), default=128, show_default=True)
@source_options
@config_option
@set_option
@json_option
def command(
    source: str, destination: str, kind: str, shard_mb: int, as_json: bool, **options: Any
) -> None:
    """Write the cases of SOURCE as shards in DESTINATION; ids, slices and bytes stay the same.

    A case is never split over shards. The same source gives the same bytes; interrupted, the same
    command takes up where it stopped.
    """
    from dataclasses import asdict

    from pipeline.config import SegmentConfig, load_config
    from pipeline.formats import open_source
    from pipeline.sharding import write_shards
    from pipeline.telemetry import Progress

    values = source_values(options)
    config = load_config(SegmentConfig, options["config_path"], options["assignments"], values)
    opened = open_source(source, config.source, config.limits)
    progress = Progress(quiet=as_json)
    summary = write_shards(opened, destination, kind, shard_mb << 20, progress)  # type: ignore[arg-type]
    progress.close()
    if as_json:
        print_json(asdict(summary))
        return
    click.echo(
        f"{summary.num_shards:,} shards in {destination} ({summary.num_written:,} written now): "
        f"{summary.num_cases:,} cases, {summary.num_images:,} images, "
        f"{summary.size_bytes / 1e6:,.1f} MB"
    )


if __name__ == "__main__":
    run(command)
