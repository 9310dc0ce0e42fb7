"""Who sits where: how many actors a cluster holds, and of what size, so that its readers still fit.

Plain arithmetic over nodes; `cluster` asks Ray for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.config import ResourceConfig
from pipeline.errors import ConfigError

_RAYS_OWN = ("accelerator-type", "availability-zone", "market-type", "node-group", "region")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one machine of a cluster offers."""

    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The actors of a run, with the CPUs and GPUs of each.

    Their number stays: those that find no place wait for one, which asks an autoscaler for it. (A pool
    of Ray Data that may grow did not take a GPU that had joined, in a minute of need.) labels: what a
    node must be like to hold one.
    """

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    labels: Mapping[str, str] = field(default_factory=dict)


def lay_out(
    nodes: Sequence[Node],
    resources: ResourceConfig,
    threads: int,
    num_works: int,
    *,
    grows: bool = False,
) -> Pool:
    """The pool for these nodes. Raises ConfigError where the readers would find no CPU.

    One actor a GPU where there are GPUs; else one a CPU core, each with `threads` threads.
    grows: whether more nodes may join, so that what is asked for need not be there yet.
    """
    lay = _on_gpus if wants_gpus(nodes, resources) else _on_cpus
    pool = lay(nodes, resources, float(max(1, threads)), num_works, grows)
    if not _readers_fit(nodes, pool, resources):
        raise ConfigError(_starving(nodes, pool, resources))
    return pool


def wants_gpus(nodes: Sequence[Node], resources: ResourceConfig) -> bool:
    """Whether the network runs on GPUs: because there are some, or because they were asked for."""
    if resources.device == "cpu":
        return False
    asked = resources.device == "cuda" or resources.max_gpus > 0
    return asked or any(node.gpus >= 1 for node in hosts(nodes, resources))


def hosts(nodes: Sequence[Node], resources: ResourceConfig) -> list[Node]:
    """The nodes with the labels that those for the network must have."""
    wanted = labels_of(resources).items()
    return [node for node in nodes if wanted <= node.labels.items()]


def labels_of(resources: ResourceConfig) -> dict[str, str]:
    """`nodes_like` as Ray has it: its own labels are `ray.io/accelerator-type` and so on."""
    return {
        f"ray.io/{key}" if key in _RAYS_OWN else key: value
        for key, value in resources.nodes_like.items()
    }


def seats(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """How many actors of this size the nodes hold."""
    return sum(_seats(node, cpus, gpus) for node in nodes)


def _seats(node: Node, cpus: float, gpus: float) -> int:
    by_cpu = int(node.cpus // cpus)
    return min(by_cpu, int(node.gpus // gpus)) if gpus else by_cpu


def _on_gpus(
    nodes: Sequence[Node], resources: ResourceConfig, threads: float, num_works: int, grows: bool
) -> Pool:
    """An actor claims the CPUs of its decoders too, or readers beside it would slow it down.

    Where that would leave the readers none, or a GPU without CPUs, it claims its own threads only.
    """
    like = hosts(nodes, resources)
    present = seats(like, threads, 1.0)
    if not present:
        raise ConfigError(
            f"the run is to use GPUs, but the cluster has no GPU{described(resources)} with "
            f"{threads:g} CPUs beside it"
        )
    actors = resources.actors or min(resources.max_gpus or present, num_works)
    if resources.max_gpus:
        actors = min(actors, resources.max_gpus)
    if actors > present and not grows:
        if resources.actors:
            raise ConfigError(f"{actors} actors need {actors} GPUs, the cluster has {present}")
        actors = present
    pool = Pool(
        num_actors=actors,
        cpus_per_actor=threads + resources.decoders,
        gpus_per_actor=1.0,
        labels=labels_of(resources),
    )
    roomy = seats(like, pool.cpus_per_actor, 1.0) == present
    if roomy and _readers_fit(nodes, pool, resources):
        return pool
    return replace(pool, cpus_per_actor=threads)


def _on_cpus(
    nodes: Sequence[Node], resources: ResourceConfig, threads: float, num_works: int, _grows: bool
) -> Pool:
    """As many as leave room for the readers; nodes that join later are left to these."""
    have = seats(hosts(nodes, resources), threads, 0.0)
    pool = Pool(
        num_actors=resources.actors or max(1, have),
        cpus_per_actor=threads,
        gpus_per_actor=0.0,
        labels=labels_of(resources),
    )
    if resources.actors:
        return pool
    while pool.num_actors > 1 and not _readers_fit(nodes, pool, resources):
        pool = replace(pool, num_actors=pool.num_actors - 1)
    return replace(pool, num_actors=max(1, min(pool.num_actors, num_works)))


def _readers_fit(nodes: Sequence[Node], pool: Pool, resources: ResourceConfig) -> bool:
    """Whether reading and writing find CPUs beside the actors that the nodes hold now."""
    left = _left_cpus(nodes, pool, resources)
    read, finish = resources.read_tasks_cpus, resources.finish_tasks_cpus
    return sum(left) >= read + finish and max(left, default=0.0) >= max(read, finish)


def _left_cpus(nodes: Sequence[Node], pool: Pool, resources: ResourceConfig) -> list[float]:
    """What the actors leave on each node; actors for GPUs that are yet to come take nothing."""
    left, waiting = [], pool.num_actors
    like = hosts(nodes, resources)
    for node in nodes:
        here = min(waiting, _seats(node, pool.cpus_per_actor, pool.gpus_per_actor))
        taken = here if node in like else 0
        waiting -= taken
        left.append(node.cpus - taken * pool.cpus_per_actor)
    if waiting and not pool.gpus_per_actor:
        left.append(-waiting * pool.cpus_per_actor)
    return left


def _starving(nodes: Sequence[Node], pool: Pool, resources: ResourceConfig) -> str:
    cpus = sum(node.cpus for node in nodes)
    need = resources.read_tasks_cpus + resources.finish_tasks_cpus
    advice = (
        "set resources.actors lower" if pool.num_actors > 1 else "the cluster needs another CPU"
    )
    return (
        f"{pool.num_actors} actors of {pool.cpus_per_actor:g} CPUs would leave "
        f"{sum(_left_cpus(nodes, pool, resources)):g} of the cluster's {cpus:g} CPUs for reading and "
        f"writing, which need {need:g}: the run would hang; {advice}"
    )


def described(resources: ResourceConfig) -> str:
    """The labels that were asked for, for a sentence."""
    labels = ", ".join(f"{key}={value}" for key, value in sorted(labels_of(resources).items()))
    return f" on a node with {labels}" if labels else ""
