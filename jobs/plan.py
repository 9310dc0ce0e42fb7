"""reseg plan"""

from typing import Any

import click

from jobs._options import (
    EPILOG,
    bundle_option,
    config_option,
    json_option,
    limit_option,
    print_json,
    run,
    set_option,
    source_options,
    source_values,
)


@click.command("plan", epilog=EPILOG)
@click.argument("source")
@click.argument("results")
@bundle_option
@source_options
@config_option
@set_option
@limit_option
@json_option
def command(source: str, results: str, bundle: str, as_json: bool, **options: Any) -> None:
    """Say what `reseg segment SOURCE RESULTS` would compute; compute and write nothing.

    new: not published yet. changed: other bytes. stale: the network or the configuration is
    another. removed: no longer in the source. unchanged: nothing to do.
    """
    from pipeline.bundle import load_bundle
    from pipeline.config import SegmentConfig, load_config
    from pipeline.planning import make_plan
    from pipeline.telemetry import Progress, format_table

    values = source_values(options)
    config = load_config(SegmentConfig, options["config_path"], options["assignments"], values)
    progress = Progress(quiet=as_json)
    plan = make_plan(
        source, results, load_bundle(bundle), config, limit=options["limit"], progress=progress
    )
    progress.close()
    if as_json:
        night = plan.base_night
        print_json({"run_id": None, "night": night, **plan.counts, "shards": len(plan.works)})
        return
    rows = [{"": name, **plan.counts[name]} for name in ("cases", "images")]
    click.echo(format_table(rows, ["", "new", "changed", "stale", "removed", "unchanged", "bad"]))
    todo = sum(plan.counts["images"][state] for state in ("new", "changed", "stale"))
    base = (
        "nothing is published yet"
        if plan.base_night is None
        else f"against night {plan.base_night}"
    )
    click.echo(f"{todo:,} images to compute in {len(plan.works):,} shards; {base}")


if __name__ == "__main__":
    run(command)
