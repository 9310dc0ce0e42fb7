"""A whole night without Ray: judged, refused, published by hand, taken back, proved, tried in the shadow."""

import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
from without_ray import without_ray

from pipeline import results, runs, storage, upkeep
from pipeline.config import load_config
from pipeline.errors import Busy, CommitConflict, ConfigError, ResegError, ResultsError
from pipeline.flows.nightly import load_examination, publish_refused, remake_report, roll_back
from pipeline.flows.shadow import run_shadow
from pipeline.planning import new_run_id
from pipeline.policy import KeepConfig, NightlyConfig
from pipeline.proof import verify_results

FILES = {"images": "{case}/{case}_{slice}.png", "masks": "{case}/{case}_{slice}_mask.png"}


@pytest.fixture(scope="module")
def bundles(demo_bundle, altered_bundle, tmp_path_factory):
    """The shipped network, one that is a little different, and one that finds nothing."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "good": demo_bundle,
        "shifted": altered_bundle(demo_bundle, folder / "shifted", 0.3),
        "blind": altered_bundle(demo_bundle, folder / "blind", -30.0),
    }


@pytest.fixture(scope="module")
def first_night(phantoms, bundles, night_here, tmp_path_factory):
    """A source and its results after one night; copy before changing."""
    folder = tmp_path_factory.mktemp("first")
    shutil.copytree(phantoms, folder / "source")
    outcome = night_here(make_config(folder, bundles["good"]))
    assert outcome.summary.night == 0
    return folder


@pytest.fixture
def place(first_night, tmp_path):
    """One's own copy of the first night: the source's files keep their times, the results their source."""
    shutil.move(first_night / "results", tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", first_night / "results", symlinks=True)
    shutil.copytree(first_night / "source", tmp_path / "source", symlinks=True)
    yield first_night
    shutil.rmtree(first_night / "results")
    shutil.rmtree(first_night / "source")
    shutil.move(tmp_path / "kept", first_night / "results")
    shutil.move(tmp_path / "source", first_night / "source")


def make_config(folder, bundle, **changes):
    values = {
        "source": str(folder / "source"),
        "results": str(folder / "results"),
        "bundle": bundle,
        "report.worst_cases": 2,
    }
    values |= {f"segment.source.{key}": value for key, value in FILES.items()}
    return load_config(NightlyConfig, options=values | changes)


def out_of(place):
    return str(place / "results")


def test_a_night_leaves_what_people_and_machines_need(place, bundles, night_here):
    out = out_of(place)
    night = results.open_night(out)
    run_id = night.metadata["run_id"]
    files = set(os.listdir(Path(out) / "_runs" / run_id))
    assert files >= {
        "plan.json.gz",
        "receipts",
        "examination.json",
        "cases.parquet",
        "images.parquet",
        "review.csv",
        "report.html",
    }
    assert os.listdir(Path(out) / "_seals") == [f"{0:020d}.json"]
    assert night.metadata["verdict"]["passed"]
    assert night.metadata["operator"]
    page = Path(out) / "_runs" / run_id / "report.html"
    before = page.stat().st_mtime_ns
    again = night_here(make_config(place, bundles["good"]))
    assert (again.summary.published, again.summary.night, again.report) == (False, 0, None)
    assert page.stat().st_mtime_ns == before
    page.unlink()
    assert night_here(make_config(place, bundles["good"])).report == str(page)
    assert page.exists()


def test_a_refused_night_waits_and_can_be_published_by_hand(
    place, bundles, night_here, read_digests
):
    out, config = out_of(place), make_config(place, bundles["blind"])
    published = read_digests(out)
    refused = night_here(config)
    assert (refused.refused, refused.summary.published, refused.summary.computed_images) == (
        True,
        False,
        48,
    )
    failed = {limit.name for limit in refused.verdict.failed}
    assert {"max_low_dice_share", "max_volume_change"} <= failed
    assert read_digests(out) == published
    run_id = refused.summary.run_id
    assert runs.open_runs(out) == [run_id]
    assert "Refused" in Path(refused.report).read_text()
    again = night_here(config)
    assert (again.refused, again.summary.run_id, again.summary.resumed) == (True, run_id, True)
    with pytest.raises(ConfigError, match="say why"):
        publish_refused(out, run_id, "  ")
    with pytest.raises(ResultsError, match=f"no run 'nobody'; staged are: {run_id}"):
        publish_refused(out, "nobody", "because")
    done = publish_refused(out, run_id, "an empty archive is right")
    assert (done.summary.published, done.summary.night) == (True, 1)
    entry = results.history(out)[0]
    assert entry["because"] == "an empty archive is right"
    assert entry["verdict"]["overridden"]
    assert "published over" in Path(done.report).read_text()
    assert publish_refused(out, run_id, "once more").summary.night == 1
    assert runs.open_runs(out) == []


def test_a_refused_night_is_stale_once_another_is_published(
    place, bundles, night_here, segment_here, config
):
    out = out_of(place)
    refused = night_here(make_config(place, bundles["blind"]))
    shutil.rmtree(place / "source" / "phantom_0007")
    healed = night_here(make_config(place, bundles["good"], **{"gate.max_missing_share": 0.5}))
    assert healed.summary.night == 1
    assert runs.open_runs(out) == []
    with pytest.raises(CommitConflict, match="another run has published since"):
        publish_refused(out, refused.summary.run_id, "too late")
    assert results.latest_night_number(out) == 1


def test_cases_that_vanish_from_the_source_are_noticed(place, bundles, night_here):
    for number in range(3):
        shutil.rmtree(place / "source" / f"phantom_000{number}")
    outcome = night_here(make_config(place, bundles["good"]))
    (failed,) = outcome.verdict.failed
    assert (failed.name, failed.value, failed.note) == ("max_missing_share", 0.375, "3 of 8 cases")
    allowed = night_here(make_config(place, bundles["good"], **{"gate.max_missing_share": 0.4}))
    assert (allowed.summary.published, allowed.summary.counts["cases"]["removed"]) == (True, 3)


def test_rollback_is_on_the_record_and_can_be_rolled_back(place, bundles, night_here, read_rows):
    out = out_of(place)
    first = {table: read_rows(out, table) for table in ("masks", "metrics", "cases")}
    assert night_here(make_config(place, bundles["shifted"])).summary.night == 1
    second = read_rows(out, "masks")
    with pytest.raises(ConfigError, match="say why"):
        roll_back(out, 0, "")
    with pytest.raises(ConfigError, match="already has the content"):
        roll_back(out, 1, "to itself")
    with pytest.raises(ResultsError, match="no night 9"):
        roll_back(out, 9, "into the future")
    assert roll_back(out, 0, "the new network")["night"] == 2
    assert {table: read_rows(out, table) for table in first} == first
    entry = results.history(out)[0]
    assert (entry["because"], entry["rollback"]["to"]) == ("the new network", 0)
    assert night_here(make_config(place, bundles["good"])).summary.computed_images == 0
    assert roll_back(out, 1, "it was right")["night"] == 3
    assert read_rows(out, "masks") == second
    assert upkeep.verify_checksums(out).unsealed == ()


def test_the_labelled_set_has_a_say(place, phantoms, bundles, night_here, tmp_path):
    labelled = shutil.copytree(phantoms, tmp_path / "labelled")
    options = {"labelled.uri": str(labelled), "gate.max_low_dice_share": -1}
    options |= {f"labelled.source.{key}": value for key, value in FILES.items()}
    options |= {"gate.max_volume_change": -1, "gate.max_drift_psi": -1}
    fine = night_here(make_config(place, bundles["shifted"], **options))
    limit = fine.verdict.limits[-1]
    assert (limit.name, limit.passed) == ("max_dice_drop", True)
    assert abs(limit.value) < 0.01
    blind = night_here(make_config(place, bundles["blind"], **options))
    (failed,) = blind.verdict.failed
    assert failed.name == "max_dice_drop"
    assert failed.value > 0.8
    assert "p = 0.00" in failed.note


def test_two_nights_at_once_are_one(place, bundles, night_here):
    shutil.rmtree(place / "source" / "phantom_0001")
    config = make_config(place, bundles["good"], **{"gate.max_missing_share": 0.5})
    lock = storage.join(out_of(place), "_runs", "lock.json")
    storage.write(lock, json.dumps({"host": "elsewhere", "pid": 1, "seen": 1e12}).encode())
    with pytest.raises(Busy, match="process 1 on elsewhere is running a night"):
        night_here(config)
    storage.write(lock, json.dumps({"host": "elsewhere", "pid": 1, "seen": 1}).encode())
    assert night_here(config).summary.night == 1


@pytest.mark.timeout(600)
def test_a_hundred_pairs_of_commits_at_once(place, bundles, segment_here, config):
    """Two runs planned on one night commit at the same time: one lands whole, the other is refused."""
    from pipeline.flows.segment import make_record, stage_run

    out = out_of(place)
    (place / "source" / "phantom_0000" / "phantom_0000_1.png").write_bytes(b"junk")
    with without_ray():
        staged = stage_run(str(place / "source"), out, bundles["good"], config(max_bad_share=1.0))
    record = make_record(staged)
    wins = {"a": 0, "b": 0}
    for trial in range(100):
        shutil.rmtree(place / "trial", ignore_errors=True)
        os.makedirs(place / "trial")
        for table in ("masks", "metrics", "cases"):
            shutil.copytree(
                Path(out) / table / "_delta_log", place / "trial" / table / "_delta_log"
            )
        outcomes = {}
        barrier = threading.Barrier(2)

        def publish(name, outcomes=outcomes, barrier=barrier, trial=trial):
            plan = runs.RunPlan(**{**_fields(staged.plan), "run_id": f"{name}-{trial}"})
            barrier.wait()
            try:
                outcomes[name] = results.publish(
                    str(place / "trial"), plan, staged.receipts, record
                )
            except ResegError as error:
                outcomes[name] = error

        threads = [threading.Thread(target=publish, args=(name,)) for name in wins]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _check_trial(str(place / "trial"), staged, outcomes, wins, trial)
    assert sum(wins.values()) == 100


def _fields(plan):
    import dataclasses

    return {item.name: getattr(plan, item.name) for item in dataclasses.fields(plan)}


def _check_trial(trial_out, staged, outcomes, wins, trial):
    winners = [name for name, outcome in outcomes.items() if outcome == 1]
    assert len(winners) == 1, outcomes
    (loser,) = set(outcomes) - set(winners)
    assert isinstance(outcomes[loser], CommitConflict)
    wins[winners[0]] += 1
    night = results.open_night(trial_out)
    assert night.metadata["run_id"] == f"{winners[0]}-{trial}"
    expected = results.staged_night(
        staged.plan, staged.receipts, results.open_night(trial_out, 0), trial_out
    )
    assert {k: s.parts for k, s in night.shards.items()} == {
        k: s.parts for k, s in expected.shards.items()
    }


def test_masks_computed_again_are_the_same_bits(place, bundles):
    out = out_of(place)
    proof = verify_results(out, None, sample=20, checksums=True)
    assert proof.holds
    assert proof.outcomes == {"equal": 20, "different": 0, "gone": 0}
    assert len({item.image_id for item in proof.images}) == 20
    with pytest.raises(ConfigError, match="say where it is: --bundle"):
        verify_results(out, None, sample=1, checksums=False, bundle=bundles["blind"])
    for path in (place / "source" / "phantom_0002").glob("*_3.png"):
        path.write_bytes(b"junk")
    proof = verify_results(out, None, sample=48, checksums=False)
    assert proof.outcomes == {"equal": 42, "different": 0, "gone": 6}


def test_a_mask_that_is_not_what_the_network_says_is_found(place, bundles, night_here):
    """Results of another network under this one's digest: the way to notice a broken machine."""
    out = out_of(place)
    assert night_here(make_config(place, bundles["shifted"])).summary.night == 1
    night = results.open_night(out)
    entry = json.loads(storage.read(f"{out}/masks/_delta_log/{1:020d}.json").splitlines()[0])
    text = json.loads(entry["commitInfo"]["reseg"])
    assert text["bundle"]["digest"] == night.metadata["bundle"]["digest"]
    from pipeline.bundle import load_bundle
    from pipeline.recompute import recompute_sample

    found = recompute_sample(night, load_bundle(bundles["blind"]), 48)
    assert {item.outcome for item in found} == {"equal", "different"}


