"""Pictures: an image with the outline of its mask, and of its reference where there is one."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

MASK_COLOURS = ((235, 64, 52), (66, 135, 245), (245, 176, 66), (171, 71, 188), (0, 172, 193))
REFERENCE_COLOUR = (76, 217, 100)
_CAPTION_PX = 18


def draw_overlay(
    image_HWC: npt.NDArray[Any],
    mask_HW: npt.NDArray[np.uint8] | None,
    reference_HW: npt.NDArray[np.uint8] | None = None,
    caption: str = "",
    min_side: int = 512,
) -> Image.Image:
    """The image, enlarged to at least `min_side` pixels, with one-pixel outlines and a caption.

    image: C = 1 or 3, any dtype, stretched between its 0.5 and 99.5 percentile. The mask's labels
    take the colours of MASK_COLOURS in turn, the reference is green.
    """
    scale = max(1, -(-min_side // max(image_HWC.shape[:2])))
    picture = _enlarge(_as_rgb(image_HWC), scale)
    if reference_HW is not None:
        picture[_outline(_enlarge(reference_HW > 0, scale))] = REFERENCE_COLOUR
    if mask_HW is not None:
        for label in np.unique(mask_HW[mask_HW > 0]):
            colour = MASK_COLOURS[(int(label) - 1) % len(MASK_COLOURS)]
            picture[_outline(_enlarge(mask_HW == label, scale))] = colour
    return _with_caption(picture, caption, has_reference=reference_HW is not None)


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
    picture: npt.NDArray[np.uint8], caption: str, *, has_reference: bool
) -> Image.Image:
    height, width = picture.shape[:2]
    page = Image.new("RGB", (width, height + 2 * _CAPTION_PX), (20, 20, 20))
    page.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(page)
    draw.text((6, height + 3), _fit(draw, caption, width - 12), fill=(230, 230, 230))
    draw.text((6, height + 3 + _CAPTION_PX), "mask", fill=MASK_COLOURS[0])
    if has_reference:
        draw.text((46, height + 3 + _CAPTION_PX), "reference", fill=REFERENCE_COLOUR)
    return page


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    text = "".join(c if c.isprintable() and ord(c) < 256 else "?" for c in text)
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
