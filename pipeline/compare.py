"""Two nights, case by case and image by image: what moved, by how much, and in which direction.

Shards whose parts are the same are not opened. In the others rows are joined on their digests
first, so that masks which are equal are never read: comparing a million images of which a
thousand differ reads a thousand pairs of masks. A case counts as computed again if another run
made its rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import ndimage

from pipeline import tables
from pipeline.records import STATUS_OK, OldParts, row_columns
from pipeline.results import Night

Mask = npt.NDArray[np.uint8]
_READERS = 4

_IDS = [("image_id", pa.string()), ("case_id", pa.string()), ("slice_index", pa.int32())]
_LABEL = [("label", pa.int16()), ("label_name", pa.string())]


def _both(*columns: tuple[str, pa.DataType]) -> list[tuple[str, pa.DataType]]:
    return [(f"{name}_{when}", kind) for name, kind in columns for when in ("before", "after")]


IMAGES_SCHEMA = row_columns(
    [
        *_IDS,
        ("group", pa.string()),
        *_LABEL,
        *_both(("status", pa.string()), ("area_px", pa.int64()), ("confidence", pa.float64())),
        ("dice", pa.float64()),
        ("appeared", pa.int32()),
        ("vanished", pa.int32()),
    ]
)
"""Image x label, of images in both nights whose mask or status differs. dice: between the nights, null
where a label is in neither or masks cannot be compared. appeared, vanished: 2-D components."""

CASES_SCHEMA = row_columns(
    [
        ("case_id", pa.string()),
        ("shard_id", pa.string()),
        ("group", pa.string()),
        *_LABEL,
        ("state", pa.string()),
        *_both(
            ("volume_px", pa.int64()),
            ("volume_ml", pa.float64()),
            ("components", pa.int32()),
            ("confidence", pa.float64()),
            ("num_images", pa.int32()),
            ("num_bad", pa.int32()),
        ),
        ("dice", pa.float64()),
        ("volume_change", pa.float64()),
        ("appeared", pa.int32()),
        ("vanished", pa.int32()),
        ("images_changed", pa.int32()),
        ("worst_image", pa.string()),
    ]
)
"""Case x label, of cases that are new, removed or computed again. state: new, removed, changed (other
input) or recomputed (same input). dice: over all slices that have a mask in both nights.
volume_change: relative to before. appeared, vanished: 3-D components. worst_image: the image whose
label moved most."""

COUNTS = ("same", "changed", "new", "removed", "status", "not_comparable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What differs between two nights. `before` None: there was no night before.

    counts: images by what became of them; `pairs_read`: pairs of masks that were read.
    num_cases_before, num_cases_after: of the whole nights.
    """

    before: int | None
    after: int
    num_cases_before: int
    num_cases_after: int
    counts: Mapping[str, int]
    images: pa.Table
    cases: pa.Table

    @property
    def case_states(self) -> dict[str, int]:
        """How many cases are new, removed, changed, recomputed; and the rest, unchanged."""
        pairs = {
            (case_id, state)
            for case_id, state in zip(
                self.cases.column("case_id").to_pylist(),
                self.cases.column("state").to_pylist(),
                strict=True,
            )
        }
        found = Counter(state for _, state in pairs)
        states = {name: found[name] for name in ("new", "removed", "changed", "recomputed")}
        touched = sum(states.values()) - states["removed"]
        return {**states, "unchanged": self.num_cases_after - touched}


