"""One case, from encoded bytes to rows: decode, hand to the network, finish, measure.

A bad slice is left out of its volume, so its neighbours come out as if it were not there; it
still gets its row. Positions are kept by index, so nothing can change places.
"""

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import SourceConfig, parse_mask_values
from pipeline.errors import REFERENCE_ERRORS, BadImage, ErrorClass
from pipeline.formats.source import is_usable
from pipeline.images import reference_labels
from pipeline.metrics import compute_metrics
from pipeline.records import (
    STATUS_BAD,
    STATUS_BAD_REFERENCE,
    STATUS_OK,
    EncodedCase,
    EncodedSlice,
    Problem,
    sha256_hex,
)
from pipeline.sandbox import Sandbox
from pipeline.transforms import Recipe
from pipeline.transforms.postprocess import SHAPE_STEPS, Argmax, Threshold, ToNativeGrid
from pipeline.transforms.preprocess import Trace, to_native, trace_from_plain, trace_to_plain

Labels = npt.NDArray[np.uint8]


@dataclass(slots=True, kw_only=True)
class SliceRecord:
    """What a row says about one image, beside its pixels."""

    name: str
    source_uri: str
    image_sha256: str | None
    mask_sha256: str | None
    height: int | None = None
    width: int | None = None
    problem: Problem | None = None

    @property
    def is_usable(self) -> bool:
        """Whether the image itself is good; its reference may be bad."""
        return self.problem is None or self.problem.error_class in REFERENCE_ERRORS


@dataclass(slots=True, kw_only=True)
class DecodedCase:
    """A case with its pixels. `volume_ZHWC` holds the usable slices, in order; None: there is none.

    references: for each slice of the volume its label map (uint8, HW), or None.
    """

    case_id: str
    digest: str
    spacing_mm: tuple[float, ...] | None
    slices: list[SliceRecord]
    volume_ZHWC: npt.NDArray[Any] | None = None
    references: list[Labels | None] = field(default_factory=list)

    @property
    def usable(self) -> list[SliceRecord]:
        """The slices that the volume holds, in its order."""
        return [item for item in self.slices if item.is_usable]


@dataclass(slots=True, kw_only=True)
class PredictedCase:
    """A case with the network's labels on the grid that `trace` leads back from.

    labels_ZHW and confidence_ZHW are None where no slice was usable. nonfinite_Z marks slices,
    on that same grid, of which the network made NaN or infinity.
    """

    decoded: DecodedCase
    labels_ZHW: Labels | None = None
    confidence_ZHW: Labels | None = None
    nonfinite_Z: npt.NDArray[np.bool_] | None = None
    trace: Trace = ()


def decode_case(
    encoded: EncodedCase,
    sandbox: Sandbox,
    config: SourceConfig,
    num_labels: int,
    *,
    max_pixels: int,
) -> DecodedCase:
    """Decode all slices of a case and their references; failures become problems of slices.

    max_pixels: of all slices together; of a case with more no slice is usable.
    """
    mapping = parse_mask_values(config.mask_values)
    records: list[SliceRecord] = []
    pages: list[npt.NDArray[Any] | None] = []
    references: list[Labels | None] = []
    names: set[str] = set()
    num_pixels = 0
    for item in encoded.slices:
        if num_pixels > max_pixels:
            found: Iterable[_Decoded] = [(_record(item, item.name, item.problem), None, None)]
        else:
            found = _decode_slice(item, sandbox, mapping, num_labels)
        for record, page_HWC, reference_HW in found:
            if record.name in names:
                record.name = f"{record.name}~{len(records)}"
            names.add(record.name)
            records.append(record)
            pages.append(page_HWC)
            references.append(reference_HW)
            num_pixels += 0 if page_HWC is None else page_HWC.shape[0] * page_HWC.shape[1]
    if num_pixels > max_pixels:
        _refuse_all(records, max_pixels)
    _refuse_odd_shapes(records, pages)
    decoded = DecodedCase(
        case_id=encoded.case_id,
        digest=encoded.digest(),
        spacing_mm=encoded.spacing_mm,
        slices=records,
    )
    kept = [index for index, record in enumerate(records) if record.is_usable]
    if kept:
        decoded.volume_ZHWC = np.stack(
            [page for page in map(pages.__getitem__, kept) if page is not None]
        )
        decoded.references = [references[index] for index in kept]
    return decoded


