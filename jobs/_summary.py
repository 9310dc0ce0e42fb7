"""What a run says at its end, for a tired person at 6 a.m."""

from typing import Any

import click

from pipeline.flows.evaluate import Evaluation
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


def print_training(result: dict[str, Any]) -> None:
    """What came out of a training: the score first, then how, then where to look."""
    score = _score(result["mean_dice"])
    if not result["trained"]:
        click.echo(
            f"Nothing to do: {result['out']} is finished, with a mean validation Dice of {score}."
        )
        click.echo(f"Its bundle: {result['bundle']}")
        return
    cases = result["num_cases"]
    click.echo(
        f"Trained {result['epochs']} epochs ({result['steps']:,} updates) in {result['seconds']:.0f} s: "
        f"mean validation Dice {score} over {cases['validation']} cases (median "
        f"{_score(result['median_dice'])}), best after epoch {result['best_epoch']}."
    )
    click.echo(
        f"{cases['train']} cases ({result['train_slices']:,} slices) trained, {cases['test']} were held "
        f"back; {result['images_per_s']:,.0f} images/s on {result['workers']} "
        f"{result['device']} worker(s)."
    )
    if result["test_dice"] is not None:
        click.echo(f"mean Dice of the cases held back for testing: {_score(result['test_dice'])}")
    worst = sorted(
        (row for row in result["cases"] if row["dice"] is not None), key=lambda row: row["dice"]
    )[:5]
    if worst:
        click.echo(format_table(worst, ["case_id", "label_name", "dice", "tp", "fp", "fn"]))
    if result["threshold"] is not None:
        click.echo(f"threshold, calibrated on the validation cases: {result['threshold']:g}")
    bad = dict(result.get("bad", {}))
    if bad:
        click.echo("left out: " + ", ".join(f"{n:,} {name}" for name, n in bad.items()))
    for case_id, name, kind, message in result["bad_images"][:10]:
        click.echo(f"  {case_id}/{name}: {kind}: {message}")
    if len(result["bad_images"]) > 10:
        click.echo(f"  and {len(result['bad_images']) - 10} more in {result['out']}/result.json")
    for case_id, (kind, message) in sorted(result["bad_cases"].items())[:10]:
        click.echo(f"left out while training: {case_id}: {kind}: {message}")
    for note in result["notes"]:
        click.echo(f"note: {note}")
    click.echo(f"bundle {result['bundle']}; look at {result['out']}/curves.png and samples.png")


def print_evaluation(found: Evaluation) -> None:
    """Mean, interval and median, the worst cases, and what could not be scored."""
    for name, scores in {**found.by_label, "all": found.overall}.items():
        if name != "all" or len(found.by_label) > 1:
            click.echo(
                f"{name}: mean Dice {scores['mean_dice']:.4f} (95 % interval "
                f"{scores['mean_dice_low']:.4f} to {scores['mean_dice_high']:.4f}), median "
                f"{scores['median_dice']:.4f}, of all pixels {scores['pooled_dice']:.4f}, over "
                f"{scores['num_cases']:.0f} cases"
            )
    click.echo(format_table(found.rows[:20], ["case_id", "label_name", "dice", "hd95", "assd"]))
    if len(found.rows) > 20:
        click.echo(f"… and {len(found.rows) - 20} better ones in {found.out}/cases.csv")
    for number, what in (
        (found.num_both_empty, "empty in reference and prediction, and have no Dice"),
        (found.num_without_reference, "without a complete reference, and are not scored"),
        (found.num_bad_images, "images are bad; see the masks table"),
    ):
        if number:
            click.echo(f"{number} {what}")
    click.echo(f"A picture: {found.out}/dice.png")


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
