"""When the last shards of a run are computed a second time; Ray's futures are plain ones here."""

import time
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for_futures

import pytest
import ray

from pipeline.config import ResourceConfig
from pipeline.errors import RunStalled
from pipeline.flows.stragglers import Stragglers
from pipeline.records import Receipt, Work


def work(name):
    return Work(shard_id=name, path=name, format="tar", version="1", size_bytes=1, compute=())


def receipt(name, seconds=0.01):
    counts = dict.fromkeys(
        ("num_cases", "num_images", "num_bad_cases", "num_bad", "num_computed", "num_to_retry"), 0
    )
    parts = {"masks": None, "metrics": None, "cases": None}
    return Receipt(shard_id=name, work_key="", seconds={"predict": seconds}, **counts, **parts)


@pytest.fixture(autouse=True)
def plain_futures(monkeypatch):
    def wait(futures, num_returns=1, timeout=None):
        everything = num_returns == len(futures)
        done, rest = wait_for_futures(
            futures, timeout, "ALL_COMPLETED" if everything else FIRST_COMPLETED
        )
        return [*done], [*rest]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda future: future.result())
    monkeypatch.setattr(ray, "cancel", lambda future, force: future.cancel())


class World:
    """Second attempts that end, or hang, as told; remembers what was asked of it."""

    def __init__(self, names="abcd", hanging_attempts=0, in_flight=2, **resources):
        chosen = {"straggler_factor": 2.0, "straggler_floor_s": 0.3, **resources}
        self.started, self.closed, self.hanging = [], [], hanging_attempts
        self.watch = Stragglers(
            [work(name) for name in names],
            ResourceConfig(**chosen),
            in_flight=in_flight,
            start=self.start,
            close=lambda: self.closed.append(time.monotonic()),
        )

    def start(self, one):
        self.started.append(one.shard_id)
        future = Future()
        if len(self.started) > self.hanging:
            future.set_result(receipt(one.shard_id))
        return future

    def deliver(self, names, seconds=0.01):
        for name in names:
            self.watch.delivered(receipt(name, seconds))

    def wait(self, condition, seconds=10.0):
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        return condition()


def test_the_last_silent_shards_are_computed_again_and_the_stream_is_ended():
    world = World()
    with world.watch:
        world.deliver("abc")
        assert world.wait(lambda: world.closed)
        (late,) = world.watch.rest()
    assert world.started == ["d"]
    assert late.shard_id == "d"
    assert "computed again on another" in late.notes[0]


@pytest.mark.parametrize(
    ("delivered", "seconds", "resources"),
    [
        ("a", 0.01, {}),  # more are missing than can be in work: some only wait
        ("", 0.01, {"in_flight": 4}),  # none is done yet: nobody knows how long one takes
        ("abc", 60.0, {}),  # a shard takes a minute here
        ("abc", 0.01, {"straggler_factor": 0.0}),
    ],
)
def test_patience_otherwise(delivered, seconds, resources):
    world = World(**resources)
    with world.watch:
        world.deliver(delivered, seconds)
        time.sleep(1.2)
        assert not world.started
        assert not [*world.watch.rest()]


def test_a_late_first_attempt_counts_too():
    world = World(hanging_attempts=1)
    with world.watch:
        world.deliver("abc")
        assert world.wait(lambda: world.started)
        world.deliver("d")
        assert not [*world.watch.rest()]


def test_an_attempt_that_hangs_gets_company_and_all_that_hang_end_the_run():
    world = World(hanging_attempts=2)
    with world.watch:
        world.deliver("abc")
        assert world.wait(lambda: world.closed), "the stream is ended, and what it held is free"
        assert [one.shard_id for one in world.watch.rest()] == ["d"]
    assert world.started == ["d", "d", "d"]
    world = World(hanging_attempts=99, stall_timeout_s=2.0)
    with world.watch:
        world.deliver("abc")
        assert world.wait(lambda: world.closed)
        with pytest.raises(RunStalled, match="1 shards hang, and hang again wherever"):
            [*world.watch.rest()]