def test_any_flipped_bit_is_found(place):
    out = out_of(place)
    assert upkeep.verify_checksums(out).damaged == ()
    run_id = results.open_night(out).metadata["run_id"]
    folder = Path(out)
    files = [
        p for t in ("masks", "metrics", "cases") for p in (folder / t).rglob("*") if p.is_file()
    ]
    own = folder / "_runs" / run_id
    files += [
        own / "plan.json.gz",
        own / "config.json",
        Path(out) / "_seals" / f"{0:020d}.json",
        *own.glob("receipts/*"),
    ]
    draw = random.Random(2)
    for path in files:
        for _ in range(3):
            whole = path.read_bytes()
            position, bit = draw.randrange(len(whole)), draw.randrange(8)
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = upkeep.verify_checksums(out).damaged
            except ResultsError as error:
                found = (str(error),)
            path.write_bytes(whole)
            assert found, f"bit {bit} of byte {position} of {path}"
    os.unlink(files[0])
    assert upkeep.verify_checksums(out).damaged


def test_vacuum_keeps_what_is_needed_and_what_is_young(place, bundles, night_here):
    out = out_of(place)
    night_here(make_config(place, bundles["shifted"]))
    refused = night_here(make_config(place, bundles["blind"]))
    parts = {p for t in ("masks", "metrics", "cases") for p in (Path(out) / t).glob("*.parquet")}
    staged = results.staged_night(
        runs.load_plan(out, refused.summary.run_id),
        {r.shard_id: r for r in runs.all_receipts(out, refused.summary.run_id)},
        results.open_night(out),
        out,
    )
    assert upkeep.find_waste(out, KeepConfig(nights=1, grace_hours=1)).files == ()
    waste = upkeep.find_waste(out, KeepConfig(nights=1, grace_hours=1), now_s=1e11)
    assert (waste.oldest_night, waste.nights_dropped) == (1, 1)
    upkeep.collect(out, waste)
    kept = {p for t in ("masks", "metrics", "cases") for p in (Path(out) / t).glob("*.parquet")}
    for night in (results.open_night(out), staged):
        assert {Path(p) for t in ("masks", "metrics", "cases") for p in night.paths(t)} <= kept
    assert len(parts - kept) == len(waste.files) > 0
    assert publish_refused(out, refused.summary.run_id, "it was kept").summary.night == 2
    with pytest.raises(ResultsError, match="was collected"):
        roll_back(out, 0, "it is gone")


