"""reseg report"""

import click

from jobs._options import EPILOG, run


@click.command("report", epilog=EPILOG)
@click.argument("results")
@click.option("--run-id", help="Of this nightly run; default: the newest one.")
@click.option("-o", "--out", required=True, type=click.Path(), help="HTML file to write.")
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
@click.option("--pictures", default=12, show_default=True, type=click.IntRange(0, 200))
def command(results: str, run_id: str | None, out: str, force: bool, pictures: int) -> None:
    """Write the report of a nightly run of RESULTS again, as one HTML file that needs no network."""
    from jobs._options import check_out_file
    from pipeline import storage
    from pipeline.flows.nightly import remake_report
    from pipeline.telemetry import Progress

    place = check_out_file(out, force=force)
    progress = Progress()
    try:
        page = remake_report(results, run_id, pictures, progress)
    finally:
        progress.close()
    storage.write(place, page)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    run(command)
