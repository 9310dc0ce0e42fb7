"""Sources, shards, bundles and results in a real S3 store (SeaweedFS) on loopback."""

from pathlib import Path

import pytest
from object_store import KEY, SECRET, upload

from pipeline import results, storage
from pipeline.errors import ConfigError, SourceError
from pipeline.formats import open_source
from pipeline.sharding import write_shards


def test_a_file_is_created_once_and_read_by_ranges(bucket):
    uri = storage.join(bucket, "a", "b c.bin")
    assert storage.create(uri, b"0123456789")
    assert not storage.create(uri, b"other")
    assert storage.read(uri) == b"0123456789"
    with storage.open_reader(uri) as file:
        file.seek(8)
        assert file.read(9) == b"89"
    assert [item.path for item in storage.list_files(storage.join(bucket, "a"))] == ["b c.bin"]
    storage.remove(uri)
    storage.remove(uri)
    assert storage.file_info(uri) is None
    with pytest.raises(FileNotFoundError):
        storage.read(uri)


def test_nights_in_object_storage_are_those_on_disk(
    bucket, own_phantoms, tmp_path, demo_bundle, config, segment_here, read_digests, read_rows
):
    chosen = config()
    segment_here(str(own_phantoms), str(tmp_path / "r"), demo_bundle, chosen)
    expected = read_digests(tmp_path / "r")
    upload(own_phantoms, f"{bucket}/images")
    upload(Path(demo_bundle), f"{bucket}/bundle")
    arguments = (f"{bucket}/images", f"{bucket}/results", f"{bucket}/bundle", chosen)
    assert segment_here(*arguments).night == 0
    assert read_digests(f"{bucket}/results") == expected
    assert segment_here(*arguments).computed_images == 0
    name = "phantom_0002/phantom_0002_3.png"
    storage.write(
        f"{bucket}/images/{name}",
        (own_phantoms / "phantom_0001" / "phantom_0001_1.png").read_bytes(),
    )
    second = segment_here(*arguments)
    assert (second.night, second.computed_images) == (1, 6)
    source = open_source(f"{bucket}/images", chosen.source, chosen.limits)
    for kind in ("tar", "parquet"):
        write_shards(source, f"{bucket}/{kind}", kind, shard_bytes=40_000)
        plain = config(patterns=False)
        segment_here(f"{bucket}/{kind}", str(tmp_path / kind), demo_bundle, plain)
        assert read_digests(tmp_path / kind) == read_digests(f"{bucket}/results")
    assert results.open_night(f"{bucket}/results").paths("masks")[0].startswith("s3://")


def test_what_is_not_there_is_told_without_secrets(bucket, demo_bundle, config, segment_here):
    with pytest.raises((SourceError, ConfigError)) as caught:
        segment_here(f"{bucket}-none/x", f"{bucket}/r", demo_bundle, config())
    assert SECRET not in str(caught.value)
    assert KEY not in str(caught.value)


def test_training_in_object_storage_gives_the_weights_of_a_disk(bucket, own_phantoms, tmp_path):
    from pipeline import checkpoint, preparation
    from pipeline.bundle import load_bundle
    from pipeline.config import TrainConfig, load_config
    from pipeline.training import run_worker

    config = load_config(
        TrainConfig,
        options={
            "source.images": "{case}/{case}_{slice}.png",
            "source.masks": "{case}/{case}_{slice}_mask.png",
            "labels": ["lesion"],
            "epochs": 2,
            "batch_size": 8,
            "numerics.dtype": "fp32",
            "model.options": {"width": 4, "depth": 2},
            "split.validation_patients": ["phantom_0007"],
        },
    )
    upload(own_phantoms, f"{bucket}/labelled")
    digests = []
    for source, out in (
        (str(own_phantoms), str(tmp_path / "out")),
        (f"{bucket}/labelled", f"{bucket}/trained"),
    ):
        request = preparation.check_request(source, out, config)
        job = preparation.make_job(request)
        index = preparation.index_here(job.index_job, preparation.shard_groups(request))
        preparation.freeze(request)
        preparation.write_index(out, index)
        result = run_worker(preparation.with_index(job, index), device="cpu")
        digests.append(load_bundle(result["bundle"]).weights_sha256)
    assert digests[0] == digests[1]
    assert len(checkpoint.names(f"{bucket}/trained", "step-")) == 2
    assert preparation.finished_result(f"{bucket}/trained")["steps"] == 10
    with pytest.raises(ConfigError, match="another configuration"):
        preparation.check_request(
            f"{bucket}/labelled",
            f"{bucket}/trained",
            load_config(TrainConfig, options={"labels": ["other"]}),
        )
