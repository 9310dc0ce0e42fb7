"""What a cluster would do: images/s, the bottleneck by name, hours, dollars, for 1 to 1,000 GPUs.

    python benchmarks/scale_model.py measure RESULTS RUN --out costs.json     # from a real run
    python benchmarks/scale_model.py predict costs.json [--images N] [--chart scale.png]

`measure` takes seconds and bytes an image from the log, the plan and the receipts of a run. What
it cannot see (a GPU, the round trips of S3, the dispatch of Ray) is an assumption, and each cost
says in the file where it is from: edit them. Seconds of the network on a GPU are its
floating-point operations over a share of the GPU's peak, as long as nobody measured them.

`predict` reckons twice. On paper, the bottleneck law: each resource has a capacity in images/s, the
least one counts, and a run takes one shard's way through all stages longer. By simulation: shards
are pulled by readers, actors and finishers; S3 answers so many requests a second; times are
lognormal; spot nodes are lost and come back, and their shards are computed again. The two agree
while there are many shards an actor; where they do not, the simulation shows what paper leaves out.

The driver's part, planning and publishing, is a straight line through what
`benchmarks/plan_scale.py` measured (`DRIVER_POINTS`): so much a shard and so much an image.
"""

import argparse
import heapq
import json
import math
import random
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

GPUS = (1, 2, 4, 8, 16, 32, 64, 125, 250, 500, 1000)
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DriverPoint:
    """A figure of `plan_scale.py`: 10 images a case, Parquet shards, 2 shared cores, local disk."""

    images: int
    shards: int
    wall_s: float
    peak_mib: float | None = None


DRIVER_POINTS: dict[str, tuple[DriverPoint, ...]] = {
    "plan a first night": (
        DriverPoint(100_000, 100, 2.44, 255),
        DriverPoint(100_000, 10_000, 8.02, 271),
        DriverPoint(1_000_000, 1_000, 32.3, 921),  # CPU; 65.5 s by the clock, on a cold disk
    ),
    "publish a first night": (
        DriverPoint(100_000, 100, 4.46, 330),
        DriverPoint(100_000, 10_000, 9.0),
        DriverPoint(1_000_000, 1_000, 43.5, 1_118),
        DriverPoint(1_000_000, 100_000, 86.8, 2_533),
    ),
    "a no-change night": (
        DriverPoint(100_000, 10_000, 3.4, 274),
        DriverPoint(1_000_000, 100_000, 10.6, 792),
    ),
}
"""ARCHITECTURE.md, "Nights at scale"; what is not there: the same command with other numbers of
shards, 2026-11-23."""
NO_CHANGE = "a no-change night"
"""Planned from the log alone, so its costs are those of shards, not of images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of one image, unless the name says otherwise.

    predict_s: of the network on one GPU; preprocess_s: of the recipe on that GPU. driver_shard_s:
    of Ray's and our driver for a shard, dispatch to receipt. origin: where each value is from.
    """

    read_s: float
    decode_s: float
    preprocess_s: float
    predict_s: float
    finish_s: float
    write_s: float
    bytes_in: float
    bytes_out: float
    gets: float = 1.0
    puts_a_shard: float = 4.0
    driver_shard_s: float = 0.003
    origin: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Dollars. Assumptions: list prices of us-east-1 as remembered in 2026; look yours up."""

    gpu_node_h: float = 1.323
    """g6.4xlarge, one L4."""
    reader_node_h: float = 0.8064
    """m7i.4xlarge."""
    head_h: float = 0.4032
    """m7i.2xlarge."""
    spot_share: float = 0.45
    """Of the on-demand price; workers only."""
    million_puts: float = 5.0
    million_gets: float = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A run's machines and how they behave. CPU shares as in `ResourceConfig`.

    task_cpus: CPUs left for readers and writers on the GPU nodes and on reader nodes together;
    0: as many as keep the GPUs busy. loss_h: expected losses of a spot node in an hour.
    """

    gpus: int
    task_cpus: float = 0.0
    node_cpus: int = 16
    decoders: int = 4
    read_cpus: float = 0.25
    finish_cpus: float = 0.5
    node_gbps: float = 10.0
    prefixes: int = 1
    spread: float = 0.3
    """Sigma of the lognormal times of a shard."""
    loss_h: float = 0.05
    start_s: float = 300.0
    """From the request for a node to its first task: launch, installation, loading the network."""
    idle_s: float = 300.0
    spot: bool = True

    @property
    def spare_cpus(self) -> int:
        """CPUs of the GPU nodes beside actors and decoders."""
        return self.gpus * max(0, self.node_cpus - 1 - self.decoders)


