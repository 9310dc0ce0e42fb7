"""reseg review"""

from typing import Any

import click

from jobs._options import EPILOG, json_option, print_json, run


@click.command("review", epilog=EPILOG)
@click.argument("results")
@click.option("-o", "--out", type=click.Path(), help="New folder for images and masks to correct.")
@click.option("--run-id", help="Of this nightly run; default: the newest one.")
@click.option("--most", default=20, show_default=True, type=click.IntRange(1), help="Cases.")
@json_option
def command(results: str, out: str | None, as_json: bool, **options: Any) -> None:
    """List the cases of a nightly run that a person should look at, each with its reasons.

    With --out they are written as files to correct, and as a list for `reseg train --also`.
    """
    from pipeline.flows.nightly import export_review, read_review
    from pipeline.telemetry import Progress, format_table

    run_id, items = read_review(results, options["run_id"])
    items = items[: options["most"]]
    exported = None
    if out is not None:
        progress = Progress(quiet=as_json)
        try:
            exported = export_review(results, run_id, items, out, progress)
        finally:
            progress.close()
    if as_json:
        told = exported and exported.to_plain()
        print_json({"run_id": run_id, "review": items, "exported": told})
        return
    rows = [{**item, "reasons": "; ".join(item["reasons"])} for item in items]
    click.echo(format_table(rows, ["case_id", "group", "state", "reasons"]) if rows else "Nothing.")
    if exported is not None:
        click.echo(
            f"wrote {len(exported.cases)} cases ({exported.num_images} images); correct the masks, "
            f"then: reseg train SOURCE OUT --also {exported.to_plain()['list']}"
        )
        for case_id, problem in exported.left_out:
            click.echo(f"left out {case_id}: {problem}")


if __name__ == "__main__":
    run(command)
