"""reseg paths"""

import click

from jobs._options import EPILOG, json_option, night_option, print_json, run


@click.command("paths", epilog=EPILOG)
@click.argument("results")
@click.option("--table", type=click.Choice(["masks", "metrics", "cases"]), help="Only this table.")
@night_option
@json_option
def command(results: str, table: str | None, night: int | None, as_json: bool) -> None:
    """Print the Parquet files of a night of RESULTS: exactly its rows, for any engine.

    With --table, one path a line: duckdb -c "select * from read_parquet([...])", pandas, Polars.
    """
    from pipeline.lookup import require_night

    opened = require_night(results, night)
    names = [table] if table else ["masks", "metrics", "cases"]
    paths = {name: opened.paths(name) for name in names}
    if as_json:
        print_json({"night": opened.number, **paths})
        return
    for name, files in paths.items():
        for path in files:
            click.echo(path if table else f"{name}\t{path}")


if __name__ == "__main__":
    run(command)
