"""The commit protocol on a real store: what a reader sees after everything that can go wrong."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from pipeline import delta, results, runs, storage, tables
from pipeline.errors import (
    CommitConflict,
    ConfigError,
    ResultsError,
    SourceError,
    TooManyBadImages,
    VerificationError,
)


@pytest.fixture
def night(own_phantoms, tmp_path, demo_bundle, config, segment_here):
    """A source, its results with one published night, and a function that runs the next one."""

    class Night:
        source, out, bundle = own_phantoms, str(tmp_path / "results"), demo_bundle

        def run(self, **options):
            chosen = options.pop("config", config())
            return segment_here(str(self.source), self.out, self.bundle, chosen, **options)

        def change(self, index=0):
            path = self.source / f"phantom_{index:04d}" / f"phantom_{index:04d}_2.png"
            shutil.copy(self.source / "phantom_0007" / "phantom_0007_1.png", path)

    opened = Night()
    opened.first = opened.run()
    return opened


def test_a_night_counts_and_reads_back(night, read_rows):
    assert night.first.published
    assert night.first.night == 0
    assert night.first.counts["cases"]["new"] == 8
    masks = read_rows(night.out, "masks")
    assert len(masks) == 48
    assert len({row["image_id"] for row in masks}) == 48
    opened = results.open_night(night.out)
    for table in tables.TABLES:
        delta = DeltaTable(f"{night.out}/{table}")
        assert sorted(os.path.basename(u) for u in delta.file_uris()) == sorted(
            os.path.basename(p) for p in opened.paths(table)
        )


def test_the_log_of_a_run_is_kept_with_it_and_names_no_patient(night):
    text = storage.read(runs.run_uri(night.out, night.first.run_id, "log.jsonl")).decode()
    events = [json.loads(line) for line in text.splitlines()]
    assert [e["event"] for e in events][:2] == ["start", "compute"]
    assert events[-1]["event"] == "published"
    assert sum(e.get("images", 0) for e in events if e["event"] == "shard") == 48
    assert "phantom" not in text


def test_bad_images_are_in_the_log_by_number_and_can_be_found_by_it(night, monkeypatch, capsys):
    monkeypatch.setenv("RESEG_LOG", "json")
    (night.source / "phantom_0001" / "phantom_0001_2.png").write_bytes(b"no image")
    done = night.run()
    text = storage.read(runs.run_uri(night.out, done.run_id, "log.jsonl")).decode()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert told == text.splitlines(), "the lines are also on standard error"
    (bad,) = [e for e in map(json.loads, told) if e["event"] == "bad image"]
    masks = results.read_table(results.open_night(night.out), "masks").to_pylist()
    (row,) = [r for r in masks if r["error_class"]]
    assert (bad["shard"], bad["case"], bad["slice"], bad["error_class"]) == (
        row["shard_id"],
        row["case_index"],
        row["slice_index"],
        "NotAnImage",
    )
    assert row["image_id"] == "phantom_0001/2"
    assert "phantom" not in text


def test_nothing_changed_computes_and_writes_nothing(night):
    before = sorted(p for _, _, files in os.walk(night.out) for p in files)
    again = night.run()
    assert (again.published, again.night, again.computed_images) == (False, 0, 0)
    assert again.counts["cases"]["unchanged"] == 8
    assert before == sorted(p for _, _, files in os.walk(night.out) for p in files)


def test_a_changed_image_recomputes_its_case_and_copies_its_neighbours(night, read_rows):
    before = {row["image_id"]: row for row in read_rows(night.out, "masks")}
    night.change(0)
    second = night.run()
    assert (second.night, second.computed_images) == (1, 6)
    assert second.counts["cases"] == {
        "new": 0,
        "changed": 1,
        "stale": 0,
        "removed": 0,
        "unchanged": 7,
        "bad": 0,
    }
    after = {row["image_id"]: row for row in read_rows(night.out, "masks")}
    assert set(before) == set(after)
    for image_id, row in after.items():
        if not image_id.startswith("phantom_0000"):
            assert row == before[image_id]
    assert night.run().computed_images == 0
    assert {r["image_id"]: r for r in read_rows(night.out, "masks", 0)} == before


def test_touched_files_are_hashed_and_not_computed(night):
    for path in night.source.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert night.run().computed_images == 0


def test_new_and_removed_cases(night, read_rows):
    shutil.rmtree(night.source / "phantom_0003")
    shutil.copytree(night.source / "phantom_0002", night.source / "extra")
    for path in (night.source / "extra").iterdir():
        path.rename(path.with_name(path.name.replace("phantom_0002", "extra")))
    second = night.run()
    assert second.counts["cases"]["new"] == 1
    assert second.counts["cases"]["removed"] == 1
    assert second.computed_images == 6
    for table in tables.TABLES:
        ids = {row["case_id"] for row in read_rows(night.out, table)}
        assert "extra" in ids
        assert "phantom_0003" not in ids


def test_another_bundle_or_setting_makes_everything_stale(night, config):
    second = night.run(config=config(inference__tta=True))
    assert second.counts["cases"]["stale"] == 8
    assert second.computed_images == 48
    third = night.run(config=config(inference__tta=True, inference__batch_size=3))
    assert third.computed_images == 0


def test_a_changed_reference_is_measured_again(night, read_rows):
    shutil.copy(
        night.source / "phantom_0001" / "phantom_0001_1_mask.png",
        night.source / "phantom_0000" / "phantom_0000_3_mask.png",
    )
    assert night.run().counts["cases"]["changed"] == 1


def test_the_same_run_again_publishes_once(night):
    night.change()
    second = night.run(run_id="r2")
    assert second.night == 1
    third = night.run(run_id="r2")
    assert third.night == 1
    assert third.computed_images == 0
    assert results.latest_night_number(night.out) == 1


def test_a_lost_answer_of_the_commit_publishes_once(night, monkeypatch):
    """The commit lands, its answer does not: what a dropped connection looks like."""
    night.change()
    real = DeltaTable.create_write_transaction
    lost = []

    def commit(self, *arguments, **options):
        real(self, *arguments, **options)
        lost.append(self.table_uri)
        raise OSError("connection reset")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", commit)
    assert night.run().night == 1
    assert len(lost) == 3
    monkeypatch.undo()
    assert night.run().computed_images == 0
    assert results.latest_night_number(night.out) == 1


@pytest.mark.parametrize("table", ["metrics", "cases", "masks"])
def test_a_commit_that_fails_is_finished_by_the_same_command(night, monkeypatch, table, read_rows):
    night.change()
    real = results._commit
    before = read_rows(night.out, "masks")

    def crash(results_uri, name, *arguments):
        if name == table:
            raise KeyboardInterrupt
        return real(results_uri, name, *arguments)

    monkeypatch.setattr(results, "_commit", crash)
    with pytest.raises(KeyboardInterrupt):
        night.run()
    assert read_rows(night.out, "masks") == before
    monkeypatch.undo()
    finished = night.run()
    assert (finished.resumed, finished.night) == (True, 1)
    opened = results.open_night(night.out)
    assert {s.num_images for s in opened.shards.values()}
    assert len(read_rows(night.out, "metrics")) == len(read_rows(night.out, "masks")) == 48


def test_what_an_abandoned_run_committed_to_the_side_is_taken_back(night, monkeypatch, read_rows):
    night.change(0)
    real = results._commit

    def crash(results_uri, name, *arguments):
        if name == "masks":
            raise KeyboardInterrupt
        return real(results_uri, name, *arguments)

    monkeypatch.setattr(results, "_commit", crash)
    with pytest.raises(KeyboardInterrupt):
        night.run()
    monkeypatch.undo()
    night.change(1)
    second = night.run()
    assert second.resumed is False
    assert second.night == 1
    metrics = read_rows(night.out, "metrics")
    assert len(metrics) == 48
    assert len({row["image_id"] for row in metrics}) == 48
    latest = DeltaTable(f"{night.out}/metrics").to_pyarrow_table()
    assert latest.num_rows == 48


def test_two_runs_planned_on_the_same_night_do_not_mix(night, monkeypatch, read_rows):
    """Another run publishes while ours computes: ours is refused, and says so."""
    night.change(0)
    from pipeline.flows import segment

    real = segment._compute

    def slow(plan, *arguments):
        receipts = real(plan, *arguments)
        monkeypatch.setattr(segment, "_compute", real)
        night.change(1)
        assert night.run(run_id="fast").night == 1
        return receipts

    monkeypatch.setattr(segment, "_compute", slow)
    with pytest.raises(CommitConflict, match="another run has published since"):
        night.run(run_id="slow")
    assert results.latest_night_number(night.out) == 1
    assert len(read_rows(night.out, "masks")) == 48
    assert night.run().computed_images == 0


def test_receipts_of_an_interrupted_run_are_used(night, monkeypatch):
    for index in range(4):
        night.change(index)
    real, filed = runs.put_receipt, []

    def crash(*arguments):
        if len(filed) == 2:
            raise KeyboardInterrupt
        filed.append(real(*arguments))
        return filed[-1]

    monkeypatch.setattr(runs, "put_receipt", crash)
    with pytest.raises(KeyboardInterrupt):
        night.run()
    monkeypatch.undo()
    night.change(6)
    second = night.run()
    assert second.published
    assert second.counts["cases"]["changed"] == 5
    computed_by = {
        row["run_id"]
        for row in results.read_table(results.open_night(night.out), "masks").to_pylist()
    }
    assert len(computed_by) == 3


def test_another_bundle_under_the_same_run_is_refused(night, tmp_path, monkeypatch, config):
    night.change()
    from pipeline.flows import segment

    monkeypatch.setattr(
        segment, "publish_staged", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        night.run(run_id="r")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="another configuration"):
        night.run(run_id="r", config=config(inference__tta=True))
    other = shutil.copytree(night.bundle, tmp_path / "other")
    text = (other / "bundle.json").read_text().replace('"demo-phantom"', '"renamed"')
    (other / "bundle.json").write_text(text)
    night.bundle, kept = str(other), night.bundle
    with pytest.raises(ConfigError, match="was planned with the bundle"):
        night.run(run_id="r")
    night.bundle = kept
    assert night.run(run_id="r").night == 1


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_parts_that_are_not_as_received_are_not_published(night, monkeypatch, damage):
    night.change()
    from pipeline.flows import segment

    real = runs.verify_receipts

    def break_one(out, plan, receipts):
        part = next(iter(receipts.values())).masks.path
        path = os.path.join(out, "masks", part)
        if damage == "missing":
            os.unlink(path)
        else:
            with open(path, "r+b") as file:
                file.seek(900)
                byte = file.read(1)
                file.seek(900)
                file.write(bytes([byte[0] ^ 4]))
        return real(out, plan, receipts)

    monkeypatch.setattr(segment.runs, "verify_receipts", break_one)
    with pytest.raises(VerificationError, match="not there|digest"):
        night.run()
    assert results.latest_night_number(night.out) == 0


def test_no_flipped_bit_of_a_part_reads_silently_wrong(night):
    path = results.open_night(night.out).paths("masks")[0]
    name = os.path.basename(path)
    with open(path, "rb") as file:
        whole = file.read()
    expected = tables.read_part(night.out, "masks", name)
    noticed = 0
    positions = range(0, len(whole), max(1, len(whole) // 600))
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 32
        with open(path, "wb") as file:
            file.write(damaged)
        try:
            assert tables.read_part(night.out, "masks", name) == expected, position
        except ResultsError:
            noticed += 1
    assert noticed > len(positions) / 2, "the rest is in parts of the file that no reader uses"


def test_a_renamed_column_in_the_footer_of_a_part_is_damage(night):
    path = results.open_night(night.out).paths("masks")[0]
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(whole.replace(b"error_class", b"Error_class"))
    assert "error_class" not in pq.ParquetFile(path).schema_arrow.names
    with pytest.raises(ResultsError, match="footer is not as it was written"):
        tables.read_part(night.out, "masks", os.path.basename(path))


def test_a_part_with_a_long_footer_is_read(tmp_path):
    rows = pa.table({"shard_id": ["a" * 64] * 3, "shard_version": ["v"] * 3})
    rows = rows.append_column("bundle_digest", pa.array(["b"] * 3))
    rows = rows.append_column("config_digest", pa.array(["c"] * 3))
    for index in range(700):
        rows = rows.append_column(f"column_{index}", pa.array([index] * 3))
    part = tables.write_part(str(tmp_path), "cases", rows, "a" * 64, "run")
    assert pq.ParquetFile(tmp_path / "cases" / part.path).metadata.serialized_size > 64 << 10
    assert tables.read_part(str(tmp_path), "cases", part.path) == rows


def test_parts_have_checksums_and_statistics(night):
    opened = results.open_night(night.out)
    delta = DeltaTable(f"{night.out}/masks")
    assert sum(s.num_images for s in opened.shards.values()) == 48
    assert sum(s.num_cases for s in opened.shards.values()) == 8
    assert delta.metadata().partition_columns == []
    assert (
        pq.ParquetFile(opened.paths("masks")[0]).metadata.row_group(0).column(16).compression
        == "ZSTD"
    )


def test_too_many_bad_images_are_not_published_and_can_be_allowed(night, config):
    for index in range(6):
        (night.source / f"phantom_000{index}" / f"phantom_000{index}_1.png").write_bytes(b"junk")
    with pytest.raises(TooManyBadImages, match="6 of 48 images are bad .*6 NotAnImage"):
        night.run()
    assert results.latest_night_number(night.out) == 0
    allowed = night.run(config=config(max_bad_share=0.5))
    assert (allowed.night, allowed.resumed) == (1, True)
    assert allowed.counts["images"]["bad"] == allowed.counts["cases"]["bad"] == 6
    assert allowed.bad_by_class == {"NotAnImage": 6}
    again = night.run(config=config(max_bad_share=0.5))
    assert again.counts["images"]["bad"] == again.counts["cases"]["bad"] == 6
    assert again.counts["cases"]["unchanged"] == 8
    shutil.copy(
        night.source / "phantom_0007" / "phantom_0007_1.png",
        night.source / "phantom_0000" / "phantom_0000_1.png",
    )
    healed = night.run(config=config(max_bad_share=0.5))
    assert healed.counts["images"]["bad"] == healed.counts["cases"]["bad"] == 5
    assert healed.computed_images == 6


def test_results_keep_to_their_source(night, tmp_path, config, segment_here):
    other = shutil.copytree(night.source, tmp_path / "elsewhere")
    with pytest.raises(ResultsError, match="use another results folder"):
        segment_here(str(other), night.out, night.bundle, config())
    with pytest.raises(ConfigError, match="inside the source"):
        segment_here(str(night.source), str(night.source / "out"), night.bundle, config())
    for path in night.source.rglob("*.png"):
        path.unlink()
    with pytest.raises(SourceError, match="holds no image"):
        night.run()
    assert results.latest_night_number(night.out) == 0


def test_old_nights_stay_readable_and_unknown_ones_are_refused(night, read_rows):
    first = {table: read_rows(night.out, table) for table in tables.TABLES}
    night.change()
    night.run()
    for table, rows in first.items():
        assert read_rows(night.out, table, 0) == rows
        assert read_rows(night.out, table) != rows
    with pytest.raises(ResultsError, match="no night 7"):
        results.open_night(night.out, 7)
    numbers = [entry["night"] for entry in results.history(night.out)]
    assert numbers == [1, 0]


def test_limit_takes_some_cases_and_the_rest_later(
    own_phantoms, tmp_path, demo_bundle, config, segment_here
):
    out = str(tmp_path / "r")
    first = segment_here(str(own_phantoms), out, demo_bundle, config(), limit=3)
    assert first.counts["cases"]["new"] == 3
    second = segment_here(str(own_phantoms), out, demo_bundle, config())
    assert second.counts["cases"]["new"] == 5
    assert second.counts["cases"]["unchanged"] == 3
    assert second.computed_images == 30


def test_old_nights_outlive_the_hundredth_commit(tmp_path):
    """Delta writes a checkpoint then, and by default forgets what is older than 30 days."""
    from deltalake import CommitProperties, Schema
    from deltalake.transaction import AddAction, create_table_with_add_actions

    uri = str(tmp_path / "masks")
    schema = Schema.from_arrow(tables.table_schema("masks"))
    create_table_with_add_actions(uri, schema, [], configuration=delta._TABLE_CONFIGURATION)
    for number in range(105):
        for name in os.listdir(f"{uri}/_delta_log"):
            os.utime(f"{uri}/_delta_log/{name}", (1, 1))
        part = AddAction(f"{number}.parquet", 1, {}, 0, True, '{"numRecords": 0}')
        DeltaTable(uri).create_write_transaction(
            [part], "append", schema, commit_properties=CommitProperties()
        )
    assert len(DeltaTable(uri, version=3).file_uris()) == 3
    assert len(DeltaTable(uri).history()) == 106


def test_a_passing_outage_does_not_stay_in_the_run(night, monkeypatch, config):
    from pipeline.formats import source as reading

    night.change(0)
    hidden = reading.storage.file_info

    def gone(uri):
        return None if uri.startswith(str(night.source)) else hidden(uri)

    monkeypatch.setattr(reading.storage, "file_info", gone)
    with pytest.raises(TooManyBadImages, match="6 ChangedDuringRun"):
        night.run(config=config(max_bad_share=0.01))
    monkeypatch.undo()
    again = night.run(config=config(max_bad_share=0.01))
    assert (again.resumed, again.night) == (True, 1)
    assert again.counts["images"]["bad"] == 0


@pytest.mark.parametrize("damage", ["missing", "flipped", "receipt"])
def test_what_was_lost_of_a_stopped_run_is_computed_again(night, monkeypatch, damage):
    night.change(0)
    from pipeline.flows import segment

    monkeypatch.setattr(
        segment, "publish_staged", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        night.run()
    monkeypatch.undo()
    published = set(results.open_night(night.out).paths("masks"))
    folder = os.path.join(night.out, "masks")
    (staged,) = {os.path.join(folder, n) for n in os.listdir(folder) if n.endswith("t")} - published
    if damage == "missing":
        os.unlink(staged)
    elif damage == "receipt":
        (run_id,) = runs.open_runs(night.out)
        folder = os.path.join(night.out, "_runs", run_id, "receipts")
        for name in os.listdir(folder):
            storage.write(os.path.join(folder, name), b'{"shard_id": "x"}')
    else:
        size = os.path.getsize(staged)
        with open(staged, "r+b") as file:
            file.write(b"\0" * size)
        with pytest.raises(VerificationError, match="computes them again"):
            night.run()
    assert night.run().night == 1
    assert night.run().computed_images == 0


def test_a_run_of_another_source_is_not_finished(night, tmp_path, config, segment_here):
    night.change(0)
    night.run(run_id="r")
    with pytest.raises(ConfigError, match="run r is of the source"):
        segment_here(str(tmp_path / "none"), night.out, night.bundle, config(), run_id="r")


def test_naming_the_detected_format_computes_nothing(night, config):
    assert night.run(config=config(source__format="folder")).computed_images == 0


def test_an_unreadable_reference_keeps_the_prediction(night, read_rows, config):
    path = night.source / "phantom_0002" / "phantom_0002_2_mask.png"
    path.unlink()
    path.symlink_to("nowhere")
    night.run(config=config(max_bad_share=0.5))
    (row,) = [r for r in read_rows(night.out, "masks") if r["image_id"] == "phantom_0002/2"]
    assert (row["status"], row["error_class"]) == ("bad_reference", "BadMask")
    assert row["mask"] is not None


def test_names_that_are_not_utf8_are_published(
    tmp_path, demo_bundle, config, segment_here, read_digests
):
    from pipeline.synthetic import encode_png, make_phantom

    data = encode_png(make_phantom(0).volume_ZHW[5])
    (tmp_path / "source").mkdir()
    for name in (b"a\xff.png", b"b.png"):
        with open(str(tmp_path / "source").encode() + b"/" + name, "wb") as file:
            file.write(data)
    segment_here(str(tmp_path / "source"), str(tmp_path / "r"), demo_bundle, config(patterns=False))
    assert set(read_digests(tmp_path / "r")) == {"a\\xff.png/0", "b.png/0"}


def _write_shard(path, rows):
    import pyarrow as pa

    from pipeline.formats.parquet import CASE_SCHEMA
    from pipeline.synthetic import encode_png, make_phantom

    image = encode_png(make_phantom(0).volume_ZHW[5])
    full = [{"slice_names": ["0"], "images": [image], **row} for row in rows]
    pq.write_table(pa.Table.from_pylist(full, schema=CASE_SCHEMA), path)


def test_a_duplicate_heals_when_its_twin_goes(
    tmp_path, demo_bundle, config, segment_here, read_rows
):
    source = tmp_path / "source"
    source.mkdir()
    arguments = (str(source), str(tmp_path / "r"), demo_bundle, config(False, max_bad_share=1.0))
    _write_shard(source / "s1.parquet", [{"case_id": "a"}, {"case_id": "b"}])
    _write_shard(source / "s2.parquet", [{"case_id": "a"}, {"case_id": "c"}])
    segment_here(*arguments)
    statuses = [row["error_class"] for row in read_rows(tmp_path / "r", "masks")]
    assert sorted(map(str, statuses)) == ["DuplicateKey", "None", "None", "None"]
    assert segment_here(*arguments).computed_images == 0
    _write_shard(source / "s1.parquet", [{"case_id": "b"}])
    segment_here(*arguments)
    found = {row["case_id"]: row["status"] for row in read_rows(tmp_path / "r", "masks")}
    assert found == {"a": "ok", "b": "ok", "c": "ok"}


def test_a_wrong_spacing_costs_its_case(tmp_path, demo_bundle, config, segment_here, read_rows):
    source = tmp_path / "source"
    source.mkdir()
    wrong = [[0.5], [float("nan"), 1.0], [-1.0, 1.0, 1.0], [1.0, None]]
    rows = [{"case_id": f"w{i}", "spacing_mm": s} for i, s in enumerate(wrong)]
    _write_shard(source / "s.parquet", [*rows, {"case_id": "good", "spacing_mm": [3.0, 1.0, 1.0]}])
    segment_here(str(source), str(tmp_path / "r"), demo_bundle, config(False, max_bad_share=1.0))
    found = {row["case_id"]: row["error_class"] for row in read_rows(tmp_path / "r", "masks")}
    assert found.pop("good") is None
    assert set(found.values()) == {"SchemaMismatch"}


def test_bad_rows_that_are_copied_count_once(tmp_path, demo_bundle, config, segment_here):
    from pipeline.synthetic import encode_png, make_phantom

    source = tmp_path / "source"
    source.mkdir()
    for index in range(64):
        (source / f"{index}.png").write_bytes(encode_png(make_phantom(0).volume_ZHW[index % 12]))
    (source / "bad.png").write_bytes(b"junk")
    arguments = (str(source), str(tmp_path / "r"), demo_bundle, config(patterns=False))
    first = segment_here(*arguments)
    assert first.counts["images"]["bad"] == first.counts["cases"]["bad"] == 1
    for index in range(64):
        (source / f"{index}.png").write_bytes(encode_png(make_phantom(1).volume_ZHW[index % 12]))
    second = segment_here(*arguments)
    assert second.computed_images == 64
    assert second.counts["images"]["bad"] == second.counts["cases"]["bad"] == 1
