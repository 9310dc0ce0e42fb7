"""What a run says at its end, for a tired person at 6 a.m."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pipeline.compare import COUNTS
from pipeline.flows.segment import Summary
from pipeline.telemetry import format_table

if TYPE_CHECKING:
    from pipeline.diffing import Diff
    from pipeline.flows.evaluate import Evaluation
    from pipeline.flows.nightly import Outcome
    from pipeline.flows.shadow import Shadow
    from pipeline.proof import Proof

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
        click.echo("stages, in seconds of all workers: " + ", ".join(_stages(summary)))
    if summary.advice:
        click.echo(summary.advice)
    for note in summary.notes:
        click.echo(f"note: {note}")


def _stages(summary: Summary) -> Iterator[str]:
    for stage, seconds in summary.stage_seconds.items():
        size = summary.stage_bytes.get(stage)
        yield f"{stage} {seconds:.1f} s" + (f" ({_size(size)})" if size else "")


def _size(num_bytes: int) -> str:
    unit, power = next(
        (u, p) for u, p in (("GB", 9), ("MB", 6), ("kB", 3)) if num_bytes >= 10**p or p == 3
    )
    return f"{num_bytes / 10**power:.3g} {unit}"


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


def print_evaluation(found: "Evaluation") -> None:
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


def print_night(outcome: "Outcome", results: str) -> None:
    """The verdict first, then the counts, then what to look at."""
    summary, verdict = outcome.summary, outcome.verdict
    if outcome.refused and verdict is not None:
        stays = (
            "nothing is published"
            if outcome.base_night is None
            else f"night {outcome.base_night} stays published"
        )
        click.echo(f"REFUSED by the gate, {stays}: {verdict.sentence}.")
        click.echo(
            f"The staged night waits; to publish it all the same:\n"
            f'  reseg publish {results} {summary.run_id} --because "..."'
        )
    else:
        print_summary(summary, results)
    if verdict is not None:
        words = {True: "kept", False: "FAILED", None: "not judged"}
        rows = [
            {
                "limit": item.what,
                "value": item.value,
                "allowed": None if item.limit == -1 else item.limit,
                "verdict": words[item.passed],
                "rests on": item.note,
            }
            for item in verdict.limits
        ]
        click.echo(format_table(rows, ["limit", "value", "allowed", "verdict", "rests on"]))
    for item in outcome.review[:10]:
        click.echo(f"look at {item.case_id}: {'; '.join(item.reasons)}")
    if len(outcome.review) > 10:
        click.echo(f"and {len(outcome.review) - 10} more: see the report")
    if outcome.report:
        click.echo(f"report: {outcome.report}")
    for note in outcome.notes:
        click.echo(f"note: {note}")
    if outcome.waste and outcome.waste.files:
        megabytes = outcome.waste.num_bytes / 1e6
        click.echo(f"collected {len(outcome.waste.files):,} old files ({megabytes:,.1f} MB)")


def print_diff(found: "Diff") -> None:
    """Counts of images and cases, the cases that moved most, and drift."""
    comparison = found.comparison
    images = ", ".join(f"{n:,} {name}" for name, n in comparison.counts.items() if name in COUNTS)
    cases = ", ".join(f"{n:,} {name}" for name, n in comparison.case_states.items())
    click.echo(f"Night {comparison.before} to night {comparison.after}.")
    click.echo(f"images: {images}".replace("_", " "))
    click.echo(f"cases: {cases}")
    columns = ["case_id", "label_name", "state", "dice", "volume_px_before", "volume_px_after"]
    rows = found.rows
    if rows:
        click.echo(format_table(rows[:20], [*columns, "appeared", "vanished"]))
    if len(rows) > 20:
        click.echo(f"and {len(rows) - 20:,} more rows: --out writes all, --json prints a thousand")
    drifting = sorted(found.drift, key=lambda d: -d.psi)[:10]
    if drifting:
        shown = [
            "population",
            "group",
            "label_name",
            "quantity",
            "num_after",
            "psi",
            "ks",
            "p_value",
        ]
        click.echo(format_table([asdict(item) for item in drifting], shown))


def print_shadow(found: "Shadow") -> None:
    """The advice first, then what it rests on."""
    click.echo(f"{found.advice.upper()}: {found.reason}.")
    if found.mean_dice is not None:
        click.echo(
            f"{found.num_cases} cases sampled; mean Dice to what is published {found.mean_dice:.4f}"
        )
    if found.confidence:
        before, after = found.confidence
        click.echo(f"mean confidence {before:.4f} published, {after:.4f} with the candidate")
    for limit in found.verdict.limits:
        word = {True: "kept", False: "FAILED", None: "not judged"}[limit.passed]
        value = "-" if limit.value is None else f"{limit.value:.4g}"
        click.echo(f"{word}: {limit.what} {value} ({limit.note})")
    if found.worst:
        click.echo(format_table(found.worst, found.worst[0]))
    click.echo(f"the candidate's own results, of the sample alone: {found.out}")


def print_verified(proof: "Proof") -> None:
    """What was proved, what not, and what to do."""
    if proof.images:
        counts = proof.outcomes
        click.echo(
            f"Night {proof.night}: of {len(proof.images)} masks computed again {counts['equal']} are the "
            f"same bits, {counts['different']} differ, {counts['gone']} cannot be: their input is another."
        )
        for item in proof.images:
            if item.outcome == "different":
                click.echo(f"  {item.image_id}: {item.note or 'same kind of machine, other bits'}")
    checked = proof.checked
    if checked is not None:
        click.echo(
            f"{len(checked.nights)} nights, {checked.num_parts:,} parts and {checked.num_manifests:,} "
            f"manifests ({checked.num_bytes / 1e6:,.1f} MB) read: {len(checked.damaged)} damaged."
        )
        for line in checked.damaged[:20]:
            click.echo(f"  {line}")
        if checked.unsealed:
            nights = ", ".join(map(str, checked.unsealed))
            click.echo(f"without digests of their log entries: night {nights}")