@dataclass(slots=True)
class _Found:
    """Rows and counts of one shard."""

    images: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def compare_nights(
    before: Night | None,
    after: Night,
    group_of: Callable[[str], str] = lambda case_id: "",
    *,
    only: Mapping[str, Set[str]] | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Comparison:
    """Compare two nights of one results folder, or a night with one elsewhere over the same source.

    group_of: the site or scanner of a case. only: look at these cases alone, by shard id; others
    are neither new nor removed.
    """
    old = {} if before is None else before.shards
    touched = [
        shard_id
        for shard_id in sorted({*old, *after.shards} if only is None else only)
        if shard_id not in old
        or shard_id not in after.shards
        or old[shard_id].parts != after.shards[shard_id].parts
    ]

    def compare(shard_id: str) -> _Found:
        parts = [
            night.shards[shard_id].parts
            if night is not None and shard_id in night.shards
            else OldParts()
            for night in (before, after)
        ]
        wanted = None if only is None else only[shard_id]
        old, new, num_copied = _read_sides(before, after, parts[0], parts[1], wanted)
        found = _compare_shard(shard_id, old, new, group_of)
        found.counts["same"] += num_copied
        return found

    whole = _Found()
    whole.counts["same"] = sum(
        shard.num_images
        for key, shard in after.shards.items()
        if only is None and key in old and shard.parts == old[key].parts
    )
    image_tables, case_tables = [IMAGES_SCHEMA.empty_table()], [CASES_SCHEMA.empty_table()]
    with ThreadPoolExecutor(_READERS) as pool:
        for number, found in enumerate(_in_order(pool, compare, touched), start=1):
            image_tables.append(pa.Table.from_pylist(found.images, IMAGES_SCHEMA))
            case_tables.append(pa.Table.from_pylist(found.cases, CASES_SCHEMA))
            whole.counts.update(found.counts)
            progress(number, len(touched), "comparing")
    cases, images = pa.concat_tables(case_tables), pa.concat_tables(image_tables)
    if before is not None:
        found = _compare_moved(cases, before, after, group_of)
        moved = pa.array(sorted({row["case_id"] for row in found.cases}), pa.string())
        cases = cases.filter(pc.invert(pc.is_in(cases.column("case_id"), moved)))
        cases = pa.concat_tables([cases, pa.Table.from_pylist(found.cases, CASES_SCHEMA)])
        images = pa.concat_tables([images, pa.Table.from_pylist(found.images, IMAGES_SCHEMA)])
        whole.counts.update(found.counts)
    return Comparison(
        before=None if before is None else before.number,
        after=after.number,
        num_cases_before=_num_cases(before, only),
        num_cases_after=_num_cases(after, only),
        counts={name: whole.counts[name] for name in (*COUNTS, "pairs_read")},
        images=images,
        cases=cases,
    )


def _compare_moved(
    cases: pa.Table, before: Night, after: Night, group_of: Callable[[str], str]
) -> _Found:
    """Cases that left one shard and are in another: archives that were renamed or packed anew.

    The counts take back that their images were counted as new and as removed.
    """
    places: dict[str, dict[str, str]] = {"new": {}, "removed": {}}
    for row in cases.select(["case_id", "shard_id", "state"]).to_pylist():
        if row["state"] in places:
            places[row["state"]][row["case_id"]] = row["shard_id"]
    moves: dict[tuple[str, str], set[str]] = {}
    for case_id in places["new"].keys() & places["removed"].keys():
        move = (places["removed"][case_id], places["new"][case_id])
        moves.setdefault(move, set()).add(case_id)
    whole = _Found()
    for (old_shard, new_shard), case_ids in sorted(moves.items()):
        old, new, _ = _read_sides(
            before, after, before.shards[old_shard].parts, after.shards[new_shard].parts, case_ids
        )
        found = _compare_shard(new_shard, old, new, group_of)
        whole.cases += found.cases
        whole.images += found.images
        whole.counts.update(found.counts)
        whole.counts["removed"] -= sum(map(len, old.images.values()))
        whole.counts["new"] -= sum(map(len, new.images.values()))
    return whole


def _num_cases(night: Night | None, only: Mapping[str, Set[str]] | None) -> int:
    if night is None or only is not None:
        return 0 if night is None or only is None else sum(map(len, only.values()))
    return sum(shard.num_cases for shard in night.shards.values())


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[str], _Found], items: Sequence[str]
) -> Iterator[_Found]:
    """As pool.map, with a bounded number of results waiting."""
    for start in range(0, len(items), 64):
        yield from pool.map(function, items[start : start + 64])


# One shard

_MASK_COLUMNS = [
    "image_id",
    "case_id",
    "slice_index",
    "status",
    "mask_sha256",
    "height",
    "width",
    "case_digest",
    "run_id",
]
_METRIC_COLUMNS = ["image_id", "case_id", "label", "label_name", "area_px", "confidence"]
_CASE_COLUMNS = [
    "case_id",
    "label",
    "label_name",
    "volume_px",
    "volume_ml",
    "components_3d",
    "confidence",
    "num_images",
    "num_bad",
]


@dataclass(slots=True, kw_only=True)
class _Side:
    """One night's rows of one shard, by case; pixels are read when they are needed."""

    results: str
    path: str | None
    images: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    metrics: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    cases: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    def masks(self, rows: Sequence[int]) -> dict[int, Mask | None]:
        """Label maps by row of the part."""
        if self.path is None or not rows:
            return {}
        return tables.read_masks(self.results, self.path, rows)


