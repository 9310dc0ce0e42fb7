"""reseg history"""

from datetime import UTC, datetime

import click

from jobs._options import EPILOG, json_option, print_json, run


@click.command("history", epilog=EPILOG)
@click.argument("results")
@json_option
def command(results: str, as_json: bool) -> None:
    """List the published nights of RESULTS, newest first."""
    from pipeline import storage
    from pipeline.results import history
    from pipeline.telemetry import format_table

    nights = history(storage.resolve(results))
    if as_json:
        print_json({"nights": nights})
        return
    rows = []
    for night in nights:
        images = night.get("counts", {}).get("images", {})
        rows.append(
            {
                "night": night["night"],
                "published (UTC)": f"{datetime.fromtimestamp(night['published_ms'] / 1000, UTC):%Y-%m-%d %H:%M:%S}",
                "run": night.get("run_id", night["operation"].lower()),
                "bundle": night.get("bundle", {}).get("name"),
                "digest": night.get("bundle", {}).get("digest", "")[:12],
                **{k: images.get(k) for k in ("new", "changed", "stale", "removed", "bad")},
            }
        )
    click.echo(format_table(rows, rows[0]))


if __name__ == "__main__":
    run(command)
