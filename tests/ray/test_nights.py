"""Seven nights over real brain MRI on Ray, and what three engines read after each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
import ray.data
from deltalake import DeltaTable
from object_store import upload
from pyarrow.fs import S3FileSystem

from pipeline import results, storage
from pipeline.config import load_config
from pipeline.errors import ResultsError
from pipeline.flows.nightly import roll_back, run_nightly
from pipeline.lookup import require_night
from pipeline.policy import KeepConfig, NightlyConfig
from pipeline.upkeep import collect, find_waste, verify_checksums

FILES = {"images": "{case}/{case}_{slice}.tif", "masks": "{case}/{case}_{slice}_mask.tif"}
KEYS = {
    "masks": ["image_id", "mask_sha256", "status"],
    "metrics": ["image_id", "label", "area_px", "dice"],
    "cases": ["case_id", "label", "volume_px", "dice"],
}


@pytest.fixture
def archive(shared, tmp_path) -> Path:
    """Eight patients: six on the first night, two to come."""
    script = shared("data", "unpack_lgg.py")
    subprocess.run(
        [sys.executable, script, tmp_path / "all", "--patients", "8"],
        check=True,
        capture_output=True,
    )
    patients = sorted((tmp_path / "all").iterdir())
    for name, chosen in (("archive", patients[:6]), ("later", patients[6:])):
        for patient in chosen:
            shutil.move(patient, tmp_path / name / patient.name)
    return tmp_path / "archive"


def read_three_ways(out: str, table: str, scratch: Path) -> list[list[tuple]]:
    """The newest rows of a table by pandas, by DuckDB and by Ray, as users are told to read them.

    Out of object storage DuckDB would need an extension from the network, so it reads copies.
    """
    columns = KEYS[table]
    paths, system, options = require_night(out, None).paths(table), None, None
    local = paths
    if storage.is_remote(out):
        system, options = _s3(), {"AWS_ALLOW_HTTP": "true"}
        local = [_copied(path, scratch) for path in paths]
        paths = [path.removeprefix("s3://") for path in paths]
    frames = [
        DeltaTable(storage.join(out, table), storage_options=options).to_pandas(),
        duckdb.sql(f"select * from read_parquet({local})").df(),
        ray.data.read_parquet(paths, filesystem=system).to_pandas(),
    ]
    rows = []
    for frame in frames:
        plain = frame[columns].astype(object).where(frame[columns].notna(), None)
        rows.append(sorted(plain.itertuples(index=False, name=None), key=str))
    return rows


def _s3() -> S3FileSystem:
    """For workers too, which do not have the environment of a test."""
    return S3FileSystem(
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=os.environ["AWS_ENDPOINT_URL"],
        region="us-east-1",
    )


def _copied(uri: str, folder: Path) -> str:
    path = folder / uri.rsplit("/", 1)[1]
    path.write_bytes(storage.read(uri))
    return str(path)


def _parts(out: str) -> set[str]:
    return {
        f"{table}/{info.path}"
        for table in KEYS
        for info in storage.list_files(storage.join(out, table))
        if info.path.endswith(".parquet") and "_delta_log" not in info.path
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "engine",
    ["here", *(pytest.param(name, marks=pytest.mark.storm) for name in ("ray", "here_on_s3"))],
)
def test_seven_nights(  # noqa: PLR0915  (seven nights are one story)
    engine, archive, tmp_path, bright_bundle, ray_session, night_here, request
) -> None:
    run = run_nightly if engine == "ray" else night_here
    labelled, scratch = tmp_path / "labelled", tmp_path / "scratch"
    scratch.mkdir()
    place = request.getfixturevalue("bucket") if engine == "here_on_s3" else str(tmp_path)
    out = f"{place}/results"
    first, second, broken = (
        bright_bundle(tmp_path / name, threshold)
        for name, threshold in (("first", 2.0), ("second", 1.97), ("broken", 50.0))
    )
    images = {
        case.name: len([f for f in case.iterdir() if "mask" not in f.name])
        for folder in (archive, tmp_path / "later")
        for case in folder.iterdir()
    }

    def night(bundle):
        if storage.is_remote(place):
            for folder in filter(Path.exists, (archive, labelled)):
                upload(folder, f"{place}/{folder.name}")
        values = {"source": f"{place}/archive", "results": out, "bundle": bundle}
        values |= {f"segment.source.{key}": value for key, value in FILES.items()}
        values |= {f"labelled.source.{key}": value for key, value in FILES.items()}
        if labelled.exists():
            values["labelled.uri"] = f"{place}/labelled"
        values |= {"groups.pattern": "TCGA_{group}_*"}
        values |= {
            "gate.max_missing_share": 0.2,
            "gate.max_low_dice_share": 0.3,
            "report.worst_cases": 2,
        }
        return run(load_config(NightlyConfig, options=values))

    def same_everywhere() -> dict[str, list[tuple]]:
        found = {}
        for table in KEYS:
            pandas, duck, on_ray = read_three_ways(out, table, scratch)
            assert pandas == duck == on_ray
            found[table] = pandas
        present = {case.name for case in archive.iterdir()}
        assert {row[0].split("/")[0] for row in found["masks"]} <= present | {"gone"}
        return found

    def computed_tonight() -> set[str]:
        opened = require_night(out, None)
        rows = results.read_table(opened, "masks", ["case_id", "run_id"]).to_pylist()
        return {row["case_id"] for row in rows if row["run_id"] == opened.metadata["run_id"]}

    everyone = {case.name for case in archive.iterdir()}
    one = night(first)
    assert (one.summary.night, computed_tonight()) == (0, everyone)
    assert one.summary.computed_images == sum(images[case] for case in everyone)
    rows_of_one = same_everywhere()
    assert sum(row[2] > 0 for row in rows_of_one["cases"]) > 3, "a network that finds nothing"

    for case_id, *_ in sorted(rows_of_one["cases"], key=lambda row: -(row[3] or 0))[:2]:
        shutil.copytree(archive / case_id, labelled / case_id)  # where it does find something

    two = night(first)
    assert (two.summary.published, two.summary.computed_images) == (False, 0)
    assert same_everywhere() == rows_of_one

    new = {shutil.move(case, archive / case.name).name for case in (tmp_path / "later").iterdir()}
    three = night(first)
    assert (three.summary.night, computed_tonight()) == (1, new)
    assert three.summary.computed_images == sum(images[case] for case in new)
    assert len(same_everywhere()["masks"]) == sum(images.values())

    changed, source, gone = sorted(everyone)[0], sorted(everyone)[1], sorted(everyone)[2]
    slices = [sorted((archive / c).glob("*_1[0-2].tif")) for c in (changed, source)]
    for target, other in zip(*slices, strict=True):
        shutil.copy(other, target)
    shutil.rmtree(archive / gone)
    four = night(first)
    assert (four.summary.night, computed_tonight()) == (2, {changed})
    assert four.summary.counts["cases"] | {"bad": 0} == {
        "new": 0,
        "changed": 1,
        "stale": 0,
        "removed": 1,
        "unchanged": 6,
        "bad": 0,
    }
    rows_of_four = same_everywhere()
    assert gone not in {row[0] for row in rows_of_four["cases"]}

    five = night(second)
    assert five.verdict.passed, five.verdict.sentence
    assert (five.summary.night, computed_tonight()) == (3, (everyone | new) - {gone})
    drop = next(limit for limit in five.verdict.limits if limit.name == "max_dice_drop")
    assert drop.passed and drop.value is not None, "the labelled set has its say"
    rows_of_five = same_everywhere()
    assert rows_of_five != rows_of_four

    six = night(broken)
    assert (six.refused, six.summary.published) == (True, False)
    assert {"max_low_dice_share", "max_volume_change", "max_dice_drop"} <= {
        limit.name for limit in six.verdict.failed
    }
    assert same_everywhere() == rows_of_five
    assert len(six.review) == 7
    assert "vanished" in six.review[0].reasons[0]

    rolled = roll_back(out, 2, "the new network is not trusted yet")
    assert (rolled["night"], rolled["content_of"]) == (4, 2)
    assert same_everywhere() == rows_of_four
    assert night(first).summary.computed_images == 0
    before = _parts(out)
    waste = find_waste(out, KeepConfig(nights=1, grace_hours=1), now_s=1e11)
    collect(out, waste)
    after = _parts(out)
    assert len(after) == sum(len(require_night(out, None).paths(t)) for t in KEYS)
    assert len(before - after) == len(waste.files) > 0
    assert same_everywhere() == rows_of_four
    with pytest.raises(ResultsError, match="collected"):
        results.open_night(out, 3)
    checked = verify_checksums(out)
    assert (checked.damaged, checked.unsealed, checked.nights) == ((), (), (4,))