def _read_sides(
    before: Night | None,
    after: Night,
    old_parts: OldParts,
    new_parts: OldParts,
    only: Set[str] | None,
) -> tuple[_Side, _Side, int]:
    """Both nights' rows of a shard, without the cases that the second took over from the first as they
    were; and how many images those have."""
    old, new = (_read_masks_table(n, p, only) for n, p in ((before, old_parts), (after, new_parts)))
    copied = _copied_cases(old, new)
    num_copied = int(pc.sum(pc.is_in(new.column("case_id"), copied)).as_py() or 0)
    sides = [
        _make_side(night, parts, table.filter(pc.invert(pc.is_in(table.column("case_id"), copied))))
        for night, parts, table in ((before, old_parts, old), (after, new_parts, new))
    ]
    return sides[0], sides[1], num_copied


def _read_masks_table(night: Night | None, parts: OldParts, only: Set[str] | None) -> pa.Table:
    """The small columns of a part of `masks`, and the number of each row."""
    if night is None or parts.masks is None:
        table = tables.table_schema("masks").empty_table().select(_MASK_COLUMNS)
    else:
        table = tables.read_part(night.results, "masks", parts.masks, _MASK_COLUMNS)
    table = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    if only is None:
        return table
    return table.filter(pc.is_in(table.column("case_id"), pa.array(sorted(only), pa.string())))


def _copied_cases(old: pa.Table, new: pa.Table) -> pa.Array:
    """Ids of cases whose rows in both nights were made by the same run."""
    made = [("run_id", "min"), ("run_id", "max"), ("run_id", "count")]
    first, second = (table.group_by("case_id").aggregate(made) for table in (old, new))
    joined = first.join(second, keys=first.column_names, join_type="inner")
    return joined.column("case_id").combine_chunks()


def _make_side(night: Night | None, parts: OldParts, masks: pa.Table) -> _Side:
    """A side of these rows of `masks`, with the measures of their cases."""
    if night is None or parts.masks is None:
        return _Side(results="", path=None)
    side = _Side(results=night.results, path=parts.masks)
    for row in masks.to_pylist():
        side.images.setdefault(row["case_id"], []).append(row)
    if not side.images:
        return side
    case_ids = pa.array(sorted(side.images), pa.string())

    def read(table: str, path: str, columns: list[str]) -> list[dict[str, Any]]:
        rows = tables.read_part(night.results, table, path, columns)
        kept = rows.filter(pc.is_in(rows.column("case_id"), case_ids))
        found: list[dict[str, Any]] = kept.to_pylist()
        return found

    if parts.metrics is not None:
        for row in read("metrics", parts.metrics, _METRIC_COLUMNS):
            side.metrics[row["image_id"], row["label"]] = row
    if parts.cases is not None:
        for row in read("cases", parts.cases, _CASE_COLUMNS):
            side.cases.setdefault(row["case_id"], {})[row["label"]] = row
    return side


def _compare_shard(shard_id: str, old: _Side, new: _Side, group_of: Callable[[str], str]) -> _Found:
    found = _Found()
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for case_id in sorted({*old.images, *new.images}):
        before, after = old.images.get(case_id, []), new.images.get(case_id, [])
        pairs += _count_images(before, after, found.counts)
    found.counts["pairs_read"] += len(pairs)
    old_masks = old.masks([row["row"] for row, _ in pairs])
    new_masks = new.masks([row["row"] for _, row in pairs])
    differing: dict[str, dict[str, tuple[Mask, Mask]]] = {}
    for row, other in pairs:
        mask, now = old_masks[row["row"]], new_masks[other["row"]]
        if mask is not None and now is not None:
            differing.setdefault(row["case_id"], {})[row["image_id"]] = (mask, now)
    for case_id in sorted({*old.images, *new.images}):
        _compare_case(
            _Case(
                case_id=case_id,
                shard_id=shard_id,
                group=group_of(case_id),
                old=old,
                new=new,
                masks=differing.get(case_id, {}),
            ),
            found,
        )
    return found


