"""The index, the split and the order: whose turn each slice is, under whatever comes and goes."""

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.bundle import load_bundle
from pipeline.cases import decode_case
from pipeline.config import InferenceConfig, SamplingConfig, SplitConfig
from pipeline.dataset import (
    IndexJob,
    SlicePool,
    count_index,
    draw_epoch,
    foreground_weights,
    index_cases,
    indexed_cases,
    open_sandbox,
    patient_of,
    rank_positions,
    rank_share,
    read_ready,
    split_patients,
    steps_per_epoch,
)
from pipeline.errors import ConfigError
from pipeline.formats import FORMATS, open_source
from pipeline.inference import Predictor


def pool_of(*lengths: int, foreground: int = 0) -> SlicePool:
    """Cases of so many slices; every third slice has `foreground` pixels."""
    cases = np.repeat(np.arange(len(lengths)), lengths)
    slices = np.concatenate([np.arange(n) for n in lengths])
    return SlicePool(
        case_S=cases.astype(np.int32),
        slice_S=slices.astype(np.int32),
        foreground_S=np.where(slices % 3 == 0, foreground, 0).astype(np.int32),
        case_bytes=np.array(lengths) * 100,
    )


def positions(pool, drawn, world, rank, legs=(), cache=1 << 40, batch=4, seed=0, epoch=0):
    return rank_positions(
        pool,
        drawn,
        legs,
        world=world,
        rank=rank,
        batch_size=batch,
        cache_bytes=cache,
        seed=seed,
        epoch=epoch,
    )


POOL = pool_of(7, 12, 5, 9, 11, 6)


# split


def test_patients_are_told_from_case_ids():
    assert patient_of("TCGA_CS_4941_19960909", "{patient}_*") == "TCGA_CS_4941"
    assert patient_of("site1/p7/scan2", "*/{patient}/*") == "p7"
    assert patient_of("whole", "{patient}") == "whole"
    with pytest.raises(ConfigError, match="does not fit the case id 'nodash'"):
        patient_of("nodash", "{patient}-*")


def test_new_patients_move_nobody():
    config = SplitConfig(validation=0.2, test=0.1)
    names = [f"p{n}" for n in range(300)]
    before = split_patients(names[:200], config, seed=3)
    after = split_patients(names, config, seed=3)
    assert all(after[name] == part for name, part in before.items())
    shares = Counter(after.values())
    assert 0.12 < shares["validation"] / 300 < 0.28
    assert 0.05 < shares["test"] / 300 < 0.16
    assert split_patients(names, config, seed=4) != after


def test_each_patient_validates_in_exactly_one_fold():
    names = [f"p{n}" for n in range(60)]
    seen = Counter()
    for fold in range(5):
        parts = split_patients(names, SplitConfig(folds=5, fold=fold, test=0.2), seed=0)
        seen.update(name for name, part in parts.items() if part == "validation")
        held = {name for name, part in parts.items() if part == "test"}
    assert set(seen.values()) == {1}
    assert set(seen) | held == set(names)
    assert not set(seen) & held


def test_named_patients_replace_the_shares():
    names = [f"p{n}" for n in range(20)]
    config = SplitConfig(validation_patients=("p3", "p4"), test_patients=("p5",))
    parts = split_patients(names, config, seed=0)
    assert {n for n, part in parts.items() if part == "validation"} == {"p3", "p4"}
    assert {n for n, part in parts.items() if part == "test"} == {"p5"}
    with pytest.raises(ConfigError, match="'nobody' is not in the source"):
        split_patients(names, SplitConfig(validation_patients=("nobody",)), seed=0)


# order


def test_an_epoch_has_each_slice_once_but_for_the_rest_of_a_batch():
    drawn = draw_epoch(POOL, SamplingConfig(), 4, seed=0, epoch=0)
    assert len(drawn) == 48 == 4 * steps_per_epoch(POOL, SamplingConfig(), 4)
    assert len(set(drawn.tolist())) == 48
    assert not np.array_equal(drawn, draw_epoch(POOL, SamplingConfig(), 4, seed=0, epoch=1))
    assert np.array_equal(drawn, draw_epoch(POOL, SamplingConfig(), 4, seed=0, epoch=0))


def test_more_slices_than_there_are_come_round_again():
    config = SamplingConfig(slices_per_epoch=120)
    counts = Counter(draw_epoch(POOL, config, 4, seed=0, epoch=0).tolist())
    assert set(counts.values()) <= {2, 3}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_workers_share_an_epoch_without_rest_and_whole_cases(world):
    drawn = draw_epoch(POOL, SamplingConfig(), 4, seed=0, epoch=2)
    parts = [positions(POOL, drawn, world, rank) for rank in range(world)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(48))
    for rank, part in enumerate(parts):
        assert len(part) == 12 * rank_share(4, world, rank)
    readers = Counter(
        case for part in parts for case in np.unique(POOL.case_S[drawn[part]]).tolist()
    )
    assert sum(readers.values()) <= len(POOL.case_bytes) + world - 1


def test_a_worker_has_the_same_cases_every_epoch():
    cases = []
    for epoch in range(3):
        drawn = draw_epoch(POOL, SamplingConfig(), 4, seed=0, epoch=epoch)
        cases.append(set(POOL.case_S[drawn[positions(POOL, drawn, 2, 0, epoch=epoch)]].tolist()))
    assert all(len(cases[0] ^ other) <= 2 for other in cases[1:])


