"""The metrics of a run, and the dashboard that draws them."""

import json
import re
from pathlib import Path

import pytest

import pipeline
from pipeline.flows import monitor
from pipeline.records import Receipt

DASHBOARD = Path(pipeline.__file__).parent / "defaults" / "grafana.json"


@pytest.fixture
def told(monkeypatch):
    """What a monitor told Ray: {(name, tags): value}."""
    import ray.util.metrics

    found: dict[tuple, float] = {}

    class Metric:
        def __init__(self, name, description, tag_keys):
            assert description
            self.name, self.tag_keys = name, tag_keys

        def key(self, tags):
            assert set(tags) == set(self.tag_keys)
            return (self.name, *(value for key, value in sorted(tags.items()) if key != "run"))

        def inc(self, value, tags):
            found[self.key(tags)] = found.get(self.key(tags), 0) + value

        def set(self, value, tags):
            found[self.key(tags)] = value

    monkeypatch.setattr(ray.util.metrics, "Counter", Metric)
    monkeypatch.setattr(ray.util.metrics, "Gauge", Metric)
    return found


def test_receipts_become_counters_and_gauges(told):
    receipt = Receipt(
        shard_id="s",
        work_key="k",
        num_cases=1,
        num_images=6,
        num_bad_cases=1,
        num_bad=1,
        num_computed=6,
        num_to_retry=0,
        masks=None,
        metrics=None,
        cases=None,
        seconds={"read": 1.0, "decode": 2.0, "preprocess": 1.0, "predict": 5.0, "wait": 4.0},
        num_bytes={"encoded": 100, "pixels": 900},
        bad_by_class={"NotAnImage": 1},
    )
    watch = monitor.Monitor("run-1", num_actors=2, num_waiting=5)
    watch.count(receipt)
    watch.count(receipt)
    assert told[("reseg_images",)] == 12
    assert told[("reseg_bad_images", "NotAnImage")] == 2
    assert told[("reseg_bytes", "pixels")] == 1800
    assert told[("reseg_stage_seconds", "decode")] == 4.0
    assert told[("reseg_shards_waiting",)] == 3
    assert told[("reseg_actors",)] == 2
    assert told[("reseg_busy_share",)] == pytest.approx(0.6)


def test_the_dashboard_draws_every_metric_that_there_is_and_no_other():
    """Ray puts `ray_` before a name, and `_total` behind that of a counter."""
    board = json.loads(DASHBOARD.read_text())
    drawn = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            drawn |= set(re.findall(r"ray_\w+", target["expr"]))
    counters = {f"ray_{name}_total" for name in monitor.COUNTERS}
    gauges = {f"ray_{name}" for name in monitor.GAUGES}
    assert drawn - {"ray_node_gpus_utilization"} == counters | gauges
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]  # fmt: skip
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
