"""The account of a run's time, and the advice that follows from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.balance import STAGES, Workers, advise, measure
from pipeline.records import Receipt

GPUS = Workers(num_actors=4, decoders=2, have_gpus=True)


def receipt(seconds, num_bytes=None):
    return Receipt(
        shard_id="s",
        work_key="k",
        num_cases=1,
        num_images=1,
        num_bad_cases=0,
        num_bad=0,
        num_computed=1,
        num_to_retry=0,
        masks=None,
        metrics=None,
        cases=None,
        seconds=seconds,
        num_bytes=num_bytes or {},
    )


def test_stages_are_added_up_over_shards():
    one = {"read": 1.0, "decode": 4.0, "preprocess": 1.0, "predict": 3.0, "wait": 0.5, "idle": 0.5}
    sizes = {"encoded": 2_000_000_000, "pixels": 5_000_000_000, "written": 500_000_000}
    found = measure([receipt(one, sizes)] * 2, 7.0, GPUS, 2)
    assert found.seconds == {
        "list": 7.0,
        "read": 2.0,
        "decode": 8.0,
        "preprocess": 2.0,
        "predict": 6.0,
    }
    assert found.busy_share == pytest.approx(0.8)
    assert list(found.seconds) == [stage for stage in STAGES if stage in found.seconds]
    assert found.num_bytes == {
        "read": 4_000_000_000,
        "decode": 10_000_000_000,
        "write": 1_000_000_000,
    }
    assert found.advice == "", "too short a run to say anything"
    longer = measure([receipt(one, sizes)] * 100, 7.0, GPUS, 100)
    assert longer.advice.startswith("decode-bound")


def test_a_run_that_computed_nothing_gives_no_advice():
    found = measure([], 0.2, None, 0)
    assert (found.busy_share, found.advice) == (None, "")


@pytest.mark.parametrize(
    ("seconds", "wait_s", "idle_s", "num_shards", "said"),
    [
        ({"predict": 90.0, "decode": 10.0}, 5.0, 5.0, 99, "network-bound: the GPUs computed 90%"),
        # 2 decoders need 160 / 2 = 80 s for what takes the network 10: half of 80 is 160 / 4
        (
            {"predict": 10.0, "decode": 160.0},
            70.0,
            0.0,
            99,
            "2 more CPUs per GPU (resources.decoders = 4) would double",
        ),
        # the network takes 64 of 80 s: 160 / 64 = 2.5 decoders, and no more than 80 / 64
        (
            {"predict": 64.0, "decode": 160.0},
            16.0,
            0.0,
            99,
            "1 more CPU per GPU (resources.decoders = 3) would raise throughput by 25%",
        ),
        ({"predict": 50.0}, 1.0, 49.0, 5, "short of shards: 5 for 4 GPUs"),
        ({"predict": 50.0, "read": 300.0, "write": 20.0}, 1.0, 49.0, 99, "read-bound"),
        ({"predict": 50.0, "read": 30.0, "write": 200.0}, 1.0, 49.0, 99, "finish-bound"),
    ],
)
def test_the_advice_names_what_holds_the_run_up(seconds, wait_s, idle_s, num_shards, said):
    assert said in advise(seconds, wait_s, idle_s, GPUS, num_shards)


@given(
    network=st.floats(1, 1e4),
    decode=st.floats(1, 1e5),
    have=st.integers(1, 16),
    idle=st.floats(0, 50),
)
def test_the_decoders_that_are_advised_give_what_is_promised(network, decode, have, idle):
    """Against the model itself: network and decoding side by side, the longer one counts."""
    wait = max(0.0, decode / have - network)
    if wait < idle or network / (network + wait + idle) >= 0.85:
        return
    workers = Workers(num_actors=1, decoders=have, have_gpus=True)
    said = advise({"predict": network, "decode": decode}, wait, idle, workers, 99)
    advised = int(said.split("resources.decoders = ")[1].split(")")[0])
    before = network + wait + idle
    after = max(network, decode / advised) + idle
    promised = 2.0 if "double" in said else 1 + int(said.rsplit("by ", 1)[1].rstrip("%")) / 100
    assert before / after >= promised * 0.97
