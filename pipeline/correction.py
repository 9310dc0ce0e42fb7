"""Cases under review as files that a person can correct, and a list that `reseg train --also` takes."""

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline import storage, tables
from pipeline.errors import ConfigError
from pipeline.formats import FORMATS
from pipeline.lookup import open_night_source, read_encoded
from pipeline.records import EncodedCase
from pipeline.report import MASK_COLOURS
from pipeline.results import Night

_LIST = "review.toml"
_MAGIC = (
    (b"\x89PNG", ".png"),
    (b"\xff\xd8", ".jpg"),
    (b"II*\x00", ".tif"),
    (b"MM\x00*", ".tif"),
    (b"BM", ".bmp"),
    (b"RIFF", ".webp"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written. left_out: cases with the reason why not."""

    folder: str
    cases: tuple[str, ...]
    num_images: int
    left_out: tuple[tuple[str, str], ...]

    def to_plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "list": os.path.join(self.folder, _LIST),
            "cases": list(self.cases),
            "images": self.num_images,
            "left_out": [list(item) for item in self.left_out],
        }


def export_cases(
    night: Night,
    items: Sequence[tuple[str, str]],
    folder: str,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Exported:
    """Write images as they are stored and masks as palette PNGs, whose pixels are labels, for correction.

    items: (shard id, case id) pairs. FOLDER/cases/CASE/SLICE.image.* and SLICE.mask.png; the list is
    FOLDER/review.toml. Raises ConfigError if the folder holds anything.
    """
    if storage.is_remote(folder) or not storage.is_empty(folder):
        raise ConfigError(
            f"{folder} is not a folder of this machine that is new or empty; people correct files "
            "where their programs open them, and nothing is overwritten"
        )
    source = open_night_source(night)
    shards = {shard.shard_id: shard for shard in FORMATS[source.format].list_shards(source).shards}
    done: list[str] = []
    left_out: list[tuple[str, str]] = []
    num_images = 0
    for number, (shard_id, case_id) in enumerate(items, start=1):
        shard = shards.get(shard_id)
        encoded = None if shard is None else read_encoded(source, shard, case_id)
        masks = _masks_of(night, shard_id, case_id)
        problem = _problem(folder, encoded, masks, case_id)
        if problem:
            left_out.append((case_id, problem))
        else:
            assert encoded is not None
            num_images += _write_case(_case_folder(folder, case_id), encoded, masks)
            done.append(case_id)
        progress(number, len(items), "exporting")
    storage.write(os.path.join(folder, _LIST), _list_text(done).encode())
    return Exported(
        folder=folder, cases=tuple(done), num_images=num_images, left_out=tuple(left_out)
    )


def _masks_of(
    night: Night, shard_id: str, case_id: str
) -> dict[str, tuple[str, npt.NDArray[np.uint8]]]:
    """By slice name: digest of the image, and the label map."""
    shard = night.shards.get(shard_id)
    if shard is None or shard.parts.masks is None:
        return {}
    columns = ["case_id", "slice_name", "input_sha256"]
    rows = tables.read_part(night.results, "masks", shard.parts.masks, columns).to_pylist()
    mine = {number: row for number, row in enumerate(rows) if row["case_id"] == case_id}
    maps = tables.read_masks(night.results, shard.parts.masks, list(mine))
    return {
        row["slice_name"]: (row["input_sha256"], mask_HW)
        for number, row in mine.items()
        if (mask_HW := maps[number]) is not None
    }


def _case_folder(folder: str, case_id: str) -> str:
    return os.path.join(folder, "cases", case_id)


def _problem(
    folder: str, encoded: EncodedCase | None, masks: dict[str, Any], case_id: str
) -> str | None:
    """Why a case cannot be exported, or None."""
    if encoded is None:
        return "it is no longer in the source"
    root = os.path.join(os.path.abspath(folder), "cases") + os.sep
    if not os.path.abspath(_case_folder(folder, case_id)).startswith(root) or "\0" in case_id:
        return "its id cannot be a folder"
    usable = [item for item in encoded.slices if item.name in masks]
    if not usable:
        return "it has no mask, or files of several pages"
    for item in usable:
        if item.image is None or item.image_sha256 != masks[item.name][0]:
            return "it has changed in the source since it was segmented"
        if os.sep in item.name or _suffix(item.image) is None:
            return f"its slice {item.name!r} cannot be a file"
    return None


def _suffix(data: bytes) -> str | None:
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), None)


def _write_case(folder: str, encoded: EncodedCase, masks: dict[str, Any]) -> int:
    written = 0
    for item in encoded.slices:
        if item.name not in masks or item.image is None:
            continue
        name = os.path.join(folder, item.name)
        storage.write(f"{name}.image{_suffix(item.image)}", item.image)
        storage.write(f"{name}.mask.png", _palette_png(masks[item.name][1]))
        written += 1
    return written


def _palette_png(mask_HW: npt.NDArray[np.uint8]) -> bytes:
    """Pixels are labels; colours only show them."""
    picture = Image.fromarray(mask_HW).convert("L")
    picture.putpalette([0, 0, 0, *(value for colour in MASK_COLOURS * 50 for value in colour)])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _list_text(cases: Sequence[str]) -> str:
    listed = "".join(f"    {json.dumps(case_id)},\n" for case_id in cases)
    return (
        "# Cases to correct: edit the *.mask.png files, whose pixels are labels, and take the lines of\n"
        "# cases that you did not correct out of the list. Then:  reseg train SOURCE OUT --also this file\n"
        'uri = "cases"\n'
        f"cases = [\n{listed}]\n\n"
        "[source]\n"
        'images = "{case:path}/{slice}.image.*"\n'
        'masks = "{case:path}/{slice}.mask.png"\n'
    )