_Decoded = tuple[SliceRecord, npt.NDArray[Any] | None, Labels | None]


def _decode_slice(
    item: EncodedSlice, sandbox: Sandbox, mapping: dict[int, int], num_labels: int
) -> Iterator[_Decoded]:
    """One record a page; a file of several pages gives slices `name.0`, `name.1`, …"""
    if not is_usable(item.problem):
        yield _record(item, item.name, item.problem), None, None
        return
    if item.image is None:
        missing = Problem(error_class=ErrorClass.MISSING_IMAGE, message="there is no image")
        yield _record(item, item.name, missing), None, None
        return
    try:
        pages = sandbox.decode(item.image, "image")
    except BadImage as error:
        yield (
            _record(item, item.name, Problem(error_class=error.error_class, message=error.message)),
            None,
            None,
        )
        return
    masks, mask_problem = _decode_references(item, sandbox, len(pages))
    for number, page_HWC in enumerate(pages):
        name = item.name if len(pages) == 1 else _page_name(item.name, number)
        record = _record(item, name, item.problem or mask_problem)
        record.height, record.width = page_HWC.shape[:2]
        reference_HW = None
        if masks is not None:
            reference_HW = _reference(record, masks[number], mapping, num_labels)
        yield record, page_HWC, reference_HW


def _page_name(name: str, number: int) -> str:
    return str(number) if name == "0" else f"{name}.{number}"


def _record(item: EncodedSlice, name: str, problem: Problem | None) -> SliceRecord:
    return SliceRecord(
        name=name,
        source_uri=item.source_uri,
        image_sha256=item.image_sha256,
        mask_sha256=item.mask_sha256,
        problem=problem,
    )


def _decode_references(
    item: EncodedSlice, sandbox: Sandbox, num_pages: int
) -> tuple[list[npt.NDArray[Any]] | None, Problem | None]:
    """The raw values of each page's reference; what is wrong with the mask file as a problem."""
    if item.mask is None or item.problem is not None:
        return None, None
    try:
        masks = sandbox.decode(item.mask, "mask")
    except BadImage as error:
        kind = error.error_class
        if kind not in REFERENCE_ERRORS:
            kind = ErrorClass.BAD_MASK
        return None, Problem(error_class=kind, message=f"the reference mask: {error.message}")
    if len(masks) != num_pages:
        message = f"the image has {num_pages} pages, its mask {len(masks)}"
        return None, Problem(error_class=ErrorClass.MASK_SIZE_MISMATCH, message=message)
    return masks, None


def _reference(
    record: SliceRecord, values_HW: npt.NDArray[Any], mapping: dict[int, int], num_labels: int
) -> Labels | None:
    shape = (record.height, record.width)
    if values_HW.shape != shape:
        message = f"the image is {shape[0]} x {shape[1]}, its mask {values_HW.shape[0]} x {values_HW.shape[1]}"
        record.problem = Problem(error_class=ErrorClass.MASK_SIZE_MISMATCH, message=message)
        return None
    try:
        return reference_labels(values_HW, num_labels, mapping)
    except BadImage as error:
        record.problem = Problem(error_class=error.error_class, message=error.message)
        return None


def _refuse_all(records: list[SliceRecord], max_pixels: int) -> None:
    message = (
        f"the {len(records)} slices of its case have more than {max_pixels} pixels; is one case "
        "really one image or volume?"
    )
    for record in records:
        if is_usable(record.problem):
            record.problem = Problem(error_class=ErrorClass.CASE_TOO_LARGE, message=message)