GETS_A_SECOND, PUTS_A_SECOND = 5_500, 3_500
"""Of one prefix of an S3 bucket, by AWS' documentation."""
LISTING_S = 0.1
"""Assumed of one page of 1,000 keys."""
RANGE_BYTES = 8 << 20
"""Of one request where images are packed into shards."""


# From a run


def measure(results: str, run_id: str, flops: float, peak_tflops: float, share: float) -> Costs:
    """The costs that a run's log, plan and receipts tell, and assumptions for the rest."""
    from pipeline import runs, storage

    plan = runs.load_plan(results, run_id)
    if plan is None:
        raise SystemExit(f"there is no run {run_id} in {results}")
    receipts = runs.load_receipts(results, plan)
    log = storage.read(runs.run_uri(results, run_id, "log.jsonl")).splitlines()
    lines = [json.loads(line) for line in log]
    shards = [line for line in lines if line["event"] == "shard"]
    on_gpu = any(line["event"] == "compute" and line["gpus_per_actor"] for line in lines)
    images = sum(line["images"] for line in shards)
    if not images:
        raise SystemExit(f"run {run_id} computed no image")
    seconds = {
        name: sum(line["seconds"].get(name, 0.0) for line in shards) / images
        for name in ("read", "decode", "preprocess", "predict", "finish", "write")
    }
    parts = [p for r in receipts.values() for p in (r.masks, r.metrics, r.cases) if p is not None]
    predict_s = seconds["predict"] if on_gpu else flops / (peak_tflops * 1e12 * share)
    told = f"measured: {images} images of run {run_id}"
    origin = dict.fromkeys(("read_s", "decode_s", "finish_s", "write_s"), told)
    origin |= {
        "bytes_in": told,
        "bytes_out": told,
        "predict_s": told
        if on_gpu
        else f"assumed: {flops / 1e9:.1f} GFLOP at {share:.0%} of {peak_tflops:g} TFLOP/s",
        "preprocess_s": told if on_gpu else "assumed: a tenth of predict_s",
        "gets": "assumed: one request an image, as in a folder of pictures",
        "puts_a_shard": "by design: three parts and a receipt",
        "driver_shard_s": "assumed: Ray dispatches some 1,000 tasks a second, three a shard",
    }
    return Costs(
        read_s=seconds["read"],
        decode_s=seconds["decode"],
        preprocess_s=seconds["preprocess"] if on_gpu else predict_s / 10,
        predict_s=predict_s,
        finish_s=seconds["finish"],
        write_s=seconds["write"],
        bytes_in=sum(work.size_bytes for work in plan.works) / images,
        bytes_out=sum(part.size_bytes for part in parts) / images,
        origin=origin,
    )


def network_flops(bundle: str, side: int) -> float:
    """Floating-point operations of a bundle's network on one square image; convolutions only."""
    import torch

    from pipeline.bundle import build_model, load_bundle

    loaded = load_bundle(bundle)
    model, total = build_model(loaded).to("meta"), 0

    def count(layer: Any, inputs: Any, output: Any) -> None:
        nonlocal total
        up = isinstance(layer, torch.nn.ConvTranspose2d)
        pixels = (inputs[0] if up else output).shape[2:].numel()
        total += 2 * layer.weight.numel() * pixels // layer.groups

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.register_forward_hook(count)
    channels = loaded.options["in_channels"]
    with torch.inference_mode():
        model(torch.zeros(1, channels, side, side, device="meta"))
    return float(total)


# On paper


