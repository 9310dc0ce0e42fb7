"""Where a run's time went, stage by stage, and what would make it faster.

The seconds of a stage are those of all its workers together. An actor's own time is that of its
network (with the recipe), that in which it waits for a decoded case (`wait`), and that in which it
has no shard (`idle`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.records import Receipt

STAGES = ("list", "read", "decode", "preprocess", "predict", "finish", "write")
_BYTES_OF = {"read": "encoded", "decode": "pixels", "write": "written"}
_BUSY_ENOUGH = 0.85
_SHORTEST_S = 30.0
"""Of an actor's time, before anything is said about it: a short run is all beginning and end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Who computed: actors that hold the network, decoder processes beside each."""

    num_actors: int
    decoders: int
    have_gpus: bool

    @property
    def name(self) -> str:
        """What an actor is to its users."""
        return "GPU" if self.have_gpus else "actor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """A run's stages: seconds of all workers, bytes where a stage moves them, and advice.

    busy_share: of the actors' time, what their networks computed; None where nothing was computed.
    """

    seconds: Mapping[str, float]
    num_bytes: Mapping[str, int]
    wait_s: float
    idle_s: float
    busy_share: float | None
    advice: str


def worked_s(receipt: Receipt) -> float:
    """What the stages of one shard took, without what its actor waited."""
    return sum(receipt.seconds.get(stage, 0.0) for stage in STAGES)


def add_up(receipts: Iterable[Receipt]) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and bytes of receipts, each by its name."""
    seconds: dict[str, float] = {}
    num_bytes: dict[str, int] = {}
    for receipt in receipts:
        for name, value in receipt.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
        for name, size in receipt.num_bytes.items():
            num_bytes[name] = num_bytes.get(name, 0) + size
    return seconds, num_bytes


def measure(
    receipts: Iterable[Receipt], list_s: float, workers: Workers | None, num_shards: int
) -> Balance:
    """The balance of a run from its receipts. workers None: nothing was computed this time."""
    seconds, sizes = add_up(receipts)
    wait_s, idle_s = seconds.pop("wait", 0.0), seconds.pop("idle", 0.0)
    seconds["list"] = list_s
    busy_s = seconds.get("preprocess", 0.0) + seconds.get("predict", 0.0)
    total_s = busy_s + wait_s + idle_s
    advice = ""
    if workers is not None and total_s >= _SHORTEST_S * workers.num_actors:
        advice = advise(seconds, wait_s, idle_s, workers, num_shards)
    return Balance(
        seconds={stage: round(seconds[stage], 3) for stage in STAGES if stage in seconds},
        num_bytes={stage: sizes.get(name, 0) for stage, name in _BYTES_OF.items()},
        wait_s=round(wait_s, 3),
        idle_s=round(idle_s, 3),
        busy_share=busy_s / total_s if total_s else None,
        advice=advice,
    )


def advise(
    seconds: Mapping[str, float],
    wait_s: float,
    idle_s: float,
    workers: Workers,
    num_shards: int,
) -> str:
    """What holds the run up, and what would help, in one sentence.

    Decoding runs beside the network. With `d` decoder processes an actor needs the longer of
    network and decoding / d for its shards, and what it waits for them; from that follows how many
    decoders it takes to be faster by a factor.
    """
    busy_s = seconds.get("preprocess", 0.0) + seconds.get("predict", 0.0)
    total_s = busy_s + wait_s + idle_s
    share = busy_s / total_s
    if share >= _BUSY_ENOUGH:
        return (
            f"network-bound: the {workers.name}s computed {share:.0%} of their time, so only more or "
            f"faster {workers.name}s would help"
        )
    if wait_s >= idle_s:
        return _more_decoders(seconds.get("decode", 0.0), busy_s, idle_s, total_s, workers)
    if num_shards < 3 * workers.num_actors:
        return (
            f"short of shards: {num_shards} for {workers.num_actors} {workers.name}s, which had none "
            f"{idle_s / total_s:.0%} of their time; smaller shards would share the work out better"
        )
    reading = seconds.get("read", 0.0)
    finishing = seconds.get("finish", 0.0) + seconds.get("write", 0.0)
    gain = min(2.0, total_s / (busy_s + wait_s))
    stage, what = ("read", "reading") if reading >= finishing else ("finish", "finishing")
    return (
        f"{stage}-bound: the {workers.name}s had no shard {idle_s / total_s:.0%} of their time; more "
        f"CPUs for {what} would {_gain_in_words(gain)}"
    )


def _more_decoders(
    decode_s: float, busy_s: float, idle_s: float, total_s: float, workers: Workers
) -> str:
    gain = min(2.0, total_s / (busy_s + idle_s))
    # idle + decode / d = total / gain
    wanted = math.ceil(decode_s / max(total_s / gain - idle_s, 1e-9))
    more = max(1, wanted - workers.decoders)
    return (
        f"decode-bound: {more} more CPU{'s' * (more > 1)} per {workers.name} (resources.decoders = "
        f"{workers.decoders + more}) would {_gain_in_words(gain)}"
    )


def _gain_in_words(gain: float) -> str:
    return "double throughput" if gain >= 1.95 else f"raise throughput by {gain - 1:.0%}"