def test_a_shadow_run_advises_and_publishes_nothing(place, phantoms, bundles, tmp_path):
    out, source = out_of(place), str(place / "source")
    before = results.history(out)
    labelled = shutil.copytree(phantoms, tmp_path / "labelled")
    options = {"labelled.uri": str(labelled)}
    options |= {f"labelled.source.{key}": value for key, value in FILES.items()}
    config = make_config(place, bundles["good"], **options)
    with without_ray():
        fine = run_shadow(source, out, bundles["shifted"], config, sample=5)
        blind = run_shadow(source, out, bundles["blind"], config, sample=5)
        plain = run_shadow(source, out, bundles["shifted"], None, sample=5)
        with pytest.raises(ConfigError, match="is the published network itself"):
            run_shadow(source, out, bundles["good"], config)
    assert (fine.advice, blind.advice, plain.advice) == ("promote", "hold", "hold")
    assert fine.num_cases == 5 == sum(fine.strata.values())
    assert set(fine.strata) == {"small", "medium", "large"}
    assert fine.mean_dice > 0.9
    assert fine.scores.num_cases == 8
    assert "without a labelled set" in plain.reason
    assert results.history(out) == before
    assert results.open_night(fine.out).metadata["run_id"] != before[0]["run_id"]


def test_the_report_can_be_made_again(place, bundles, night_here):
    out = out_of(place)
    assert b"Night 0 is published" in remake_report(out, None, 0)
    refused = night_here(make_config(place, bundles["blind"]))
    page = remake_report(out, None, 1)
    assert b"limits failed; night 0 stays published" in page
    assert page.count(b"data:image/webp") == 1
    assert load_examination(out, refused.summary.run_id)["base_night"] == 0
    with pytest.raises(ResultsError, match="was not examined"):
        remake_report(out, new_run_id(), 1)
    examined = Path(out) / "_runs" / refused.summary.run_id / "examination.json"
    whole = examined.read_text()
    for damage in (
        "[]",
        "{}",
        "null",
        '{"review": 3}',
        whole[:-9],
        whole.replace("reasons", "reason"),
    ):
        examined.write_text(damage)
        with pytest.raises(ResultsError, match="is damaged"):
            remake_report(out, None, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gate.max_bad_share": 1.5}, "gate.max_bad_share is a share"),
        ({"gate.max_volume_change": -2.0}, "or -1, not -2"),
        ({"gate.low_dice": 2.0}, "gate.low_dice"),
        ({"gate.min_cases": 0}, "gate.min_cases"),
        ({"keep.grace_hours": 0.1}, "would be collected"),
        ({"keep.nights": -1}, "keep.nights"),
        ({"report.worst_cases": 1000}, "report.worst_cases"),
        ({"segment.max_bad_share": 0.5}, "it is gate.max_bad_share"),
        ({"gate.max_dice": 1.0}, "unknown key 'max_dice'"),
        ({"groups.pattern": "{group}_*", "groups.table": "x.csv"}, "exclude each other"),
    ],
)
def test_a_wrong_policy_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        load_config(NightlyConfig, options=values)