def capacities(costs: Costs, cluster: Cluster, images_a_shard: float) -> dict[str, float]:
    """Images per second that each resource could do if the others were free."""
    gpus = cluster.gpus
    traffic = costs.bytes_in + costs.bytes_out
    tasks_cpu_s = task_cpu_s(costs, cluster)
    return {
        "GPU": gpus / (costs.predict_s + costs.preprocess_s),
        "decoders": _rate(gpus * cluster.decoders, costs.decode_s),
        "CPUs for reading and writing": _rate(cluster.task_cpus, tasks_cpu_s),
        "network of the GPU nodes": _rate(gpus * cluster.node_gbps * 1e9 / 8, traffic),
        "S3 GET": _rate(cluster.prefixes * GETS_A_SECOND, costs.gets),
        "S3 PUT": _rate(cluster.prefixes * PUTS_A_SECOND * images_a_shard, costs.puts_a_shard),
        "driver": _rate(images_a_shard, costs.driver_shard_s),
    }


def _rate(amount: float, cost: float) -> float:
    return amount / cost if cost else math.inf


def task_cpu_s(costs: Costs, cluster: Cluster) -> float:
    """CPU-seconds that Ray reserves for reading, finishing and writing one image."""
    return costs.read_s * cluster.read_cpus + (
        (costs.finish_s + costs.write_s) * cluster.finish_cpus
    )


def with_enough_cpus(costs: Costs, cluster: Cluster) -> Cluster:
    """The cluster with the task CPUs that its GPUs need, a tenth more, and room for one of each."""
    if cluster.task_cpus:
        return cluster
    busy = 1.1 * task_cpu_s(costs, cluster) * cluster.gpus / actor_s(costs, cluster)
    return replace(cluster, task_cpus=busy + cluster.read_cpus + cluster.finish_cpus)


def shard_s(costs: Costs, cluster: Cluster, images_a_shard: float) -> float:
    """Seconds of one shard's way through all stages, nothing else being there."""
    return images_a_shard * (
        costs.read_s + actor_s(costs, cluster) + costs.finish_s + costs.write_s
    )


