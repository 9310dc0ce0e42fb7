"""reseg rollback"""

import click

from jobs._options import EPILOG, because_option, json_option, print_json, run


@click.command("rollback", epilog=EPILOG)
@click.argument("results")
@click.option("--to", required=True, type=click.IntRange(0), help="The night to go back to.")
@because_option
@json_option
def command(results: str, to: int, because: str, as_json: bool) -> None:
    """Publish an old night of RESULTS again, in one commit and seconds, on the record.

    The old content becomes a new night; nothing is deleted, and a rollback can be rolled back. Give
    the next night the old bundle, or it computes everything again with the new one.
    """
    from pipeline.flows.nightly import roll_back

    done = roll_back(results, to, because)
    if as_json:
        print_json(done)
        return
    click.echo(
        f"Night {done['night']} of {results} has the content of night {to} again: "
        f"{done['images']:,} images."
    )


if __name__ == "__main__":
    run(command)
