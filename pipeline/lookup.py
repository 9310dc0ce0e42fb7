"""Questions about published results, answered from stored files: lineage, and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline import results, runs, storage
from pipeline.cases import DecodedCase, decode_case
from pipeline.config import LimitsConfig, SourceConfig, decode
from pipeline.errors import ResultsError
from pipeline.formats import FORMATS, Source
from pipeline.records import EncodedCase, Shard
from pipeline.report import draw_overlay
from pipeline.results import Night
from pipeline.sandbox import Sandbox


def require_night(location: str, number: int | None) -> Night:
    """The night asked for, or the published one. Raises ResultsError where there is none."""
    night = results.open_night(storage.resolve(location), number)
    if night is None:
        raise ResultsError(f"{location} holds no published night")
    return night


def explain_image(night: Night, image_id: str) -> dict[str, Any]:
    """All lineage of one mask: input, bundle, configuration, code, run, part and scores.

    Needs the results folder alone: neither the source nor the bundle has to exist any more.
    """
    row, metrics = results.find_image(night, image_id)
    shard = night.shards[row["shard_id"]]
    row.pop("mask")
    run_id = row["run_id"]
    plan = runs.load_plan(night.results, run_id)
    receipt = runs.load_receipt(night.results, run_id, row["shard_id"])
    return {
        "image": row,
        "metrics": metrics.drop_columns(
            ["shard_version", "bundle_digest", "config_digest"]
        ).to_pylist(),
        "night": {
            "night": night.number,
            "run_id": night.metadata["run_id"],
            "published_ms": night.published_ms,
        },
        "computed_by": None
        if plan is None
        else {
            "run_id": run_id,
            "bundle": dict(plan.bundle),
            "config": dict(plan.config),
            "config_digest": plan.config_digest,
            "source": dict(plan.source),
            "code": dict(plan.code),
        },
        "parts": {table: path for table, path in asdict(shard.parts).items() if path is not None},
        "receipt": None
        if receipt is None
        else {"seconds": receipt.seconds, "notes": list(receipt.notes)},
    }


def show_image(night: Night, image_id: str) -> Image.Image:
    """The image with the outlines of its published mask and of its reference, if it has one.

    Raises ResultsError if the source no longer holds the image that was segmented.
    """
    row, metrics = results.find_image(night, image_id)
    read = read_pixels(night, [row])[image_id]
    if isinstance(read, str):
        raise ResultsError(read)
    image_HWC, reference_HW = read
    mask_HW = None
    if row["mask"] is not None:
        mask_HW = np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"])
    caption = _caption(image_id, row, metrics.to_pylist())
    return draw_overlay(image_HWC, mask_HW, reference_HW, caption=caption)


def _caption(image_id: str, row: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    parts = [image_id]
    if row["error_class"]:
        parts.append(row["error_class"])
    for item in metrics:
        dice = "" if item["dice"] is None else f", Dice {item['dice']:.3f}"
        parts.append(f"{item['label_name']} {item['area_px']:,} px{dice}")
    return " | ".join(parts)


Pixels = tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]
"""An image (HWC) and its reference (HW), if it has one."""


def read_pixels(night: Night, rows: Sequence[Mapping[str, Any]]) -> dict[str, Pixels | str]:
    """The pixels of some images of a night, decoded from the source again, by image id.

    rows: of `masks`. An image that the source no longer holds as it was gives a sentence instead.
    """
    source = open_night_source(night)
    num_labels = len(night.metadata["bundle"]["labels"])
    shards = {shard.shard_id: shard for shard in FORMATS[source.format].list_shards(source).shards}
    limits = source.limits
    found: dict[str, Pixels | str] = {}
    with Sandbox(max_pixels=limits.max_pixels, timeout_s=limits.decode_timeout_s) as sandbox:
        for case_id in dict.fromkeys(row["case_id"] for row in rows):
            wanted = [row for row in rows if row["case_id"] == case_id]
            shard = shards.get(wanted[0]["shard_id"])
            encoded = None if shard is None else read_encoded(source, shard, case_id)
            decoded = (
                None
                if encoded is None
                else decode_case(
                    encoded, sandbox, source.config, num_labels, max_pixels=limits.max_case_pixels
                )
            )
            for row in wanted:
                found[row["image_id"]] = _pixels(source, decoded, row)
    return found


def read_encoded(source: Source, shard: Shard, case_id: str) -> EncodedCase | None:
    """One case of a shard as stored, None where it is gone."""
    reader = FORMATS[source.format]
    cases = [case for case in reader.list_cases(source, shard) if case.case_id == case_id]
    return next(iter(reader.read_cases(source, shard.path, cases))) if cases else None


def _pixels(source: Source, decoded: DecodedCase | None, row: Mapping[str, Any]) -> Pixels | str:
    if decoded is None:
        return f"the source {source.uri} no longer holds the case {row['case_id']!r}"
    if not any(record.image_sha256 == row["input_sha256"] for record in decoded.slices):
        return f"{row['image_id']!r} has changed in the source since it was segmented"
    names = [record.name for record in decoded.usable]
    if row["slice_name"] not in names or decoded.volume_ZHWC is None:
        return f"{row['image_id']!r} cannot be shown: {row['error_class']}: {row['error']}"
    position = names.index(row["slice_name"])
    return decoded.volume_ZHWC[position], decoded.references[position]


def open_night_source(night: Night) -> Source:
    """The source that a night was segmented from, cut into the same shards."""
    stored = night.metadata["source"]
    return Source(
        uri=stored["uri"],
        format=stored["format"],
        config=decode(SourceConfig, night.metadata["config"]["source"]),
        limits=decode(LimitsConfig, night.metadata["config"]["limits"]),
        num_buckets=stored["num_buckets"],
    )