def actor_s(costs: Costs, cluster: Cluster) -> float:
    """Seconds an actor holds a shard, per image: bytes come in and are decoded beside the GPU."""
    traffic_s = (costs.bytes_in + costs.bytes_out) * 8 / (cluster.node_gbps * 1e9)
    return max(costs.decode_s / cluster.decoders, costs.predict_s + costs.preprocess_s, traffic_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What one size of cluster would do."""

    gpus: int
    images_a_s: float
    bottleneck: str
    compute_s: float
    plan_s: float
    publish_s: float
    cpus_a_gpu: float
    gbps: float
    gets_a_s: float
    puts_a_s: float
    driver_s: float

    def total_s(self, cluster: Cluster) -> float:
        """From the command to the published night."""
        return self.plan_s + cluster.start_s + self.compute_s + self.publish_s


def forecast(costs: Costs, cluster: Cluster, images: int, images_a_shard: float) -> Forecast:
    """The closed form. The last shard is on average half a shard behind the others."""
    cluster = with_enough_cpus(costs, cluster)
    rates = capacities(costs, cluster, images_a_shard)
    bottleneck = min(rates, key=lambda name: rates[name])
    shards = math.ceil(images / images_a_shard)
    rounds_s = images / rates[bottleneck]
    if shards <= cluster.gpus:
        bottleneck, rounds_s = "too few shards", images_a_shard * actor_s(costs, cluster)
    fill_s = shard_s(costs, cluster, images_a_shard) - images_a_shard * actor_s(costs, cluster)
    tail_s = 0.5 * images_a_shard * actor_s(costs, cluster) if 1 < cluster.gpus < shards else 0.0
    compute_s = rounds_s + fill_s + tail_s
    speed = images / compute_s
    plan_s = driver_line("plan a first night", images, shards)[0]
    return Forecast(
        gpus=cluster.gpus,
        images_a_s=speed,
        bottleneck=bottleneck,
        compute_s=compute_s,
        plan_s=plan_s,
        publish_s=driver_line("publish a first night", images, shards)[0],
        cpus_a_gpu=cluster.task_cpus / cluster.gpus + 1 + cluster.decoders,
        gbps=speed * (costs.bytes_in + costs.bytes_out) * 8 / 1e9,
        gets_a_s=speed * costs.gets / cluster.prefixes,
        puts_a_s=speed / images_a_shard * costs.puts_a_shard / cluster.prefixes,
        driver_s=shards * costs.driver_shard_s,
    )


def driver_line(step: str, images: float, shards: float) -> tuple[float, float]:
    """Seconds and GiB of a step of the driver: a line through its points, never below zero."""
    counted = 0 if step == NO_CHANGE else 1
    points = [(p.images * counted, p.shards, p.wall_s, p.peak_mib) for p in DRIVER_POINTS[step]]
    wall_s = _fit([(i, s, seconds) for i, s, seconds, _ in points], images, shards)
    memory = [(i, s, mib) for i, s, _, mib in points if mib is not None]
    return wall_s, _fit(memory, images, shards) / 1024


def _fit(points: Sequence[tuple[float, float, float]], images: float, shards: float) -> float:
    """value = constant + a images + b shards, none below zero, by the least relative squares."""
    import numpy as np
    from scipy.optimize import nnls

    values = np.array([value for *_, value in points])
    table = np.array([(1.0, i, s) for i, s, _ in points]) / values[:, None]
    scale = table.max(axis=0)
    scale[scale == 0] = 1.0
    factors, _ = nnls(table / scale, np.ones(len(points)))
    return float(np.dot(factors / scale, (1.0, images, shards)))


def dollars(costs: Costs, cluster: Cluster, prices: Prices, found: Forecast, images: int) -> float:
    """Of the whole run. GPU and reader nodes are there while shards are computed."""
    cluster = with_enough_cpus(costs, cluster)
    readers = math.ceil(max(0.0, cluster.task_cpus - cluster.spare_cpus) / cluster.node_cpus)
    share = prices.spot_share if cluster.spot else 1.0
    nodes_h = cluster.gpus * prices.gpu_node_h + readers * prices.reader_node_h
    busy_h = (cluster.start_s + found.compute_s + cluster.idle_s) / 3600
    puts = found.puts_a_s * cluster.prefixes * found.compute_s / 1e6
    gets = images * costs.gets / 1e6
    return (
        nodes_h * share * busy_h
        + prices.head_h * found.total_s(cluster) / 3600
        + puts * prices.million_puts
        + gets * prices.million_gets
    )


# By simulation


@dataclass(slots=True)
class _State:
    """A run in progress. Tokens of CPUs are shared by readers and finishers."""

    todo: int
    free_cpus: float
    idle: deque[int] = field(default_factory=deque)
    read: int = 0
    """Shards in memory that wait for an actor."""
    reading: int = 0
    done_predicting: int = 0
    """Shards that wait for a finisher."""
    working: dict[int, int] = field(default_factory=dict)
    """The ticket of the shard in work, by actor: the end of a shard that was lost has another."""
    store_free_at: float = 0.0
    """When S3 has answered all that was asked so far, at the rate of its prefixes."""
    driver_free_at: float = 0.0
    finished: int = 0


class Simulation:
    """One run, shard by shard. The same seed gives the same run."""

    def __init__(
        self, costs: Costs, cluster: Cluster, shards: int, images_a_shard: float, seed: int = 0
    ) -> None:
        self._costs, self._cluster = costs, with_enough_cpus(costs, cluster)
        self._shards, self._size = shards, images_a_shard
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, str, int]] = []
        self._ticket = 0
        self._state = _State(todo=shards, free_cpus=self._cluster.task_cpus)
        self.losses = 0

    def run(self) -> float:
        """Seconds from the arrival of the first node to the last receipt."""
        state = self._state
        for gpu in range(self._cluster.gpus):
            self._at(0.0, "node", gpu)
        now = 0.0
        while state.finished < self._shards:
            now, ticket, event, subject = heapq.heappop(self._events)
            if event != "predicted" or self._state.working.get(subject) == ticket:
                getattr(self, f"_on_{event}")(now, subject)
            self._pull(now)
        return max(now, state.driver_free_at)

    def _at(self, when: float, event: str, subject: int) -> int:
        self._ticket += 1
        heapq.heappush(self._events, (when, self._ticket, event, subject))
        return self._ticket

    def _time(self, seconds_an_image: float) -> float:
        """A shard's time: lognormal with the given mean."""
        sigma = self._cluster.spread
        mean = seconds_an_image * self._size
        return mean * self._random.lognormvariate(-sigma * sigma / 2, sigma) if sigma else mean

    def _pull(self, now: float) -> None:
        """Start what can start: writers, since they free memory, then actors, then readers."""
        state, cluster, costs = self._state, self._cluster, self._costs
        while state.done_predicting and state.free_cpus >= cluster.finish_cpus:
            state.done_predicting -= 1
            state.free_cpus -= cluster.finish_cpus
            self._at(now + self._time(costs.finish_s + costs.write_s), "written", 0)
        while state.read and state.idle:
            state.read -= 1
            gpu = state.idle.popleft()
            ends = now + self._time(actor_s(costs, cluster))
            state.working[gpu] = self._at(ends, "predicted", gpu)
        ahead = 2 * cluster.gpus + 2
        while (
            state.todo
            and state.free_cpus >= cluster.read_cpus
            and state.read + state.reading < ahead
            and state.done_predicting < ahead
        ):
            state.todo -= 1
            state.reading += 1
            state.free_cpus -= cluster.read_cpus
            self._at(max(now + self._time(costs.read_s), self._answered(now)), "read", 0)

    def _answered(self, now: float) -> float:
        """When S3 has answered the requests for one more shard."""
        state, cluster = self._state, self._cluster
        gets_s = self._size * self._costs.gets / (cluster.prefixes * GETS_A_SECOND)
        state.store_free_at = max(now, state.store_free_at) + gets_s
        return state.store_free_at

    def _on_node(self, now: float, gpu: int) -> None:
        state = self._state
        state.idle.append(gpu)
        rate = self._cluster.loss_h / 3600 if self._cluster.spot else 0.0
        if rate:
            self._at(now + self._random.expovariate(rate), "loss", gpu)

    def _on_loss(self, now: float, gpu: int) -> None:
        """A spot node is taken away: its shard is read again, and a new node is asked for."""
        state = self._state
        self.losses += 1
        if state.working.pop(gpu, None) is not None:
            state.todo += 1
        elif gpu in state.idle:
            state.idle.remove(gpu)
        self._at(now + self._cluster.start_s, "node", gpu)

    def _on_read(self, now: float, _: int) -> None:
        state = self._state
        state.reading -= 1
        state.read += 1
        state.free_cpus += self._cluster.read_cpus

    def _on_predicted(self, now: float, gpu: int) -> None:
        state = self._state
        del state.working[gpu]
        state.idle.append(gpu)
        state.done_predicting += 1

    def _on_written(self, now: float, _: int) -> None:
        state = self._state
        state.free_cpus += self._cluster.finish_cpus
        state.driver_free_at = max(now, state.driver_free_at) + self._costs.driver_shard_s
        state.finished += 1


def simulate(
    costs: Costs, cluster: Cluster, images: int, images_a_shard: float, seeds: int = 3
) -> tuple[float, float]:
    """Mean seconds of several runs, and mean losses of nodes."""
    shards = math.ceil(images / images_a_shard)
    runs = [Simulation(costs, cluster, shards, images_a_shard, seed) for seed in range(seeds)]
    seconds = [run.run() for run in runs]
    return statistics.fmean(seconds), statistics.fmean(run.losses for run in runs)


# What breaks first


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A wall, and at how many images a run meets it."""

    name: str
    images: float
    at_wanted: str


def limits(
    costs: Costs,
    wanted: int,
    images_a_shard: float,
    *,
    head_gib: float = 32.0,
    patience_h: float = 1.0,
    night_h: float = 8.0,
) -> list[Limit]:
    """Walls in the order in which a growing first night meets them.

    head_gib: memory of the head. patience_h: for one step of the driver. night_h: for the whole.
    """
    found = []
    shards = wanted / images_a_shard
    for step in DRIVER_POINTS:
        seconds, gib = driver_line(step, wanted, shards)
        base_s, base_gib = driver_line(step, 0, 0)
        found += [
            Limit(
                name=f"memory to {step}",
                images=wanted * (head_gib - base_gib) / (gib - base_gib),
                at_wanted=f"{gib:,.0f} GiB, the head has {head_gib:g}",
            ),
            Limit(
                name=f"time to {step}",
                images=wanted * (patience_h * 3600 - base_s) / (seconds - base_s),
                at_wanted=f"{seconds / 3600:,.1f} h on one thread",
            ),
        ]
    log_bytes, receipt_bytes = 1_065.0, 3_013.0  # measured: an add action, a receipt
    keys = 1.0 if costs.gets >= 1 else 1 / images_a_shard
    for name, a_shard_s, text in (
        ("Ray's driver", costs.driver_shard_s, "tasks through one process"),
        ("reading the receipts of a resumed run", 0.02 / 8, "8 threads, 20 ms each"),
        (
            "S3 PUT in one prefix",
            costs.puts_a_shard / PUTS_A_SECOND,
            f"{PUTS_A_SECOND:,} a second, {costs.puts_a_shard:g} a shard",
        ),
    ):
        found.append(
            Limit(
                name=name,
                images=night_h * 3600 / a_shard_s * images_a_shard,
                at_wanted=f"{shards * a_shard_s / 3600:,.1f} h ({text})",
            )
        )
    found += [
        Limit(
            name="S3 GET in one prefix",
            images=night_h * 3600 * GETS_A_SECOND / costs.gets,
            at_wanted=f"{wanted * costs.gets / GETS_A_SECOND / 3600:,.1f} h at full rate",
        ),
        Limit(
            name="listing the source",
            images=night_h * 3600 / LISTING_S * 1_000 / keys,
            at_wanted=f"{wanted * keys / 1_000 * LISTING_S / 3600:,.1f} h one page after another",
        ),
        Limit(
            name="log of the masks, one commit",
            images=4 * GIB / log_bytes * images_a_shard,
            at_wanted=f"{shards * log_bytes / 1e9:,.1f} GB of JSON; receipts "
            f"{shards * receipt_bytes / 1e9:,.1f} GB",
        ),
    ]
    return sorted(found, key=lambda item: item.images)


# Printing


def rows_of(
    costs: Costs, template: Cluster, prices: Prices, images: int, images_a_shard: float
) -> Iterator[dict[str, Any]]:
    """One line for each size of cluster."""
    for gpus in GPUS:
        cluster = replace(template, gpus=gpus)
        found = forecast(costs, cluster, images, images_a_shard)
        simulated_s, losses = simulate(costs, cluster, images, images_a_shard)
        later = replace(found, compute_s=simulated_s)
        spot = dollars(costs, cluster, prices, later, images)
        steady = dollars(costs, replace(cluster, spot=False), prices, found, images)
        yield {
            "GPUs": gpus,
            "images/s": round(found.images_a_s),
            "simulated": round(images / simulated_s),
            "lost nodes": round(losses, 1),
            "bottleneck": found.bottleneck,
            "CPUs/GPU": round(found.cpus_a_gpu, 1),
            "Gb/s": round(found.gbps, 1),
            "GET/s": round(found.gets_a_s),
            "PUT/s": round(found.puts_a_s, 1),
            "driver s": round(found.driver_s),
            "plan s": round(found.plan_s),
            "commit s": round(found.publish_s),
            "hours": round(later.total_s(cluster) / 3600, 2),
            "$/1e6 spot": round(spot / images * 1e6, 2),
            "$/1e6 on demand": round(steady / images * 1e6, 2),
        }


def draw(tables: dict[str, list[dict[str, Any]]], title: str, path: str) -> None:
    """Speed and dollars over GPUs, as a PNG: the first kind of source black, the second grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, cost = figure.subplots(1, 2)
    for (name, rows), colour in zip(tables.items(), ("black", "0.55"), strict=True):
        gpus = [row["GPUs"] for row in rows]
        speed.loglog(gpus, [r["images/s"] for r in rows], color=colour, label=f"{name}, on paper")
        dots = [row["simulated"] for row in rows]
        speed.loglog(gpus, dots, "o", color=colour, ms=4, label="simulated")
        cost.loglog(gpus, [r["$/1e6 spot"] for r in rows], color=colour, label=f"{name}, spot")
        steady = [row["$/1e6 on demand"] for row in rows]
        cost.loglog(gpus, steady, "--", color=colour, label="on demand")
    speed.set(xlabel="GPUs", ylabel="images per second", title="Computing")
    cost.set(xlabel="GPUs", ylabel="$ per million images", title="Cost of a first night")
    for axes in (speed, cost):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="0.93")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def print_costs(costs: Costs) -> None:
    print("Costs of one image, and where they are from:")
    for item in fields(costs):
        if item.name != "origin":
            value = getattr(costs, item.name)
            print(f"  {item.name:15} {value:>12.6g}  {costs.origin.get(item.name, 'assumed')}")