def _refuse_odd_shapes(records: list[SliceRecord], pages: list[npt.NDArray[Any] | None]) -> None:
    """Mark slices whose shape or type is not that of most of their case (ties: the first)."""
    kinds = [
        (page.shape, page.dtype.str) if page is not None and record.is_usable else None
        for record, page in zip(records, pages, strict=True)
    ]
    counts = Counter(kind for kind in kinds if kind is not None)
    if len(counts) < 2:
        return
    common = counts.most_common(1)[0][0]
    for record, kind in zip(records, kinds, strict=True):
        if kind is not None and kind != common:
            message = f"{_describe(kind)}, where most slices of its case are {_describe(common)}"
            record.problem = Problem(error_class=ErrorClass.SLICE_SHAPE_MISMATCH, message=message)


def _describe(kind: tuple[tuple[int, ...], str]) -> str:
    (height, width, channels), dtype = kind
    return f"{height} x {width} x {channels} {np.dtype(dtype).name}"


def mark_unusable(decoded: DecodedCase, error: BadImage) -> None:
    """The whole volume does not fit the network: each of its slices gets the reason."""
    for record in decoded.usable:
        record.problem = Problem(error_class=error.error_class, message=error.message)
    decoded.volume_ZHWC, decoded.references = None, []


# Between the predicting and the finishing process: labels are small once compressed.

_LENGTH = struct.Struct("<Q")


def pack_predicted(cases: Sequence[PredictedCase]) -> bytes:
    """Predicted cases as bytes, without their images; the inverse is `unpack_predicted`."""
    blobs: list[bytes] = []

    def blob(array: npt.NDArray[Any] | None) -> list[Any] | None:
        if array is None:
            return None
        data = np.ascontiguousarray(array)
        blobs.append(pa.compress(data, codec="zstd", asbytes=True) if data.size else b"")
        return [list(data.shape), data.dtype.str, len(blobs[-1])]

    described = []
    for case in cases:
        confidence = case.confidence_ZHW
        if case.labels_ZHW is not None and not case.labels_ZHW.any():
            confidence = None
        described.append(
            {
                "case_id": case.decoded.case_id,
                "digest": case.decoded.digest,
                "spacing_mm": case.decoded.spacing_mm,
                "slices": [_slice_to_plain(item) for item in case.decoded.slices],
                "references": [blob(item) for item in case.decoded.references],
                "labels": blob(case.labels_ZHW),
                "confidence": blob(confidence),
                "nonfinite": blob(case.nonfinite_Z),
                "trace": trace_to_plain(case.trace),
            }
        )
    header = json.dumps(described).encode()
    return b"".join([_LENGTH.pack(len(header)), header, *blobs])


def _slice_to_plain(item: SliceRecord) -> list[Any]:
    problem = item.problem and [item.problem.error_class, item.problem.message]
    return [
        item.name,
        item.source_uri,
        item.image_sha256,
        item.mask_sha256,
        item.height,
        item.width,
        problem,
    ]


def _slice_from_plain(values: Sequence[Any]) -> SliceRecord:
    name, uri, image, mask, height, width, problem = values
    return SliceRecord(
        name=name,
        source_uri=uri,
        image_sha256=image,
        mask_sha256=mask,
        height=height,
        width=width,
        problem=problem and Problem(error_class=ErrorClass(problem[0]), message=problem[1]),
    )


def unpack_predicted(data: bytes | memoryview) -> Iterator[PredictedCase]:
    """The inverse of `pack_predicted`, a case at a time."""
    view = memoryview(data)
    (length,) = _LENGTH.unpack_from(view)
    position = _LENGTH.size + length

    def array(described: list[Any] | None) -> Any:
        nonlocal position
        if described is None:
            return None
        shape, dtype, size = described
        stored, position = view[position : position + size], position + size
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = pa.decompress(stored, num_bytes, codec="zstd", asbytes=True) if size else b""
        return np.frombuffer(raw, dtype).reshape(shape)

    for item in json.loads(bytes(view[_LENGTH.size : _LENGTH.size + length])):
        references = [array(reference) for reference in item["references"]]
        decoded = DecodedCase(
            case_id=item["case_id"],
            digest=item["digest"],
            spacing_mm=tuple(item["spacing_mm"]) if item["spacing_mm"] else None,
            slices=[_slice_from_plain(values) for values in item["slices"]],
            references=references,
        )
        yield PredictedCase(
            decoded=decoded,
            labels_ZHW=array(item["labels"]),
            confidence_ZHW=array(item["confidence"]),
            nonfinite_Z=array(item["nonfinite"]),
            trace=trace_from_plain(item["trace"]),
        )


