"""How many actors a cluster holds, of what size, and where."""

import pytest

from pipeline.config import ResourceConfig
from pipeline.errors import ConfigError
from pipeline.flows.placement import Node, lay_out, wants_gpus

HEAD = Node(cpus=0)
CPU = Node(cpus=4)
GPU = Node(cpus=4, gpus=1)
BIG = Node(cpus=16, gpus=4, labels={"ray.io/accelerator-type": "A10G"})


def lay(nodes, works=99, threads=1, grows=False, **resources):
    return lay_out(nodes, ResourceConfig(**resources), threads, works, grows=grows)


def test_one_actor_a_gpu_with_the_cpus_of_its_decoders():
    pool = lay([HEAD, CPU, GPU, BIG])
    assert (pool.num_actors, pool.gpus_per_actor, pool.cpus_per_actor) == (5, 1.0, 2.0)
    assert lay([HEAD, CPU, GPU, BIG], decoders=3).cpus_per_actor == 4.0


def test_decoders_go_without_where_the_readers_would_find_nothing():
    small = Node(cpus=2, gpus=1)
    assert lay([HEAD, small, small]).cpus_per_actor == 1.0
    assert lay([HEAD, small, small, CPU]).cpus_per_actor == 2.0
    assert lay([Node(cpus=2, gpus=2), CPU]).cpus_per_actor == 1.0, "no GPU is left without an actor"


def test_readers_need_a_node_with_room_not_a_sum_of_crumbs():
    crumbs = [Node(cpus=1.3, gpus=1)] * 3
    with pytest.raises(ConfigError, match="the run would hang"):
        lay(crumbs)
    assert lay([*crumbs, CPU]).num_actors == 3


def test_cpus_hold_actors_where_there_are_no_gpus():
    assert lay([Node(cpus=5)]).num_actors == 4
    assert lay([Node(cpus=2), Node(cpus=2)]).num_actors == 3
    assert lay([Node(cpus=5)], works=2).num_actors == 2
    assert lay([HEAD, Node(cpus=4), Node(cpus=4)], threads=3).num_actors == 2
    assert lay([HEAD, CPU, GPU], device="cpu").gpus_per_actor == 0


@pytest.mark.parametrize(
    ("nodes", "resources", "message"),
    [
        ([Node(cpus=5)], {"actors": 5}, "would hang; set resources.actors lower"),
        ([Node(cpus=1)], {}, "would hang; the cluster needs another CPU"),
        ([CPU], {"device": "cuda"}, "no GPU"),
        ([CPU], {"max_gpus": 2}, "no GPU"),
        ([CPU, GPU], {"actors": 2}, "2 actors need 2 GPUs, the cluster has 1"),
        ([CPU, GPU], {"device": "cuda", "nodes_like": {"a": "b"}}, "no GPU on a node with a=b"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(nodes, resources, message):
    with pytest.raises(ConfigError, match=message):
        lay(nodes, **resources)


def test_max_gpus_is_a_limit_and_on_a_growing_cluster_a_request():
    assert lay([CPU, BIG], max_gpus=2).num_actors == 2
    assert lay([CPU, GPU], max_gpus=3).num_actors == 1
    assert lay([CPU, GPU], max_gpus=3, grows=True).num_actors == 3
    assert lay([CPU, GPU], max_gpus=3, grows=True, works=2).num_actors == 2
    assert lay([CPU, BIG], actors=3, max_gpus=2).num_actors == 2


def test_without_a_request_nobody_waits_for_more_than_there_is():
    assert lay([CPU, GPU], grows=True).num_actors == 1


def test_nodes_are_chosen_by_label():
    pool = lay([CPU, GPU, BIG], nodes_like={"accelerator-type": "A10G"})
    assert pool.num_actors == 4
    assert pool.labels == {"ray.io/accelerator-type": "A10G"}
    assert not wants_gpus([CPU, GPU], ResourceConfig(nodes_like={"kind": "b"}))