def print_limits(costs: Costs, wanted: int) -> None:
    for images_a_shard in (100, 1_000, 10_000):
        walls = limits(costs, wanted, images_a_shard)
        print(
            f"\n{wanted:.0e} images, {images_a_shard:,} a shard; walls in the order they are met:"
        )
        for wall in walls:
            mark = "breaks" if wall.images < wanted else "holds "
            print(f"  {mark}  at {wall.images:>8.1e} images  {wall.name}: {wall.at_wanted}")
    first = limits(costs, wanted, 1_000)[0]
    a_shard, an_image = (
        (
            driver_line("publish a first night", *more)[1]
            - driver_line("publish a first night", 0, 0)[1]
        )
        * GIB
        for more in ((0, 1), (1, 0))
    )
    print(
        f"\nFirst to break: {first.name}, at {first.images:.0e} images. A plan names each slice of "
        f"each case that\nis to be computed: {an_image:,.0f} bytes an image and {a_shard:,.0f} a "
        "shard, in one process. Larger shards take\nthe load off the log, the receipts, S3 and "
        "Ray, but not off this. Above that size take a larger head,\nor several results folders (one a "
        "site), or let the archive come in by parts: a plan names only what\nis new."
    )


def predict(options: argparse.Namespace) -> None:
    from pipeline.telemetry import format_table

    costs = Costs(**json.loads(Path(options.costs).read_text()))
    if options.predict_ms:
        told = {**costs.origin, "predict_s": "given: --predict-ms"}
        costs = replace(costs, predict_s=options.predict_ms / 1e3, origin=told)
    prices = Prices(**{item.name: getattr(options, item.name) for item in fields(Prices)})
    cluster = Cluster(gpus=1, decoders=options.decoders, prefixes=options.prefixes)
    print_costs(costs)
    print(f"\nPrices (assumed unless given): {_in_words(prices)}")
    print(f"Cluster (assumed): {_in_words(cluster)}")
    size = options.images_a_shard
    packed = replace(costs, gets=costs.bytes_in / RANGE_BYTES)
    tables = {}
    for name, source in (("packed shards", packed), ("pictures in a folder", costs)):
        tables[name] = list(rows_of(source, cluster, prices, options.images, size))
        print(f"\n{name}: {options.images:,} images, all new, {size:,g} a shard")
        print(format_table(tables[name], tables[name][0]))
    print_limits(packed, options.wanted)
    if options.chart:
        title = f"{options.images:,} images, {size:,g} a shard: predicted, not measured"
        draw(tables, title, options.chart)


