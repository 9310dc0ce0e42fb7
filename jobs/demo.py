"""reseg demo"""

from pathlib import Path

import click

from jobs._options import EPILOG, json_option, print_json, run


@click.command("demo", epilog=EPILOG)
@click.option("--out", default="reseg-demo", show_default=True, help="Folder to write to.")
@click.option("--cases", type=click.IntRange(1, 1000), default=24, show_default=True)
@click.option("--quick", is_flag=True, help="Use the network that ships instead of training one.")
@json_option
def command(out: str, cases: int, quick: bool, as_json: bool) -> None:
    """Make phantoms with known lesions, train a network on some, segment the others.

    Takes about a minute on two cores; nothing is fetched. Run again, it finds nothing to do.
    """
    from pipeline.flows.demo import run_demo
    from pipeline.telemetry import Progress, format_table

    progress = Progress(quiet=as_json)
    try:
        demo = run_demo(Path(out), cases, train=not quick, report=progress)
    finally:
        progress.close()
    if as_json:
        print_json(demo.to_plain())
        return
    from jobs._summary import print_summary, print_training

    if demo.training is not None:
        print_training(demo.training)
        click.echo("")
    print_summary(demo.summary, str(demo.results))
    click.echo("")
    click.echo(format_table(demo.rows, ["case_id", "volume_ml", "components_3d", "dice", "hd95"]))
    click.echo(f"mean Dice {demo.mean_dice:.4f} over {len(demo.rows)} cases\n")
    click.echo(f"A picture: {demo.picture}\n")
    click.echo("Read the results with pandas and DuckDB:\n")
    click.echo("  import duckdb; from deltalake import DeltaTable")
    click.echo(f"  cases = DeltaTable('{demo.results}/cases').to_pandas()")
    click.echo('  duckdb.sql("select case_id, volume_ml, dice from cases order by dice")\n')
    click.echo(f"Next: reseg history {demo.results}; reseg show {demo.results} IMAGE_ID -o out.png")


if __name__ == "__main__":
    run(command)
