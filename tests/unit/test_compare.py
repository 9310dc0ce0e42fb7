"""Two nights against each other: what counts as moved, and by how much."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import ndimage

from pipeline import compare, tables
from pipeline.drift import find_drift, measure_drift
from pipeline.errors import ConfigError
from pipeline.groups import make_group_of
from pipeline.policy import GroupsConfig
from pipeline.records import OldParts, sha256_hex
from pipeline.results import Night, PublishedShard


def make_night(
    folder,
    volumes,
    *,
    run_id,
    number=0,
    statuses=None,
    digest="d",
    shard="5" * 32,
    copied=(),
):
    """A night of one shard from label maps (ZHW, or None for a bad slice) by case id.

    copied: cases whose rows the run "one" had made.
    """
    shard_columns = {
        "shard_id": shard,
        "shard_version": "1",
        "bundle_digest": "b",
        "config_digest": "c",
        "run_id": run_id,
    }
    rows = {"masks": [], "metrics": [], "cases": []}
    for case_id, slices in sorted(volumes.items()):
        good = [m for m in slices if m is not None]
        shard_columns = {**shard_columns, "run_id": "one" if case_id in copied else run_id}
        for index, mask in enumerate(slices):
            status = "bad" if mask is None else (statuses or {}).get(f"{case_id}/{index}", "ok")
            image = {
                **shard_columns,
                "case_id": case_id,
                "image_id": f"{case_id}/{index}",
                "slice_index": index,
            }
            data = None if mask is None else mask.tobytes()
            rows["masks"].append(
                {
                    **image,
                    "slice_name": str(index),
                    "case_index": 0,
                    "status": status,
                    "case_digest": digest,
                    "height": None if mask is None else mask.shape[0],
                    "width": None if mask is None else mask.shape[1],
                    "mask": data,
                    "mask_sha256": data and sha256_hex(data),
                }
            )
            if mask is not None:
                area = int((mask == 1).sum())
                rows["metrics"].append(
                    {**image, "label": 1, "label_name": "x", "area_px": area, "confidence": 0.9}
                )
        volume = int(sum((m == 1).sum() for m in good))
        rows["cases"].append(
            {
                **shard_columns,
                "case_id": case_id,
                "label": 1,
                "label_name": "x",
                "volume_px": volume,
                "num_images": len(slices),
                "num_bad": len(slices) - len(good),
            }
        )
    parts = {
        table: tables.write_part(
            str(folder), table, pa.Table.from_pylist(r, tables.table_schema(table)), shard, run_id
        ).path
        for table, r in rows.items()
    }
    held = PublishedShard(
        shard_id=shard,
        version="1",
        bundle_digest="b",
        config_digest="c",
        num_cases=len(volumes),
        num_images=len(rows["masks"]),
        num_bad_cases=0,
        num_bad=0,
        parts=OldParts(**parts),
    )
    return Night(
        results=str(folder), number=number, metadata={}, published_ms=0, shards={shard: held}
    )


def blank(depth=4, side=12):
    return np.zeros((depth, side, side), np.uint8)


def compared(tmp_path, before, after, **options):
    return compare.compare_nights(
        make_night(tmp_path, before, run_id="one"),
        make_night(tmp_path, after, run_id="two", number=1, **options),
    )


def test_equal_masks_are_never_read(tmp_path, monkeypatch):
    volume = blank()
    volume[1, 3:6, 3:6] = 1
    monkeypatch.setattr(compare.tables, "read_masks", lambda out, path, rows: pytest.fail("read"))
    found = compared(tmp_path, {"a": volume, "b": volume}, {"a": volume, "b": volume})
    assert found.counts["same"] == 8
    assert found.counts["pairs_read"] == 0
    assert found.case_states == {
        "new": 0,
        "removed": 0,
        "changed": 0,
        "recomputed": 2,
        "unchanged": 0,
    }
    assert [row["dice"] for row in found.cases.to_pylist()] == [1.0, 1.0]
    assert found.images.num_rows == 0


def test_cases_that_were_taken_over_count_as_the_same_and_nothing_more(tmp_path):
    before = {f"c{i}": blank() for i in range(4)}
    after = {key: volume.copy() for key, volume in before.items()}
    after["c1"][0, 1:3, 1:3] = 1
    found = compared(tmp_path, before, after, copied=("c0", "c2", "c3"))
    assert found.counts["same"] == 15
    assert found.counts["changed"] == found.counts["pairs_read"] == 1
    assert [row["case_id"] for row in found.cases.to_pylist()] == ["c1"]
    assert found.case_states["unchanged"] == 3


def test_cases_in_another_shard_are_compared_with_themselves(tmp_path):
    before, after = {"a": blank(), "gone": blank()}, {"a": blank(), "new": blank()}
    after["a"][1, 2:4, 2:4] = 1
    found = compared(tmp_path, before, after, shard="7" * 32)
    assert found.counts | {"same": 3} == {
        "same": 3,
        "changed": 1,
        "new": 4,
        "removed": 4,
        "status": 0,
        "not_comparable": 0,
        "pairs_read": 1,
    }
    states = {row["case_id"]: row["state"] for row in found.cases.to_pylist()}
    assert states == {"a": "recomputed", "gone": "removed", "new": "new"}


def test_the_same_parts_are_not_opened(tmp_path, monkeypatch):
    night = make_night(tmp_path, {"a": blank()}, run_id="one")
    monkeypatch.setattr(compare.tables, "read_part", lambda *a: pytest.fail("opened"))
    found = compare.compare_nights(night, night)
    assert (found.counts["same"], found.case_states["unchanged"]) == (4, 1)


def test_only_pairs_that_differ_are_read(tmp_path, monkeypatch):
    before = {f"c{i}": blank() for i in range(5)}
    after = {key: volume.copy() for key, volume in before.items()}
    after["c3"][2, 1:4, 1:4] = 1
    asked, real = [], tables.read_masks

    def read(out, path, rows):
        asked.append(list(rows))
        return real(out, path, rows)

    monkeypatch.setattr(compare.tables, "read_masks", read)
    found = compared(tmp_path, before, after)
    assert sum(map(len, asked)) == 2 * found.counts["pairs_read"] == 2
    assert found.counts["changed"] == 1


def test_movement_of_a_case(tmp_path):
    before, after = blank(), blank()
    before[1, 2:6, 2:6] = 1
    after[1, 2:6, 4:8] = 1
    after[3, 9:11, 9:11] = 1
    found = compared(tmp_path, {"a": before}, {"a": after}, digest="other")
    (row,) = found.cases.to_pylist()
    assert row["state"] == "changed"
    assert row["dice"] == pytest.approx(2 * 8 / (16 + 20))
    assert row["volume_change"] == pytest.approx(4 / 16)
    assert (row["appeared"], row["vanished"], row["images_changed"]) == (1, 0, 2)
    assert row["worst_image"] == "a/1"
    images = {item["image_id"]: item for item in found.images.to_pylist()}
    assert images["a/1"]["dice"] == pytest.approx(0.5)
    assert (images["a/3"]["appeared"], images["a/3"]["area_px_before"]) == (1, 0)


def test_a_component_that_goes_on_in_an_unchanged_slice_has_not_vanished(tmp_path):
    before = blank()
    before[1:3, 2:5, 2:5] = 1
    after = before.copy()
    after[2] = 0
    (row,) = compared(tmp_path, {"a": before}, {"a": after}).cases.to_pylist()
    assert (row["vanished"], row["appeared"]) == (0, 0)
    before[1] = after[1] = 0
    before[1, 8:10, 8:10] = after[1, 8:10, 8:10] = 1
    (row,) = compared(tmp_path / "2", {"a": before}, {"a": after}).cases.to_pylist()
    assert (row["vanished"], row["appeared"]) == (1, 0)


def test_components_against_whole_volumes(tmp_path):
    """The slices that differ are enough: the same numbers as from both volumes as a whole."""
    draw = np.random.default_rng(3)
    before, after, wanted = {}, {}, {}
    for number in range(60):
        old = (draw.random((6, 9, 9)) < 0.08).astype(np.uint8)
        new = old.copy()
        for z in draw.choice(6, 3, replace=False):
            new[z] = (draw.random((9, 9)) < 0.08).astype(np.uint8)
        before[f"c{number:02d}"], after[f"c{number:02d}"] = old, new
        counts = []
        for mask, other in ((new, old), (old, new)):
            labelled, count = ndimage.label(mask, np.ones((3, 3, 3)))
            counts.append(count - len(set(labelled[other > 0].tolist()) - {0}))
        wanted[f"c{number:02d}"] = tuple(counts)
    found = compared(tmp_path, before, after).cases.to_pylist()
    assert {row["case_id"]: (row["appeared"], row["vanished"]) for row in found} == wanted


def test_statuses_sizes_and_cases_that_come_and_go(tmp_path):
    bad, small = list(blank()), list(blank(side=8))
    bad[2] = None
    before = {"a": blank(), "gone": blank(), "small": blank()}
    after = {"a": bad, "new": blank(), "small": small}
    found = compared(tmp_path, before, after)
    assert found.counts == {
        "same": 3,
        "changed": 0,
        "new": 4,
        "removed": 4,
        "status": 1,
        "not_comparable": 4,
        "pairs_read": 0,
    }
    assert {row["case_id"]: row["state"] for row in found.cases.to_pylist()} == {
        "a": "recomputed",
        "gone": "removed",
        "new": "new",
        "small": "recomputed",
    }
    (worse,) = compare.became_bad(found)
    assert worse["image_id"] == "a/2"


def test_the_first_night_has_nothing_before_it(tmp_path):
    night = make_night(tmp_path, {"a": blank()}, run_id="one")
    found = compare.compare_nights(None, night, lambda case_id: f"site {case_id}")
    assert (found.before, found.counts["new"], found.case_states["new"]) == (None, 4, 1)
    assert found.cases.to_pylist()[0]["group"] == "site a"


def test_drift_of_equal_and_of_moved_samples():
    draw = np.random.default_rng(0)
    first = draw.normal(100, 10, 2000)
    same, moved = draw.normal(100, 10, 2000), draw.normal(115, 10, 2000)
    quiet, loud = measure_drift(first, same), measure_drift(first, moved)
    assert quiet["psi"] < 0.05
    assert quiet["p_value"] > 0.01
    assert loud["psi"] > 0.25
    assert loud["p_value"] < 1e-6
    edges = np.quantile(first, np.linspace(0, 1, 11)[1:-1])
    shares = [
        (np.histogram(v, [-np.inf, *edges, np.inf])[0] + 0.5) / (len(v) + 5) for v in (first, moved)
    ]
    by_hand = sum((b - a) * np.log(b / a) for a, b in zip(*shares, strict=True))
    assert loud["psi"] == pytest.approx(by_hand, rel=0.01)
    fallen = measure_drift(np.full(50, 0.9), np.full(50, 0.5))
    assert fallen["psi"] > 1, "values below all of the reference are a move"
    few = measure_drift(np.array([1.0, 2.0]), np.array([3.0]))
    assert (few["ks"], few["p_value"]) == (1.0, 1.0)
    assert measure_drift(np.zeros(30), np.zeros(30))["psi"] == pytest.approx(0, abs=1e-9)


def test_drift_names_the_group_that_moved():
    draw = np.random.default_rng(1)
    rows = []
    for group, factor in (("north", 1.0), ("south", 3.0)):
        for number in range(200):
            volume = int(draw.normal(1000, 100))
            rows.append(
                {
                    "case_id": f"{group}{number}",
                    "group": group,
                    "label_name": "x",
                    "state": "recomputed",
                    "volume_px_before": volume,
                    "volume_px_after": int(volume * factor),
                }
            )
    cases = pa.Table.from_pylist(rows, compare.CASES_SCHEMA)
    nothing = pa.table(
        {
            "label_name": pa.array([], pa.string()),
            "volume_px": pa.array([], pa.int64()),
            "confidence": pa.array([], pa.float64()),
            "group": pa.array([], pa.string()),
        }
    )
    found = {(d.group, d.quantity): d for d in find_drift(cases, nothing)}
    assert set(found) == {("", "volume"), ("north", "volume"), ("south", "volume")}
    assert found["north", "volume"].psi == pytest.approx(0, abs=1e-9)
    assert found["south", "volume"].psi > 2


@pytest.mark.parametrize(
    ("pattern", "case_id", "group"),
    [
        ("TCGA_{group}_*", "TCGA_CS_4941_19960909", "CS"),
        ("{group}_*", "north_7", "north"),
        ("*/{group}", "a/b", "b"),
        ("TCGA_{group}_*", "other", ""),
        ("", "north_7", ""),
    ],
)
def test_groups_by_pattern(pattern, case_id, group):
    assert make_group_of(GroupsConfig(pattern=pattern))(case_id) == group


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_groups_by_a_table(kind, tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.table({"case": ["a", "b"], "site": ["north", None]})
    path = tmp_path / f"sites.{kind}"
    write = pyarrow.csv.write_csv if kind == "csv" else pyarrow.parquet.write_table
    write(table, str(path))
    config = GroupsConfig(table=str(path), case_column="case", group_column="site")
    group_of = make_group_of(config)
    assert [group_of(name) for name in "abc"] == ["north", "", ""]
    with pytest.raises(ConfigError, match="no column 'scanner'; it has case, site"):
        make_group_of(GroupsConfig(table=str(path), case_column="case", group_column="scanner"))
    with pytest.raises(ConfigError, match="cannot be read"):
        make_group_of(GroupsConfig(table=str(tmp_path / "none.csv")))


def test_a_pattern_without_a_group_is_refused():
    with pytest.raises(ConfigError, match="has no {group}"):
        GroupsConfig(pattern="{site}_*")