def _in_words(values: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(values).items())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    told = commands.add_parser("measure", help="costs from a finished run")
    told.add_argument("results")
    told.add_argument("run", help="a first night, of real images")
    told.add_argument("--out", required=True)
    told.add_argument("--bundle", required=True, help="whose network runs on the GPUs")
    told.add_argument("--side", type=int, default=256, help="pixels, after the recipe")
    told.add_argument("--peak-tflops", type=float, default=30.3, help="of the GPU; L4, fp32: 30.3")
    told.add_argument("--share", type=float, default=0.35, help="of the peak that is reached")
    asked = commands.add_parser("predict", help="what 1 to 1,000 GPUs would do")
    asked.add_argument("costs")
    asked.add_argument("--images", type=int, default=10_000_000)
    asked.add_argument("--images-a-shard", type=float, default=1_000)
    asked.add_argument("--wanted", type=int, default=10**9, help="of which the walls are told")
    asked.add_argument("--predict-ms", type=float, help="the network on one GPU, where measured")
    asked.add_argument("--decoders", type=int, default=4)
    asked.add_argument("--prefixes", type=int, default=1)
    asked.add_argument("--chart")
    for item in fields(Prices):
        flag = f"--{item.name.replace('_', '-')}"
        asked.add_argument(flag, type=float, default=getattr(Prices(), item.name))
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.command == "predict":
        predict(options)
        return
    flops = network_flops(options.bundle, options.side)
    costs = measure(options.results, options.run, flops, options.peak_tflops, options.share)
    Path(options.out).write_text(json.dumps(asdict(costs), indent=1) + "\n")
    print_costs(costs)


if __name__ == "__main__":
    main()