# Finishing


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRows:
    """A case's rows for the three tables, without the columns that its shard and run decide."""

    masks: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    cases: list[dict[str, Any]]


def finish_case(case: PredictedCase, recipe: Recipe, label_names: Sequence[str]) -> CaseRows:
    """Shapes, the way back to native pixels, and all measures of one case."""
    masks_ZHW = confidence_ZHW = None
    if case.labels_ZHW is not None:
        masks_ZHW, confidence_ZHW = native_maps(case, recipe)
    decoded = case.decoded
    mask_rows: list[dict[str, Any]] = []
    metric_rows: list[dict[str, Any]] = []
    position = 0
    good: list[int] = []
    for index, record in enumerate(decoded.slices):
        mask_HW = None
        if record.is_usable and masks_ZHW is not None:
            mask_HW = masks_ZHW[position]
            if _is_nonfinite(case, position):
                mask_HW = None
                message = "the network returned NaN or infinity"
                problem = Problem(error_class=ErrorClass.NON_FINITE_LOGITS, message=message)
                record.problem = problem
            else:
                good.append(position)
                confidence_HW = None if confidence_ZHW is None else confidence_ZHW[position]
                metric_rows += _metric_rows(
                    decoded,
                    index,
                    mask_HW,
                    confidence_HW,
                    decoded.references[position],
                    label_names,
                )
            position += 1
        mask_rows.append(_mask_row(decoded, index, record, mask_HW))
    case_rows = _case_rows(decoded, masks_ZHW, confidence_ZHW, good, label_names)
    return CaseRows(masks=mask_rows, metrics=metric_rows, cases=case_rows)


def native_maps(case: PredictedCase, recipe: Recipe) -> tuple[Labels, Labels | None]:
    """Label map and confidence in native pixels, shapes applied where the recipe has them."""
    labels, confidence = case.labels_ZHW, case.confidence_ZHW
    assert labels is not None
    decided = False
    trace = case.trace
    for step in recipe.postprocess:
        if isinstance(step, (Threshold, Argmax)):
            decided = True
        elif isinstance(step, SHAPE_STEPS):
            labels = step.apply(labels)
        elif isinstance(step, ToNativeGrid) and decided:
            labels = to_native(labels, trace)
            confidence = None if confidence is None else to_native(confidence, trace)
            trace = ()
    return labels, confidence


def _is_nonfinite(case: PredictedCase, position: int) -> bool:
    if case.nonfinite_Z is None or not case.nonfinite_Z.any():
        return False
    marks = case.nonfinite_Z.astype(np.uint8)[:, None, None]
    moves = tuple(move for move in case.trace if move.before[0] != move.after[0])
    for move in reversed(moves):
        whole = np.zeros((move.before[0], 1, 1), np.uint8)
        start = max(0, move.start[0])
        whole[start : start + len(marks)] = marks
        marks = whole
    return bool(marks[position].any())


