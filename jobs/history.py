"""reseg history"""

from datetime import UTC, datetime
from typing import Any

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
        images = {} if "rollback" in night else night.get("counts", {}).get("images", {})
        when = datetime.fromtimestamp(night["published_ms"] / 1000, UTC)
        rows.append(
            {
                "night": night["night"],
                "published (UTC)": f"{when:%Y-%m-%d %H:%M:%S}",
                "by": night.get("operator"),
                "run": night.get("run_id", night["operation"].lower()),
                "bundle": night.get("bundle", {}).get("name"),
                "digest": night.get("bundle", {}).get("digest", "")[:12],
                **{k: images.get(k) for k in ("new", "changed", "stale", "removed", "bad")},
                "what": _what(night),
            }
        )
    click.echo(format_table(rows, rows[0]))


def _what(night: dict[str, Any]) -> str:
    """What is special about a night, and whether it can still be read."""
    words = []
    if "rollback" in night:
        words.append(f"rolled back to {night['rollback']['to']}: {night['because']}")
    elif night.get("because"):
        words.append(f"published over the gate: {night['because']}")
    elif night.get("verdict"):
        words.append("gate kept")
    if not night["kept"]:
        words.append("collected")
    return "; ".join(words)


if __name__ == "__main__":
    run(command)
