"""The charts of a nightly report: SVG that reads on light and on dark paper."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_INK = "#7d8891"
_BEFORE, _AFTER = "#8f9ba3", "#d4622f"
_COLOURS = ("#d4622f", "#3d7fc1", "#3f9a5b", "#a35bb0", "#c7951f")
_MOST_POINTS = 4000
_MOST_BARS = 20


def draw_volume_changes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Volume of each case before and after, on logarithmic axes; on the diagonal nothing changed."""
    figure, axes = _figure()
    labels = sorted({row["label_name"] for row in rows})
    low, top = np.inf, 10.0
    for colour, label in zip(_COLOURS * len(labels), labels, strict=False):
        points = [
            (row["volume_px_before"] + 1, row["volume_px_after"] + 1)
            for row in rows
            if row["label_name"] == label
        ]
        before, after = np.array(_thin(points), np.float64).T
        low = min(low, float(before.min()), float(after.min()))
        top = max(top, float(before.max()), float(after.max()))
        axes.scatter(
            before,
            after,
            s=14,
            color=colour,
            alpha=0.6,
            linewidths=0,
            label=_plain(label),
            rasterized=len(before) > _MOST_POINTS // 10,
        )
    axes.plot([low, top], [low, top], color=_INK, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("voxels before, plus one")
    axes.set_ylabel("voxels now, plus one")
    if len(labels) > 1:
        _legend(axes)
    return _svg(figure)


def draw_dice_histogram(values: Sequence[float]) -> bytes:
    """How many cases have which Dice between the nights."""
    figure, axes = _figure()
    axes.hist(values, bins=np.linspace(0, 1, 26), color=_AFTER)
    axes.set_xlim(0, 1)
    axes.set_xlabel("Dice between the nights")
    axes.set_ylabel("cases")
    axes.yaxis.get_major_locator().set_params(integer=True)
    return _svg(figure)


def draw_confidence(before: Sequence[float], after: Sequence[float]) -> bytes:
    """Distribution of the cases' confidence before and now, as shares."""
    figure, axes = _figure()
    both = [*before, *after]
    low = min(0.5, *both) if both else 0.5
    bins = np.linspace(low, 1, 31)
    for values, colour, label, filled in (
        (before, _BEFORE, "before", True),
        (after, _AFTER, "now", False),
    ):
        if len(values):
            weights = np.full(len(values), 100 / len(values))
            axes.hist(
                values,
                bins=bins,
                weights=weights,
                color=colour,
                label=label,
                histtype="stepfilled" if filled else "step",
                alpha=0.5 if filled else 1.0,
                linewidth=1.6,
            )
    axes.set_xlabel("mean probability of the label over its voxels")
    axes.set_ylabel("% of cases")
    _legend(axes)
    return _svg(figure)


def draw_drift(rows: Sequence[Mapping[str, Any]], limit: float | None) -> bytes:
    """PSI of each group as bars, the worst first; dotted lines where it is called moved, and the limit."""
    worst = sorted(rows, key=lambda row: -row["psi"])[:_MOST_BARS][::-1]
    figure, axes = _figure(height=1.2 + 0.26 * max(4, len(worst)))
    names = [
        _plain(
            f"{row['group'] or 'all'}: {row['quantity']} of {row['label_name']} ({row['population']})"
        )
        for row in worst
    ]
    places = np.arange(len(worst))
    axes.barh(places, [row["psi"] for row in worst], color=_AFTER, height=0.7)
    axes.set_yticks(places, names, fontsize=8)
    axes.axvline(0.25, color=_INK, linestyle=":", linewidth=1)
    if limit is not None and limit >= 0:
        axes.axvline(limit, color=_INK, linewidth=1)
    axes.set_xlabel("PSI (dotted: 0.25, line: the gate's limit)")
    return _svg(figure)


def draw_stages(seconds: Mapping[str, float]) -> bytes:
    """Seconds that all workers together spent in each stage."""
    figure, axes = _figure(height=2.4)
    names = list(seconds)[::-1]
    values = [seconds[name] for name in names]
    bars = axes.barh(np.arange(len(names)), values, color=_COLOURS[1], height=0.7)
    axes.set_yticks(np.arange(len(names)), names)
    axes.bar_label(bars, [f"{value:,.1f} s" for value in values], padding=4, color=_INK, fontsize=9)
    axes.set_xlim(0, max([*values, 0.01]) * 1.18)
    axes.set_xlabel("seconds of all workers")
    return _svg(figure)


def draw_nights(nights: Sequence[Mapping[str, Any]]) -> bytes:
    """Images computed on the last nights, and those of them that were bad."""
    figure, axes = _figure(height=2.6)
    places = np.arange(len(nights))
    computed = [night["computed"] for night in nights]
    axes.bar(places, computed, color=_COLOURS[1], width=0.7, label="computed")
    axes.set_xticks(places, [str(night["night"]) for night in nights], fontsize=8)
    axes.set_xlabel("night")
    axes.set_ylabel("images computed")
    return _svg(figure)


def _thin(points: Sequence[tuple[float, float]]) -> npt.NDArray[np.float64]:
    """At most some thousand points: the page must not grow with the archive."""
    array = np.array(points, np.float64).reshape(-1, 2)
    step = -(-len(array) // _MOST_POINTS)
    return array[:: max(1, step)]


def _plain(text: str) -> str:
    """A name as matplotlib shall draw it: no markup, nothing unprintable, not endless."""
    text = "".join(c if c.isprintable() and ord(c) < 256 else "?" for c in text)
    return (text if len(text) <= 48 else f"{text[:45]}...").replace("$", r"\$")


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)


def _figure(height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.grid(alpha=0.25, linewidth=0.5, color=_INK)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None}
    )
    return buffer.getvalue()