@pytest.mark.parametrize("legs", [[(2, 3)], [(2, 3), (4, 2)], [(1, 1), (3, 4), (2, 1)]])
def test_what_workers_of_other_numbers_did_is_not_done_again(legs):
    drawn = draw_epoch(POOL, SamplingConfig(), 4, seed=0, epoch=0)
    done: list[int] = []
    for number, (world, steps) in enumerate(legs):
        for rank in range(world):
            mine = positions(POOL, drawn, world, rank, legs[:number])
            done += mine[: steps * rank_share(4, world, rank)].tolist()
    rest = [p for rank in range(2) for p in positions(POOL, drawn, 2, rank, legs).tolist()]
    assert sorted(done + rest) == list(range(48))
    assert len(rest) == 48 - 4 * sum(steps for _, steps in legs)


def test_slices_are_shuffled_among_as_many_cases_as_fit_the_memory():
    drawn = draw_epoch(POOL, SamplingConfig(), 4, seed=0, epoch=0)
    order = POOL.case_S[drawn[positions(POOL, drawn, 1, 0, cache=2100)]]
    blocks, runs = [], [order[0]]
    for case in order:
        if case != runs[-1]:
            runs.append(case)
    last_seen = {case: max(np.flatnonzero(order == case)) for case in set(order.tolist())}
    first_seen = {case: min(np.flatnonzero(order == case)) for case in set(order.tolist())}
    for place in range(len(order)):
        open_cases = [c for c in first_seen if first_seen[c] <= place <= last_seen[c]]
        blocks.append(sum(int(POOL.case_bytes[c]) for c in open_cases))
    assert max(blocks) <= 2100
    assert len(runs) > len(last_seen), "slices of cases in one block are not mixed"


def test_too_small_a_source_says_what_to_do():
    with pytest.raises(ConfigError, match=r"epoch of 50 slices is smaller than one batch of 64"):
        steps_per_epoch(POOL, SamplingConfig(), 64)


def test_foreground_weights_are_the_published_ones():
    pool = pool_of(3, 2, foreground=0)
    pool.foreground_S[:] = [10, 0, 20, 0, 0]
    weights = foreground_weights(pool)
    first = np.array([10 + 0.1 * 10, 0 + 0.1 * 10, 20 + 0.1 * 10]) / (1.1 * 30)
    assert weights[:3] == pytest.approx(first / 2)
    assert weights[3:] == pytest.approx([0.25, 0.25])
    drawn = draw_epoch(pool, SamplingConfig(by="foreground", slices_per_epoch=20_000), 4, 0, 0)
    assert np.bincount(drawn) / len(drawn) == pytest.approx(weights, abs=0.01)


# index


@pytest.fixture
def indexed(own_phantoms, demo_bundle, config):
    """Source, job and all cases of the phantoms."""
    settings = config()
    source = open_source(str(own_phantoms), settings.source, settings.limits)
    bundle = load_bundle(demo_bundle)
    job = IndexJob(source=source, recipe=bundle.recipe, num_labels=1, channels=1)
    listing = FORMATS["folder"].list_shards(source)
    return job, [(s.path, list(s.cases)) for s in listing.shards], bundle


def test_training_and_inference_see_the_same_tensor_bit_for_bit(indexed):
    job, groups, bundle = indexed
    predictor = Predictor(bundle, InferenceConfig(), "cpu")
    path, (ref, *_) = groups[0]
    with open_sandbox(job.source.limits) as sandbox:
        ready = read_ready(job, path, ref, sandbox)
        (encoded,) = FORMATS["folder"].read_cases(job.source, path, [ref])
        decoded = decode_case(encoded, sandbox, job.source.config, 1, max_pixels=1 << 30)
    prepared = predictor.prepare(decoded.volume_ZHWC)
    training = torch.from_numpy(ready.ready_ZHWC).permute(0, 3, 1, 2)
    assert torch.equal(training, prepared.images_ZCHW)
    assert ready.trace == prepared.trace


def test_the_index_counts_lesions_and_names_what_is_bad(indexed, own_phantoms):
    job, _, _ = indexed
    (own_phantoms / "phantom_0000" / "phantom_0000_2.png").write_bytes(b"rubbish")
    (own_phantoms / "phantom_0001" / "phantom_0001_3_mask.png").unlink()
    listing = FORMATS["folder"].list_shards(job.source)
    tables = [index_cases(job, shard.path, shard.cases) for shard in listing.shards]
    rows = {row["case_id"]: row for table in tables for row in table.to_pylist()}
    assert len(rows["phantom_0000"]["foreground"]) == 5
    assert rows["phantom_0001"]["foreground"][2] == -1
    from PIL import Image

    mask = np.asarray(Image.open(own_phantoms / "phantom_0002" / "phantom_0002_4_mask.png"))
    assert rows["phantom_0002"]["foreground"][3] == (mask > 0).sum()
    import pyarrow as pa

    counts = count_index(pa.concat_tables(tables), 1)
    assert counts.bad_by_class == {"MissingMask": 1, "NotAnImage": 1}
    assert counts.num_images == 48
    assert counts.num_labelled == 46
    cases = indexed_cases(pa.concat_tables(tables))
    assert [case.case_id for case in cases] == [f"phantom_{n:04d}" for n in range(8)]
