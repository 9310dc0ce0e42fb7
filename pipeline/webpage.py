"""The nightly report: one HTML file that needs nothing else, and trusts nothing that it shows.

No network, no script but our own constant one (its hash is in the content-security policy), every
value escaped, pictures as data URIs of our own drawing.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup
from PIL import Image

from pipeline import charts, results, runs, storage, tables
from pipeline.errors import ResegError, ResultsError
from pipeline.gate import Limit
from pipeline.lookup import Pixels, read_pixels
from pipeline.report import draw_overlay
from pipeline.results import Night

_MOST_CASES = 300
_NIGHTS_SHOWN = 30
_COUNT_NAMES = ("new", "changed", "stale", "removed", "unchanged", "bad")
_DASH = "\N{EN DASH}"


def write_page(results_uri: str, examined: Mapping[str, Any], worst_cases: int) -> bytes:
    """The page of an examined run, as it stands now: published, published over the gate, or refused.

    examined: what the nightly flow kept. Pictures need the source; where an image cannot be read any
    more its caption says so.
    """
    run_id = examined["run_id"]
    night_number = results.night_of_run(results_uri, run_id)
    history = (
        results.history(results_uri) if results.latest_night_number(results_uri) is not None else []
    )
    entry = next((item for item in history if item["night"] == night_number), {})
    moved = read_rows(results_uri, run_id, "cases")
    cases = moved.to_pylist()
    verdict = examined["verdict"]
    tone, badge, sentence, detail = _in_a_sentence(examined, night_number, entry)
    page = _environment().get_template("report.html")
    style, script = _text("report.css"), _text("report.js")
    drift = examined["drift"]
    html = page.render(
        title=f"{badge}: night of run {run_id}",
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        tone=tone,
        badge=badge,
        sentence=sentence,
        detail=detail,
        subtitle=_subtitle(examined, entry),
        sections=_sections(cases, drift),
        count_names=_COUNT_NAMES,
        counts={name: examined["summary"][name] for name in ("cases", "images")},
        bad=examined["summary"]["bad_by_class"],
        movement=_movement(examined),
        limits=[_limit_row(limit) for limit in verdict["limits"]],
        review=examined["review"],
        grouped=any(row["group"] for row in cases),
        pictures=_pictures(results_uri, examined, cases, worst_cases),
        charts=_charts(cases, drift, examined, history),
        cases=_most_moved(cases),
        cases_note=_cases_note(cases),
        drift=sorted(drift, key=lambda row: -row["psi"])[:_MOST_CASES],
        lineage=_lineage(results_uri, examined, night_number, entry),
    )
    return html.encode("utf-8", "replace")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(figure=_figure, number=_number, percent=_percent)
    return environment


def _text(name: str) -> str:
    return (files("pipeline") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _figure(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _number(value: int | None) -> str:
    return _DASH if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return _DASH if value is None else f"{value:+.0%}"


def _in_a_sentence(
    examined: Mapping[str, Any], night: int | None, entry: Mapping[str, Any]
) -> tuple[str, str, str, str]:
    """(tone, badge, the sentence that says it all, what to add where a limit failed)."""
    summary, limits = examined["summary"], examined["verdict"]["limits"]
    failed = [limit for limit in limits if limit["passed"] is False]
    judged = sum(limit["passed"] is not None for limit in limits)
    reasons = "; ".join(Limit(**limit).failure for limit in failed)
    reasons = f"{reasons[:1].upper()}{reasons[1:]}."
    if night is None:
        base = examined["base_night"]
        stays = "nothing is published" if base is None else f"night {base} stays published"
        return "bad", "Refused", f"{len(failed)} of {judged} limits failed; {stays}.", reasons
    if failed:
        said = (
            f"Night {night} was published over {len(failed)} failed limits: {entry.get('because')}"
        )
        return "unsure", "Published by hand", said, reasons
    cases = summary["cases"]
    done = cases["new"] + cases["changed"] + cases["stale"]
    look = len(examined["review"])
    kept = f"all {judged} limits" if judged > 1 else "the one limit that could be judged"
    to_see = f"{look:,} case{'s' * (look != 1)}" if look else "nothing"
    said = (
        f"Night {night} is published: {summary['computed_images']:,} images of {done:,} "
        f"case{'s' * (done != 1)} computed, {kept} kept, {to_see} to look at."
    )
    return "good", "Published", said, ""


def _subtitle(examined: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    seconds = entry.get("published_ms", 1000 * examined["examined_s"]) / 1000
    summary = examined["summary"]
    rate = summary["computed_images"] / max(summary["seconds"], 1e-9)
    when = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    bundle = examined["bundle"]
    return (
        f"{when} \N{MIDDLE DOT} network {bundle['name']} \N{MIDDLE DOT} {summary['seconds']:,.0f} s, "
        f"{rate:,.1f} images/s"
    )


def _sections(cases: Sequence[Any], drift: Sequence[Any]) -> list[tuple[str, str]]:
    names = [("counts", "Counts"), ("verdict", "The gate"), ("review", "To look at")]
    names.append(("charts", "Charts"))
    if cases:
        names.append(("cases", "Cases that moved"))
    if drift:
        names.append(("drift", "Drift"))
    return [*names, ("lineage", "Where it comes from")]


def _movement(examined: Mapping[str, Any]) -> str:
    if examined["base_night"] is None:
        return "There was no published night to compare with."
    counts = examined["comparison"]["counts"]
    return (
        f"Against night {examined['base_night']}: {counts['same']:,} masks are the same, "
        f"{counts['changed']:,} differ, {counts['new']:,} images are new, {counts['removed']:,} are gone, "
        f"{counts['status']:,} changed their status, {counts['not_comparable']:,} have another size."
    )


def _limit_row(limit: Mapping[str, Any]) -> dict[str, Any]:
    tone, word = {True: ("good", "kept"), False: ("bad", "failed"), None: ("unsure", "not judged")}[
        limit["passed"]
    ]
    return {
        **limit,
        "tone": tone,
        "word": word,
        "limit": None if limit["limit"] == -1 else limit["limit"],
    }


def read_rows(results_uri: str, run_id: str, name: str) -> pa.Table:
    """The table "cases" or "images" of an examined run. Raises ResultsError if it is damaged."""
    uri = runs.run_uri(results_uri, run_id, f"{name}.parquet")
    try:
        return pq.read_table(io.BytesIO(storage.read(uri)), page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        raise ResultsError(f"{uri} is damaged or gone; the nightly command makes it anew") from None


def _moved(cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in cases if row["state"] in ("changed", "recomputed")]


def _most_moved(cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Cases computed again, the lowest Dice first; then new and removed ones."""

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        again = row["state"] in ("changed", "recomputed")
        dice = 1.0 if row["dice"] is None else row["dice"]
        return (not again, dice, row["case_id"], row["label"])

    return sorted(cases, key=order)[:_MOST_CASES]


