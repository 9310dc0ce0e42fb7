"""What a run shows to Prometheus, through Ray's own metrics, while it runs.

The driver counts, from receipts: each shard once, whatever was tried twice. Ray serves the numbers
on the metrics port of the driver's node, with the prefix `ray_`; `defaults/grafana.json` draws them.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from pipeline.balance import add_up
from pipeline.records import Receipt

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "reseg_images": ("Images computed.", ()),
    "reseg_bad_images": ("Images without a good row, by reason.", ("error_class",)),
    "reseg_shards": ("Shards written.", ()),
    "reseg_bytes": ("Bytes, by what they are: encoded, pixels, written.", ("kind",)),
    "reseg_stage_seconds": ("Seconds of all workers, by stage.", ("stage",)),
}
GAUGES: Mapping[str, str] = {
    "reseg_shards_waiting": "Shards that are not written yet.",
    "reseg_actors": "Processes that hold the network.",
    "reseg_busy_share": "Share of the actors' time that their networks computed, of late.",
}
_OF_LATE = 64


class Monitor:
    """The counters of one run; `RUN` is the label `run` of them all."""

    def __init__(self, run_id: str, num_actors: int, num_waiting: int) -> None:
        from ray.util.metrics import Counter, Gauge

        self._run = {"run": run_id}
        self._counters: dict[str, Any] = {
            name: Counter(name, description=text, tag_keys=("run", *tags))
            for name, (text, tags) in COUNTERS.items()
        }
        self._gauges: dict[str, Any] = {
            name: Gauge(name, description=text, tag_keys=("run",)) for name, text in GAUGES.items()
        }
        self._late: deque[Receipt] = deque(maxlen=_OF_LATE)
        self._waiting = num_waiting
        self._set("reseg_actors", num_actors)
        self._set("reseg_shards_waiting", num_waiting)

    def count(self, receipt: Receipt) -> None:
        """Add one shard."""
        self._add("reseg_shards", 1)
        self._add("reseg_images", receipt.num_computed)
        for error_class, number in receipt.bad_by_class.items():
            self._add("reseg_bad_images", number, error_class=error_class)
        for kind, size in receipt.num_bytes.items():
            self._add("reseg_bytes", size, kind=kind)
        for stage, seconds in receipt.seconds.items():
            self._add("reseg_stage_seconds", seconds, stage=stage)
        self._waiting -= 1
        self._set("reseg_shards_waiting", self._waiting)
        self._late.append(receipt)
        seconds_of_late, _ = add_up(self._late)
        self._set("reseg_busy_share", busy_share(seconds_of_late))

    def _add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:
            self._counters[name].inc(value, tags={**self._run, **tags})

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(value, tags=self._run)


def busy_share(seconds: Mapping[str, float]) -> float:
    """Of the actors' time, what their networks computed."""
    busy_s = seconds.get("preprocess", 0.0) + seconds.get("predict", 0.0)
    total_s = busy_s + seconds.get("wait", 0.0) + seconds.get("idle", 0.0)
    return busy_s / total_s if total_s else 0.0
