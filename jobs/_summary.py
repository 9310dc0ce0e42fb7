"""What a run says at its end, for a tired person at 6 a.m."""

import click

from pipeline.flows.segment import Summary
from pipeline.telemetry import format_table

_STATES = ["new", "changed", "stale", "removed", "unchanged", "bad"]


def print_summary(summary: Summary, results: str) -> None:
    """First what happened, in one sentence; then the counts; then what to look at."""
    images = summary.counts["images"]
    if summary.published and summary.resumed and not summary.computed_images:
        click.echo(f"Run {summary.run_id} is already night {summary.night}; nothing was done.")
    elif summary.published:
        how = " (resumed)" if summary.resumed else ""
        rate = summary.computed_images / max(summary.seconds, 1e-9)
        click.echo(
            f"Published night {summary.night} in {results}{how}: {summary.computed_images:,} images "
            f"in {summary.seconds:.1f} s ({rate:.1f} images/s), {images['bad']:,} bad."
        )
    else:
        click.echo(
            f"Nothing to do: {images['unchanged']:,} images are unchanged; night {summary.night} "
            f"stays published ({summary.seconds:.1f} s)."
        )
    rows = [{"": name, **summary.counts[name]} for name in ("cases", "images")]
    click.echo(format_table(rows, ["", *_STATES]))
    if summary.bad_by_class:
        click.echo("bad: " + ", ".join(f"{n:,} {name}" for name, n in summary.bad_by_class.items()))
    if summary.stage_seconds:
        spent = ", ".join(f"{name} {value:.1f} s" for name, value in summary.stage_seconds.items())
        click.echo(f"stages (seconds of all workers): {spent}")
    for note in summary.notes:
        click.echo(f"note: {note}")