def _mask_row(
    decoded: DecodedCase, index: int, record: SliceRecord, mask_HW: Labels | None
) -> dict[str, Any]:
    problem = record.problem
    status = STATUS_OK
    if problem is not None:
        status = STATUS_BAD_REFERENCE if mask_HW is not None else STATUS_BAD
    data = None if mask_HW is None else mask_HW.tobytes()
    return {
        "image_id": f"{decoded.case_id}/{record.name}",
        "case_id": decoded.case_id,
        "slice_name": record.name,
        "slice_index": index,
        "status": status,
        "error_class": problem and str(problem.error_class),
        "error": problem and problem.message,
        "source_uri": record.source_uri,
        "input_sha256": record.image_sha256,
        "reference_sha256": record.mask_sha256,
        "case_digest": decoded.digest,
        "height": record.height,
        "width": record.width,
        "mask": data,
        "mask_sha256": data and sha256_hex(data),
        "labels": None if mask_HW is None else _present(mask_HW),
    }


def _present(mask: Labels) -> list[int]:
    return [int(v) for v in np.flatnonzero(np.bincount(mask.ravel(), minlength=1)) if v]


def _metric_rows(
    decoded: DecodedCase,
    index: int,
    mask_HW: Labels,
    confidence_HW: Labels | None,
    reference_HW: Labels | None,
    label_names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    spacing = _in_plane(decoded.spacing_mm)
    record = decoded.slices[index]
    for label, name in enumerate(label_names, start=1):
        of_label = mask_HW == label
        reference = None if reference_HW is None else reference_HW == label
        values = compute_metrics("image", of_label, reference, spacing or (1.0, 1.0))
        area = values["area_px"]
        yield {
            "image_id": f"{decoded.case_id}/{record.name}",
            "case_id": decoded.case_id,
            "slice_index": index,
            "label": label,
            "label_name": name,
            "area_mm2": None if spacing is None else area * spacing[0] * spacing[1],
            **_certainty(of_label, confidence_HW if area else None),
            **values,
        }


_BINARY_ENTROPY = np.zeros(256)
_p = np.arange(1, 255) / 255
_BINARY_ENTROPY[1:255] = -(_p * np.log2(_p) + (1 - _p) * np.log2(1 - _p))


def _certainty(
    of_label: npt.NDArray[np.bool_], confidence: Labels | None
) -> dict[str, float | None]:
    """Mean probability of the label over its pixels, and their mean binary entropy in bits."""
    if confidence is None:
        return {"confidence": None, "entropy": None}
    inside = confidence[of_label]
    return {
        "confidence": float(inside.mean() / 255),
        "entropy": float(_BINARY_ENTROPY[inside].mean()),
    }


def _in_plane(spacing_mm: tuple[float, ...] | None) -> tuple[float, ...] | None:
    return None if spacing_mm is None else tuple(spacing_mm[-2:])


def _case_rows(
    decoded: DecodedCase,
    masks_ZHW: Labels | None,
    confidence_ZHW: Labels | None,
    good: list[int],
    label_names: Sequence[str],
) -> list[dict[str, Any]]:
    common = {
        "case_id": decoded.case_id,
        "num_images": len(decoded.slices),
        "num_bad": sum(record.problem is not None for record in decoded.slices),
    }
    if masks_ZHW is None or not good:
        return [
            {**common, "label": label, "label_name": name}
            for label, name in enumerate(label_names, start=1)
        ]
    volume = masks_ZHW[good]
    certainty = None if confidence_ZHW is None else confidence_ZHW[good]
    references = [decoded.references[position] for position in good]
    whole = np.stack(references) if all(r is not None for r in references) else None  # type: ignore[arg-type]
    spacing = decoded.spacing_mm if decoded.spacing_mm and len(decoded.spacing_mm) == 3 else None
    rows = []
    for label, name in enumerate(label_names, start=1):
        of_label = volume == label
        reference = None if whole is None else whole == label
        values = compute_metrics("case", of_label, reference, spacing or (1.0, 1.0, 1.0))
        voxel_ml = None if spacing is None else float(np.prod(spacing)) / 1000
        rows.append(
            {
                **common,
                "label": label,
                "label_name": name,
                "volume_ml": None if voxel_ml is None else values["volume_px"] * voxel_ml,
                **_certainty(of_label, certainty if values["volume_px"] else None),
                **values,
            }
        )
    return rows