def test_places_must_be_said(night_here, tmp_path, demo_bundle):
    with pytest.raises(ConfigError, match='results is not said: add  results = "..."'):
        night_here(load_config(NightlyConfig, options={"source": "x"}))
    inside = {"source": str(tmp_path), "results": str(tmp_path / "r"), "bundle": demo_bundle}
    with pytest.raises(ConfigError, match="inside the source"):
        night_here(load_config(NightlyConfig, options=inside))
    assert os.listdir(tmp_path) == []


def test_cases_under_review_are_corrected_and_trained_on(place, bundles, night_here, tmp_path):
    import numpy as np
    from PIL import Image

    from pipeline.config import TrainConfig
    from pipeline.dataset import IndexJob, index_cases
    from pipeline.flows.nightly import export_review, read_review
    from pipeline.preparation import check_request, make_job, shard_groups

    out = out_of(place)
    night_here(make_config(place, bundles["blind"]))
    run_id, items = read_review(out, None)
    folder = tmp_path / "review"
    exported = export_review(out, run_id, items[:2], str(folder))
    names = [item["case_id"] for item in items[:2]]
    assert (list(exported.cases), exported.num_images, exported.left_out) == (names, 12, ())
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export_review(out, run_id, items[:2], str(folder))
    source = place / "source" / names[0]
    for number in range(1, 7):
        stored = folder / "cases" / names[0] / f"{number}.image.png"
        assert stored.read_bytes() == (source / f"{names[0]}_{number}.png").read_bytes()
        mask = Image.open(folder / "cases" / names[0] / f"{number}.mask.png")
        assert mask.mode == "P"
        assert not np.asarray(mask).any(), "the blind network's masks"
    corrected = np.zeros((64, 64), np.uint8)
    corrected[10:20, 10:20] = 1
    Image.fromarray(corrected).save(folder / "cases" / names[0] / "3.mask.png")
    listed = folder / "review.toml"
    listed.write_text(listed.read_text().replace(f'    "{names[1]}",\n', ""))
    options = {f"source.{key}": value for key, value in FILES.items()}
    config = load_config(
        TrainConfig, options={**options, "split.validation": 0.5, "also": [str(listed)]}
    )
    request = check_request(str(place / "source"), str(tmp_path / "out"), config)
    groups = shard_groups(request)
    wanted = {(f"phantom_{i:04d}", int(f"phantom_{i:04d}" == names[0])) for i in range(8)}
    assert {(case.case_id, number) for _, cases, number in groups for case in cases} == wanted
    job = make_job(request)
    assert isinstance(job.index_job, IndexJob)
    (path, cases, number) = next(group for group in groups if group[2] == 1)
    (row,) = index_cases(job.index_job, path, cases, number).to_pylist()
    assert (row["source"], row["foreground"]) == (1, [0, 0, 100, 0, 0, 0])
    listed.write_text(listed.read_text().replace(names[0], "nobody"))
    with pytest.raises(ConfigError, match="none of its cases|no case 'nobody'"):
        check_request(str(place / "source"), str(tmp_path / "out"), config)


