"""Questions about published results, answered from stored files: lineage, and pictures."""

from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from pipeline import results, storage
from pipeline.cases import DecodedCase, decode_case
from pipeline.config import LimitsConfig, SourceConfig, decode
from pipeline.errors import ResultsError
from pipeline.formats import FORMATS, Source
from pipeline.records import Shard
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
    plan = results.load_plan(night.results, run_id)
    receipt = results.load_receipt(night.results, run_id, row["shard_id"])
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
    decoded = _decode_again(night, row)
    position = [record.name for record in decoded.usable].index(row["slice_name"])
    assert decoded.volume_ZHWC is not None
    mask_HW = None
    if row["mask"] is not None:
        mask_HW = np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"])
    return draw_overlay(
        decoded.volume_ZHWC[position],
        mask_HW,
        decoded.references[position],
        caption=_caption(image_id, row, metrics.to_pylist()),
    )


def _caption(image_id: str, row: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    parts = [image_id]
    if row["error_class"]:
        parts.append(row["error_class"])
    for item in metrics:
        dice = "" if item["dice"] is None else f", Dice {item['dice']:.3f}"
        parts.append(f"{item['label_name']} {item['area_px']:,} px{dice}")
    return " | ".join(parts)


def _decode_again(night: Night, row: dict[str, Any]) -> DecodedCase:
    config = decode(SourceConfig, night.metadata["config"]["source"])
    limits = decode(LimitsConfig, night.metadata["config"]["limits"])
    stored = night.metadata["source"]
    source = Source(
        uri=stored["uri"],
        format=stored["format"],
        config=config,
        limits=limits,
        num_buckets=stored["num_buckets"],
    )
    reader = FORMATS[source.format]
    shard = _find_shard(source, row["shard_id"])
    cases = [c for c in reader.list_cases(source, shard) if c.case_id == row["case_id"]]
    if not cases:
        raise ResultsError(f"the source {source.uri} no longer holds the case {row['case_id']!r}")
    encoded = next(iter(reader.read_cases(source, shard.path, cases)))
    if not any(item.image_sha256 == row["input_sha256"] for item in encoded.slices):
        raise ResultsError(f"{row['image_id']!r} has changed in the source since it was segmented")
    with Sandbox(max_pixels=limits.max_pixels, timeout_s=limits.decode_timeout_s) as sandbox:
        decoded = decode_case(encoded, sandbox, config, len(night.metadata["bundle"]["labels"]))
    if row["slice_name"] not in [record.name for record in decoded.usable]:
        raise ResultsError(
            f"{row['image_id']!r} cannot be shown: {row['error_class']}: {row['error']}"
        )
    return decoded


def _find_shard(source: Source, shard_id: str) -> Shard:
    for shard in FORMATS[source.format].list_shards(source).shards:
        if shard.shard_id == shard_id:
            return shard
    raise ResultsError(f"the source {source.uri} no longer holds the shard of this image")