def _cases_note(cases: Sequence[Any]) -> str:
    if len(cases) <= _MOST_CASES:
        return f"All {len(cases):,} rows, the lowest Dice first."
    return f"The first {_MOST_CASES} of {len(cases):,} rows, the lowest Dice first; all are in cases.parquet beside the run."


# Charts


def _charts(
    cases: Sequence[Mapping[str, Any]],
    drift: Sequence[Mapping[str, Any]],
    examined: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []

    def add(svg: bytes, caption: str, alt: str) -> None:
        data = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
        found.append({"data": data, "caption": caption, "alt": alt})

    again = _moved(cases)
    sized = [r for r in again if None not in (r["volume_px_before"], r["volume_px_after"])]
    if sized:
        grown = sum(r["volume_px_after"] > r["volume_px_before"] for r in sized)
        alt = f"Scatter of volumes before and now of {len(sized)} rows; {grown} grew"
        add(
            charts.draw_volume_changes(sized),
            "Volume of each case computed again, before and now.",
            alt,
        )
    dice = [row["dice"] for row in again if row["dice"] is not None]
    if dice:
        alt = f"Histogram of the Dice between the nights, median {np.median(dice):.3f}, lowest {min(dice):.3f}"
        add(charts.draw_dice_histogram(dice), "Dice of each case to the published night.", alt)
    before = [r["confidence_before"] for r in cases if r["confidence_before"] is not None]
    after = [r["confidence_after"] for r in cases if r["confidence_after"] is not None]
    if after:
        alt = f"Distribution of confidence, median now {np.median(after):.3f}"
        add(charts.draw_confidence(before, after), "Confidence of the cases computed tonight.", alt)
    if drift:
        worst = max(drift, key=lambda row: row["psi"])
        limit = next(
            (x["limit"] for x in examined["verdict"]["limits"] if x["name"] == "max_drift_psi"),
            None,
        )
        alt = f"Bars of drift by group; the largest PSI is {worst['psi']:.2f}"
        add(charts.draw_drift(drift, limit), "Drift by group.", alt)
    stages = examined["summary"]["stage_seconds"]
    if stages:
        most = max(stages, key=lambda name: stages[name])
        alt = f"Bars of seconds by stage; most went into {most}"
        add(charts.draw_stages(stages), "Where the time went.", alt)
    nights = _recent_nights(history)
    if len(nights) > 1:
        add(
            charts.draw_nights(nights),
            "Images computed on the last nights.",
            "Bars of images by night",
        )
    return found


def _recent_nights(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    nights = [
        {
            "night": item["night"],
            "computed": 0 if "rollback" in item else item.get("computed_images", 0),
        }
        for item in history
    ]
    return nights[:_NIGHTS_SHOWN][::-1]


# Pictures


def _pictures(
    results_uri: str,
    examined: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    most: int,
) -> list[dict[str, str]]:
    """Overlays before and after of the cases to look at; what cannot be drawn is left out or said."""
    wanted = [item for item in examined["review"] if item["image_id"]][:most]
    if not wanted:
        return []
    try:
        before, after = results.nights_of_run(results_uri, examined["run_id"])
        return _draw(before, after, wanted, {row["case_id"]: row["shard_id"] for row in cases})
    except (ResegError, OSError):
        return []  # nights that were collected, or a source that is gone: the tables stay


def _draw(
    before: Night | None,
    after: Night,
    wanted: Sequence[Mapping[str, Any]],
    shard_of: Mapping[str, str],
) -> list[dict[str, str]]:
    rows = {}
    for item in wanted:
        row = _mask_row(after, shard_of.get(item["case_id"]), item["image_id"])
        if row is not None:
            rows[item["image_id"]] = row
    pixels = read_pixels(after, list(rows.values()))
    drawn = []
    for item in wanted:
        image_id = item["image_id"]
        if image_id not in rows:
            continue
        words = "; ".join(item["reasons"])
        read = pixels[image_id]
        old = _mask_row(before, shard_of.get(item["case_id"]), image_id)
        if isinstance(read, str):
            continue
        drawn.append(
            {
                "image_id": image_id,
                "words": words,
                "alt": f"{image_id} with the published mask and with tonight's: {words}",
                "data": _side_by_side(read, old, rows[image_id]),
            }
        )
    return drawn


def _mask_row(night: Night | None, shard_id: str | None, image_id: str) -> dict[str, Any] | None:
    """The row of `masks`, with its label map under "map"."""
    shard = None if night is None or shard_id is None else night.shards.get(shard_id)
    if night is None or shard is None or shard.parts.masks is None:
        return None
    columns = [n for n in tables.table_schema("masks").names if n != "mask"]
    table = tables.read_part(night.results, "masks", shard.parts.masks, columns)
    position = (
        table.column("image_id").to_pylist().index(image_id)
        if image_id in set(table.column("image_id").to_pylist())
        else -1
    )
    if position < 0:
        return None
    found = tables.read_masks(night.results, shard.parts.masks, [position])[position]
    return {**table.slice(position, 1).to_pylist()[0], "map": found}


def _side_by_side(read: Pixels, old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    image_HWC, reference_HW = read
    pictures = []
    for word, row in (("before", old), ("now", new)):
        mask_HW = None if row is None else row["map"]
        if mask_HW is not None and mask_HW.shape != image_HWC.shape[:2]:
            mask_HW = None
        pictures.append(
            draw_overlay(
                image_HWC,
                mask_HW,
                reference_HW,
                caption=word if mask_HW is not None else f"{word}: no mask",
                min_side=384,
            )
        )
    width, height = pictures[0].size
    page = Image.new("RGB", (2 * width + 6, height), (20, 20, 20))
    for number, picture in enumerate(pictures):
        page.paste(picture, (number * (width + 6), 0))
    page.thumbnail((1600, 1200))
    buffer = io.BytesIO()
    page.save(buffer, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _lineage(
    results_uri: str,
    examined: Mapping[str, Any],
    night: int | None,
    entry: Mapping[str, Any],
) -> list[tuple[str, str]]:
    bundle, code = examined["bundle"], examined["code"]
    rows = [
        ("results", results_uri),
        ("source", f"{examined['source']['uri']} ({examined['source']['format']})"),
        ("run", examined["run_id"]),
        ("night", "not published" if night is None else str(night)),
        (
            "compared with",
            "nothing" if examined["base_night"] is None else f"night {examined['base_night']}",
        ),
        ("bundle", f"{bundle['name']}, {bundle['uri']}"),
        ("bundle digest", bundle["digest"]),
        ("operator", str(entry.get("operator", code.get("operator", "")))),
        (
            "software",
            ", ".join(f"{k} {v}" for k, v in sorted(code.items()) if k not in ("operator", "host")),
        ),
    ]
    if entry.get("because"):
        rows.append(("because", entry["because"]))
    scores = examined["scores"]
    if scores:
        rows.append(("labelled set", json.dumps({k: v for k, v in scores.items() if k != "worst"})))
    notes = examined["summary"]["notes"]
    return [*rows, *(("note", note) for note in notes)]