def test_the_page_goes_where_it_is_wanted_and_its_failure_fails_no_night(
    place, bundles, night_here, tmp_path
):
    page = tmp_path / "www" / "latest.html"
    config = make_config(place, bundles["blind"], **{"report.path": str(page)})
    refused = night_here(config)
    assert "Refused" in page.read_text()
    publish_refused(out_of(place), refused.summary.run_id, "it is right")
    assert "Published by hand" in page.read_text()
    page.unlink()
    page.parent.rmdir()
    page.parent.write_text("a file where the folder was")
    with pytest.raises(ConfigError, match="is a file"):
        night_here(config)
    with pytest.raises(ConfigError, match="is a folder; say the name of a file"):
        night_here(make_config(place, bundles["good"], **{"report.path": str(tmp_path)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipeline.flows.nightly.write_page",
            lambda *a: (_ for _ in ()).throw(OSError(28, "full")),
        )
        outcome = night_here(
            make_config(
                place, bundles["good"], **{"gate.low_dice": 0.0, "gate.max_volume_change": -1}
            )
        )
    assert outcome.summary.published
    assert outcome.notes == ("the report could not be written: [Errno 28] full",)
    again = night_here(make_config(place, bundles["good"]))
    assert (again.report, again.notes) != (None, ("",))


def test_a_labelled_set_that_cannot_judge_is_refused_before_anything_is_computed(
    place, phantoms, bundles, night_here, tmp_path
):
    (tmp_path / "empty").mkdir()
    for uri, message in (
        (tmp_path / "empty", "holds no|nothing|no image|no file"),
        (tmp_path / "no", "not a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            night_here(make_config(place, bundles["shifted"], **{"labelled.uri": str(uri)}))
    with pytest.raises(ConfigError, match="has no reference masks"):
        night_here(make_config(place, bundles["shifted"], **{"labelled.uri": str(phantoms)}))
    assert runs.open_runs(out_of(place)) == []


def test_renamed_shards_are_no_lost_archive(phantoms, bundles, night_here, tmp_path, config):
    """Cases that are in another shard by now are compared with themselves."""
    from pipeline.formats import open_source
    from pipeline.sharding import write_shards

    chosen = config()
    write_shards(
        open_source(str(phantoms), chosen.source, chosen.limits), str(tmp_path / "source"), "tar"
    )
    plain = {f"segment.source.{key}": "" for key in FILES}
    assert night_here(make_config(tmp_path, bundles["good"], **plain)).summary.night == 0
    (shard,) = (tmp_path / "source").glob("*.tar")
    shard.rename(shard.with_name("renamed.tar"))
    outcome = night_here(make_config(tmp_path, bundles["good"], **plain))
    assert outcome.summary.night == 1
    assert outcome.case_states == {
        "new": 0,
        "removed": 0,
        "changed": 0,
        "recomputed": 8,
        "unchanged": 0,
    }
    assert outcome.verdict.limits[1].value == 0


def test_images_that_cannot_be_compared_do_not_count_as_alike(place, bundles, night_here):
    from PIL import Image

    for path in (place / "source").rglob("*.png"):
        picture = Image.open(path)
        picture.resize((72, 64), Image.Resampling.NEAREST).save(path)
    outcome = night_here(make_config(place, bundles["good"]))
    assert outcome.refused
    assert any("not comparable" in limit.note for limit in outcome.verdict.failed)


def test_vacuum_mends_what_it_keeps_track_in(place):
    out = out_of(place)
    for text in ("x", '{"night": null}', '{"night": 999}'):
        Path(out, "_runs", "oldest_kept_night.json").write_text(text)
        upkeep.collect(out, upkeep.find_waste(out, KeepConfig()))
        assert results.oldest_kept_night(out) == 0


def test_a_proof_needs_something_that_was_proved(place):
    out = out_of(place)
    shutil.rmtree(place / "source" / "phantom_0003")
    for path in (place / "source").rglob("*.png"):
        path.write_bytes(b"junk")
    proof = verify_results(out, None, sample=5, checksums=False)
    assert not proof.holds
    assert "not one mask could be computed again" in proof.sentence
    os.unlink(Path(out) / "_seals" / f"{0:020d}.json")
    proof = verify_results(out, None, sample=0, checksums=True)
    assert not proof.holds
    assert "night 0 have no digests" in proof.sentence
