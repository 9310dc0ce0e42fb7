"""Pictures: overlays of masks on images, sheets of them, training curves, charts of scores."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

MASK_COLOURS = ((235, 64, 52), (66, 135, 245), (245, 176, 66), (171, 71, 188), (0, 172, 193))
REFERENCE_COLOUR = (76, 217, 100)
_CAPTION_PX = 18
_GAP_PX = 4
_MOST_NAMED_BARS = 50


def draw_overlay(
    image_HWC: npt.NDArray[Any],
    mask_HW: npt.NDArray[np.uint8] | None,
    reference_HW: npt.NDArray[np.uint8] | None = None,
    caption: str = "",
    min_side: int = 512,
) -> Image.Image:
    """The image, enlarged to at least `min_side` pixels, with one-pixel outlines and a caption.

    image: C = 1 or 3, any dtype, stretched between its 0.5 and 99.5 percentile. The mask's labels
    take the colours of MASK_COLOURS in turn, the reference is green; with several labels its
    outlines are pale tints of the labels' colours.
    """
    scale = max(1, -(-min_side // max(image_HWC.shape[:2])))
    picture = _enlarge(_as_rgb(image_HWC), scale)
    maps = [item for item in (reference_HW, mask_HW) if item is not None]
    labels = sorted({int(label) for item in maps for label in np.unique(item) if label})
    if reference_HW is not None:
        for label in labels:
            colour = _reference_colour(label, many=labels != [1])
            picture[_outline(_enlarge(reference_HW == label, scale))] = colour
    if mask_HW is not None:
        for label in labels:
            picture[_outline(_enlarge(mask_HW == label, scale))] = _mask_colour(label)
    return _with_caption(picture, caption, labels or [1], has_reference=reference_HW is not None)


def _mask_colour(label: int) -> tuple[int, ...]:
    return MASK_COLOURS[(label - 1) % len(MASK_COLOURS)]


def _reference_colour(label: int, *, many: bool) -> tuple[int, ...]:
    """Green, or with several labels a tint of the label's colour, halfway to white and more."""
    if not many:
        return REFERENCE_COLOUR
    return tuple((value + 2 * 255) // 3 for value in _mask_colour(label))


def _enlarge(array: npt.NDArray[Any], scale: int) -> npt.NDArray[Any]:
    return np.repeat(np.repeat(array, scale, axis=0), scale, axis=1)


def _as_rgb(image_HWC: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    values = image_HWC.astype(np.float64)
    low, high = np.percentile(values, (0.5, 99.5))
    unit = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    rgb = np.repeat(unit, 3, axis=2) if unit.shape[2] == 1 else unit
    return (rgb * 255).astype(np.uint8)


def _outline(mask_HW: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The pixels just inside the mask's border, two deep: one vanishes when a page shrinks it."""
    return mask_HW & ~ndimage.binary_erosion(mask_HW, iterations=2)


def _with_caption(
    picture: npt.NDArray[np.uint8], caption: str, labels: Sequence[int], *, has_reference: bool
) -> Image.Image:
    height, width = picture.shape[:2]
    page = Image.new("RGB", (width, height + 2 * _CAPTION_PX), (20, 20, 20))
    page.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(page)
    draw.text((6, height + 3), _fit(draw, caption, width - 12), fill=(230, 230, 230))
    many = labels != [1]
    words = [(f"mask {label}" if many else "mask", _mask_colour(label)) for label in labels]
    if has_reference:
        words += [
            (f"reference {label}" if many else "reference", _reference_colour(label, many=many))
            for label in labels
        ]
    left = 6.0
    for word, colour in words:
        draw.text((left, height + 3 + _CAPTION_PX), word, fill=colour)
        left += draw.textlength(word) + 14
    return page


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    text = "".join(c if c.isprintable() and ord(c) < 256 else "?" for c in text)
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def draw_sheet(pictures: Sequence[Image.Image], columns: int = 4) -> bytes:
    """Pictures side by side in rows, each in a cell of the largest one's size, as a PNG file."""
    columns = min(columns, len(pictures))
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP_PX), rows * (height + _GAP_PX)), (20, 20, 20))
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * (width + _GAP_PX), row * (height + _GAP_PX)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def draw_curves(
    losses: Sequence[float], rates: Sequence[float], epochs: Sequence[Mapping[str, Any]]
) -> bytes:
    """A training at a glance, as a PNG file: loss of each update and smoothed, validation Dice, rate.

    epochs: records with `step`, and `score` where there was a validation.
    """
    figure, (upper, lower) = _figure(2, 1, size=(9, 6.5), ratios=[3, 1], sharex=True)
    steps = np.arange(1, len(losses) + 1)
    upper.plot(steps, losses, color="#9db4c0", linewidth=0.6, label="loss of each update")
    window = max(1, len(losses) // 50)
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        upper.plot(
            steps[window - 1 :], smooth, color="#1f4e79", label=f"its mean over {window} updates"
        )
    upper.set_ylabel("loss")
    scored = [record for record in epochs if record.get("score") is not None]
    if scored:
        right = upper.twinx()
        at, dice = [r["step"] for r in scored], [r["score"] for r in scored]
        right.plot(at, dice, "o-", color="#c8553d", markersize=3, label="validation Dice")
        best = max(range(len(dice)), key=lambda i: dice[i])
        right.annotate(
            f"best {dice[best]:.3f}",
            (at[best], dice[best]),
            (0, 6),
            textcoords="offset points",
            ha="right" if at[best] > 0.9 * len(losses) else "center",
            color="#c8553d",
        )
        right.set_ylim(0, 1.05)
        right.set_ylabel("mean Dice of the validation cases", color="#c8553d")
    figure.legend(loc="upper center", ncols=3, frameon=False, fontsize=9)
    lower.plot(steps, rates, color="#555555", linewidth=1)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("update")
    return _png(figure)


def draw_dice_bars(
    rows: Sequence[Mapping[str, Any]], mean: float, median: float, low: float, high: float
) -> bytes:
    """Dice of each case and label as bars, worst first, with mean, its interval and the median.

    The chart that the seed article's model shows. rows: `case_id`, `label_name`, `dice`. Above
    some fifty bars names are left out.
    """
    ordered = sorted(rows, key=lambda row: (row["dice"], row["case_id"]))
    figure, axes = _figure(1, 1, size=(9, max(2.6, min(12.0, 0.26 * len(ordered) + 1.6))))
    labels = {row["label_name"]: None for row in rows}
    colours = {
        name: tuple(c / 255 for c in MASK_COLOURS[i % len(MASK_COLOURS)])
        for i, name in enumerate(labels)
    }
    places = np.arange(len(ordered))
    scores = [row["dice"] for row in ordered]
    axes.barh(places, scores, color=[colours[row["label_name"]] for row in ordered], height=0.8)
    axes.axvspan(
        low, high, color="#1f4e79", alpha=0.15, label=f"95 % interval {low:.3f} to {high:.3f}"
    )
    axes.axvline(mean, color="#1f4e79", label=f"mean {mean:.3f}")
    axes.axvline(median, color="#1f4e79", linestyle=":", label=f"median {median:.3f}")
    if len(ordered) <= _MOST_NAMED_BARS:
        many = len(labels) > 1
        axes.set_yticks(
            places,
            [
                _plain(f"{row['case_id']} {row['label_name']}" if many else row["case_id"])
                for row in ordered
            ],
            fontsize=8,
        )
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(ordered)} cases")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlabel("Dice")
    figure.legend(loc="upper center", ncols=3, frameon=False, fontsize=9)
    return _png(figure)


def _figure(
    rows: int,
    columns: int,
    *,
    size: tuple[float, float],
    ratios: Sequence[float] | None = None,
    sharex: bool = False,
) -> tuple[Any, Any]:
    """A figure of its own, without matplotlib's global state."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(rect=(0, 0, 1, 0.94)))
    axes = figure.subplots(rows, columns, sharex=sharex, height_ratios=ratios)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.5)
        one.set_axisbelow(True)
    return figure, axes


def _plain(text: str) -> str:
    """A name as matplotlib shall draw it: no markup, nothing unprintable, not endless."""
    text = "".join(c if c.isprintable() and ord(c) < 256 else "?" for c in text)
    return (text if len(text) <= 40 else f"{text[:37]}...").replace("$", r"\$")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