def _count_images(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], counts: Counter[str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Count each image under one of COUNTS; yield those in both nights whose pixels differ."""
    by_id = {row["image_id"]: row for row in before}
    for now in after:
        row = by_id.pop(now["image_id"], None)
        if row is None:
            counts["new"] += 1
        elif row["mask_sha256"] == now["mask_sha256"]:
            counts["same" if row["status"] == now["status"] else "status"] += 1
        elif row["mask_sha256"] is None or now["mask_sha256"] is None:
            counts["status"] += 1
        elif (row["height"], row["width"]) != (now["height"], now["width"]):
            counts["not_comparable"] += 1
        else:
            counts["changed"] += 1
            yield dict(row), dict(now)
    counts["removed"] += len(by_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A case in both nights. masks: pairs of label maps that differ, by image id."""

    case_id: str
    shard_id: str
    group: str
    old: _Side
    new: _Side
    masks: Mapping[str, tuple[Mask, Mask]]

    def area(self, image_id: str, label: int) -> int:
        """Pixels of a label in an image of the night after."""
        row = self.new.metrics.get((image_id, label))
        return 0 if row is None else row["area_px"] or 0

    @property
    def state(self) -> str:
        """new, removed, changed (other input) or recomputed (the same)."""
        before, after = self.old.images.get(self.case_id), self.new.images.get(self.case_id)
        if before is None or after is None:
            return "new" if before is None else "removed"
        return "recomputed" if before[0]["case_digest"] == after[0]["case_digest"] else "changed"


def _compare_case(case: _Case, found: _Found) -> None:
    state = case.state
    before, after = case.old.cases.get(case.case_id, {}), case.new.cases.get(case.case_id, {})
    for label in sorted({*before, *after}):
        row, now = before.get(label), after.get(label)
        known = now or row
        assert known is not None
        common = {
            "case_id": case.case_id,
            "group": case.group,
            "label": label,
            "label_name": known["label_name"],
        }
        moved: dict[str, Any] = {}
        if state in ("changed", "recomputed"):
            images = list(_image_rows(case, label))
            found.images += [{**common, **item} for item in images]
            moved = _case_movement(case, label, images)
        found.cases.append(
            {
                **common,
                "shard_id": case.shard_id,
                "state": state,
                **_sides(row, now),
                "volume_change": _relative(row, now),
                **moved,
            }
        )


_CASE_NAMES = {"components": "components_3d"}


def _sides(row: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> dict[str, Any]:
    names = ("volume_px", "volume_ml", "components", "confidence", "num_images", "num_bad")
    return {
        f"{name}_{when}": None if side is None else side[_CASE_NAMES.get(name, name)]
        for name in names
        for when, side in (("before", row), ("after", now))
    }


def _relative(row: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> float | None:
    """Change of volume relative to before; from nothing to something has no value."""
    if row is None or now is None or row["volume_px"] is None or now["volume_px"] is None:
        return None
    before, after = row["volume_px"], now["volume_px"]
    if not before:
        return None if after else 0.0
    return float((after - before) / before)


def _image_rows(case: _Case, label: int) -> Iterator[dict[str, Any]]:
    """Rows of IMAGES_SCHEMA for one label, of images whose mask or status differs."""
    before = {row["image_id"]: row for row in case.old.images.get(case.case_id, [])}
    for now in case.new.images.get(case.case_id, []):
        image_id = now["image_id"]
        row = before.get(image_id)
        if row is None:
            continue
        pair = case.masks.get(image_id)
        if (
            pair is None
            and row["status"] == now["status"]
            and (row["mask_sha256"] == now["mask_sha256"])
        ):
            continue
        movement: dict[str, Any] = {}
        if pair is not None:
            was, is_now = pair[0] == label, pair[1] == label
            if not (was.any() or is_now.any()):
                continue
            movement = {"dice": _dice(was, is_now), **_components_moved(was, is_now)}
        old, new = (side.metrics.get((image_id, label)) for side in (case.old, case.new))
        yield {
            "image_id": image_id,
            "slice_index": now["slice_index"],
            "status_before": row["status"],
            "status_after": now["status"],
            **{
                f"{name}_{when}": side and side[name]
                for name in ("area_px", "confidence")
                for when, side in (("before", old), ("after", new))
            },
            **movement,
        }


def _dice(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> float | None:
    total = np.count_nonzero(before) + np.count_nonzero(after)
    return 2 * float(np.count_nonzero(before & after)) / float(total) if total else None


def _components_moved(
    before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]
) -> dict[str, int]:
    """Components (full connectivity) of `after` that touch nothing of `before`, and the reverse."""
    return {
        "appeared": len(_lonely(after, before)[1]),
        "vanished": len(_lonely(before, after)[1]),
    }


def _lonely(
    mask: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[Any], list[int]]:
    """The components of `mask`, numbered, and the numbers of those without a pixel in `other`."""
    if not mask.any():
        return np.zeros(mask.shape, np.int32), []
    labelled, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    met = set(np.unique(labelled[other]).tolist())
    return labelled, [number for number in range(1, count + 1) if number not in met]


def _case_movement(case: _Case, label: int, images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Dice of the volume between the nights, and its components that came and went."""
    before = {row["image_id"]: row for row in case.old.images[case.case_id]}
    overlap = total = 0
    shared: list[tuple[str, dict[str, Any]]] = []
    comparable = True
    for now in sorted(case.new.images[case.case_id], key=lambda row: row["slice_index"]):
        row = before.get(now["image_id"])
        if row is None or row["mask_sha256"] is None or now["mask_sha256"] is None:
            continue
        shared.append((now["image_id"], now))
        pair = case.masks.get(now["image_id"])
        if pair is not None:
            was, is_now = pair[0] == label, pair[1] == label
            overlap += int(np.count_nonzero(was & is_now))
            total += int(np.count_nonzero(was)) + int(np.count_nonzero(is_now))
        elif row["mask_sha256"] == now["mask_sha256"]:
            area = case.area(now["image_id"], label)
            overlap, total = overlap + area, total + 2 * area
        else:
            comparable = False
    appeared, vanished = _case_components(case, label, shared)
    worst = min(
        (item for item in images if item.get("dice") is not None),
        key=lambda item: (
            (item["dice"] - 1) * ((item["area_px_before"] or 0) + (item["area_px_after"] or 0))
        ),
        default=None,
    )
    return {
        "dice": 2 * overlap / total if total and comparable else None,
        "appeared": appeared,
        "vanished": vanished,
        "images_changed": sum(1 for image_id, _ in shared if image_id in case.masks),
        "worst_image": worst and worst["image_id"],
    }


def _case_components(
    case: _Case, label: int, shared: Sequence[tuple[str, dict[str, Any]]]
) -> tuple[int, int]:
    """3-D components that appeared and vanished, from the slices that differ.

    A component that reaches an unchanged slice and goes on there is in both nights: such slices, if
    they hold the label at all, are read as well.
    """
    appeared = vanished = 0
    position = 0
    while position < len(shared):
        if shared[position][0] not in case.masks:
            position += 1
            continue
        end = position
        while end < len(shared) and shared[end][0] in case.masks:
            end += 1
        pairs = [case.masks[image_id] for image_id, _ in shared[position:end]]
        if len({pair[0].shape for pair in pairs}) == 1:
            old, new = (np.stack([pair[side] for pair in pairs]) == label for side in (0, 1))
            neighbours = (
                shared[position - 1][1] if position else None,
                shared[end][1] if end < len(shared) else None,
            )
            appeared += _num_new(case, label, new, old, neighbours)
            vanished += _num_new(case, label, old, new, neighbours)
        position = end
    return appeared, vanished


def _num_new(
    case: _Case,
    label: int,
    volume: npt.NDArray[np.bool_],
    other: npt.NDArray[np.bool_],
    neighbours: tuple[dict[str, Any] | None, dict[str, Any] | None],
) -> int:
    """Components of `volume` that are neither in `other` nor go on in an unchanged neighbour."""
    labelled, lonely = _lonely(volume, other)
    going_on: set[int] = set()
    for face, row in zip((labelled[0], labelled[-1]), neighbours, strict=True):
        if row is None or not np.isin(face, lonely).any() or not case.area(row["image_id"], label):
            continue
        mask = case.new.masks([row["row"]])[row["row"]]
        if mask is not None and mask.shape == face.shape:
            near = ndimage.binary_dilation(mask == label, np.ones((3, 3), bool))
            going_on |= set(np.unique(face[near]).tolist())
    return len(set(lonely) - going_on)


def became_bad(comparison: Comparison) -> list[dict[str, Any]]:
    """Images that had a good row before and have a bad one now, once each."""
    rows = {
        row["image_id"]: row
        for row in comparison.images.to_pylist()
        if row["status_before"] == STATUS_OK and row["status_after"] != STATUS_OK
    }
    return list(rows.values())
