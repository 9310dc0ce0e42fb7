"""reseg vacuum"""

import click

from jobs._options import EPILOG, json_option, print_json, run


@click.command("vacuum", epilog=EPILOG)
@click.argument("results")
@click.option(
    "--keep",
    default=30,
    show_default=True,
    type=click.IntRange(0),
    help="Newest nights to keep; 0: all.",
)
@click.option(
    "--grace-hours",
    default=72.0,
    show_default=True,
    help="Keep what is younger: longer than any run.",
)
@click.option("--yes", is_flag=True, help="Delete; without it only say what would be deleted.")
@json_option
def command(results: str, keep: int, grace_hours: float, yes: bool, as_json: bool) -> None:
    """Collect the parts of RESULTS that no kept night and no unfinished run needs.

    Says what would go, and deletes with --yes. Plans, receipts and reports of runs stay: they are the
    lineage.
    """
    from pipeline import storage
    from pipeline.lock import locked
    from pipeline.policy import KeepConfig
    from pipeline.telemetry import Progress
    from pipeline.upkeep import collect, find_waste

    uri = storage.resolve(results)
    policy = KeepConfig(nights=keep, grace_hours=grace_hours)
    progress = Progress(quiet=as_json)
    waste = find_waste(uri, policy)
    if yes:
        with locked(storage.join(uri, "_runs"), "collecting"):
            waste = find_waste(uri, policy)
            collect(uri, waste, progress)
    progress.close()
    if as_json:
        print_json({**waste.to_plain(), "deleted": yes})
        return
    did = "Deleted" if yes else "Would delete"
    click.echo(
        f"{did} {len(waste.files):,} files ({waste.num_bytes / 1e6:,.1f} MB); {waste.nights_dropped} "
        f"nights go, the oldest kept is night {waste.oldest_night}; {waste.num_too_young:,} more are "
        "too young."
    )
    if not yes and (waste.files or waste.nights_dropped):
        click.echo("Nothing was deleted: --yes does it.")


if __name__ == "__main__":
    run(command)
