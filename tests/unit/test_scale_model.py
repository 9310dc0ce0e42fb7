"""The model of a cluster: small cases by hand, paper against simulation, walls in order."""

import importlib.util
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "scale_model.py"
SPEC = importlib.util.spec_from_file_location("scale_model", FILE)
assert SPEC is not None
assert SPEC.loader is not None
model = importlib.util.module_from_spec(SPEC)
sys.modules["scale_model"] = model
SPEC.loader.exec_module(model)

ONLY_GPU = model.Costs(
    read_s=0,
    decode_s=0,
    preprocess_s=0.002,
    predict_s=0.008,
    finish_s=0,
    write_s=0,
    bytes_in=0,
    bytes_out=0,
    gets=0,
    puts_a_shard=0,
    driver_shard_s=0,
)
ALL = model.Costs(
    read_s=0.002,
    decode_s=0.005,
    preprocess_s=0.0002,
    predict_s=0.0023,
    finish_s=0.0055,
    write_s=0.0007,
    bytes_in=262_000,
    bytes_out=600,
    gets=0.03,
)
STEADY = model.Cluster(gpus=1, spread=0.0, spot=False)


def simulated_s(costs: Any, cluster: Any, shards: int, size: float, seed: int = 0) -> float:
    return float(model.Simulation(costs, cluster, shards, size, seed).run())


def test_one_gpu_by_hand() -> None:
    found = model.forecast(ONLY_GPU, STEADY, images=1_000, images_a_shard=100)
    assert found.compute_s == pytest.approx(1_000 * 0.01)
    assert found.images_a_s == pytest.approx(100)
    assert found.bottleneck == "GPU"
    assert simulated_s(ONLY_GPU, STEADY, 10, 100) == pytest.approx(10)


def test_a_shard_passes_all_stages_by_hand() -> None:
    costs = replace(ONLY_GPU, read_s=0.02, finish_s=0.03, write_s=0.01, driver_shard_s=0.5)
    expected = 100 * (0.02 + 0.01 + 0.03 + 0.01)
    assert simulated_s(costs, STEADY, 1, 100) == pytest.approx(expected + 0.5)
    found = model.forecast(costs, STEADY, images=100, images_a_shard=100)
    assert found.bottleneck == "too few shards"
    assert found.compute_s == pytest.approx(expected)


def test_seven_shards_on_three_gpus_take_three_rounds() -> None:
    assert simulated_s(ONLY_GPU, replace(STEADY, gpus=3), 7, 100) == pytest.approx(3 * 1.0)


@pytest.mark.parametrize("gpus", [1, 8, 50])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_paper_and_simulation_agree(gpus: int, spread: float) -> None:
    cluster = replace(STEADY, gpus=gpus, spread=spread)
    shards = 60 * gpus
    found = model.forecast(ALL, cluster, shards * 1_000, 1_000)
    assert found.bottleneck == "GPU"
    assert simulated_s(ALL, cluster, shards, 1_000) == pytest.approx(found.compute_s, rel=0.04)


@pytest.mark.parametrize(
    ("bottleneck", "costs", "cluster"),
    [
        ("decoders", {"decode_s": 0.04}, {}),
        ("CPUs for reading and writing", {"finish_s": 0.1}, {"task_cpus": 4.0}),
        ("network of the GPU nodes", {"bytes_in": 20e6}, {}),
        ("S3 GET", {"gets": 30.0}, {}),
        ("S3 PUT", {"puts_a_shard": 3_500 * 10.0}, {}),
        ("driver", {"driver_shard_s": 10.0}, {}),
    ],
)
def test_each_resource_can_be_the_bottleneck(
    bottleneck: str, costs: dict[str, float], cluster: dict[str, float]
) -> None:
    wider = replace(STEADY, gpus=4, **cluster)
    scarce = replace(ALL, **costs)
    found = model.forecast(scarce, wider, 400_000, 1_000)
    assert found.bottleneck == bottleneck
    if bottleneck != "S3 PUT":
        assert simulated_s(scarce, wider, 400, 1_000) == pytest.approx(found.compute_s, rel=0.05)


def test_bottleneck_switches_where_the_arithmetic_says() -> None:
    costs = replace(ONLY_GPU, gets=1.0)
    names = [
        model.forecast(costs, replace(STEADY, gpus=gpus), 10_000_000, 100).bottleneck
        for gpus in (54, 56)
    ]
    assert names == ["GPU", "S3 GET"], "100 images a second and GPU, 5,500 requests a second"
    more = replace(STEADY, gpus=56, prefixes=2)
    assert model.forecast(costs, more, 10_000_000, 100).bottleneck == "GPU"


def test_more_is_never_slower() -> None:
    paper, simulation = [], []
    for gpus in (1, 2, 5, 10, 40):
        cluster = replace(STEADY, gpus=gpus)
        paper.append(model.forecast(ALL, cluster, 400_000, 1_000).compute_s)
        simulation.append(simulated_s(ALL, cluster, 400, 1_000))
    assert paper == sorted(paper, reverse=True)
    assert simulation == sorted(simulation, reverse=True)
    for name in ("read_s", "decode_s", "predict_s", "finish_s", "bytes_in", "gets"):
        dearer = replace(ALL, **{name: getattr(ALL, name) * 3})
        assert (
            model.forecast(dearer, STEADY, 400_000, 1_000).compute_s
            >= model.forecast(ALL, STEADY, 400_000, 1_000).compute_s
        )


def test_lost_nodes_cost_time_and_nothing_else() -> None:
    cluster = replace(STEADY, gpus=20)
    shaky = replace(cluster, spot=True, loss_h=6.0, start_s=60.0)
    run = model.Simulation(ALL, shaky, 2_000, 1_000, seed=3)
    lost_s = run.run()
    assert run.losses > 5
    assert run._state.finished == 2_000
    assert run._state.todo == 0
    assert simulated_s(ALL, cluster, 2_000, 1_000) < lost_s < math.inf
    assert lost_s == simulated_s(ALL, shaky, 2_000, 1_000, seed=3)
    assert lost_s != simulated_s(ALL, shaky, 2_000, 1_000, seed=4)


@pytest.mark.parametrize("step", list(model.DRIVER_POINTS))
def test_line_of_the_driver_goes_through_what_was_measured(step: str) -> None:
    for point in model.DRIVER_POINTS[step]:
        wall_s, gib = model.driver_line(step, point.images, point.shards)
        assert wall_s == pytest.approx(point.wall_s, rel=0.3)
        if point.peak_mib is not None:
            assert gib * 1024 == pytest.approx(point.peak_mib, rel=0.15)


def test_larger_shards_move_the_walls_of_shards_only() -> None:
    small, large = (
        {wall.name: wall.images for wall in model.limits(ALL, 10**9, size)}
        for size in (100, 10_000)
    )
    for name in ("Ray's driver", "S3 PUT in one prefix", "log of the masks, one commit"):
        assert large[name] == pytest.approx(100 * small[name])
    memory = "memory to publish a first night"
    assert small[memory] < large[memory] < 1.5 * small[memory]
    walls = model.limits(ALL, 10**9, 1_000)
    assert [w.images for w in walls] == sorted(w.images for w in walls)
    assert walls[0].name == memory


def test_dollars_by_hand() -> None:
    prices = model.Prices(
        gpu_node_h=2.0, reader_node_h=0.0, head_h=1.0, spot_share=0.5, million_gets=0.4
    )
    cluster = replace(STEADY, start_s=1_800.0, idle_s=0.0)
    images = 180_000
    costs = replace(ONLY_GPU, gets=1.0)
    found = model.forecast(costs, cluster, images, 1_000)
    assert found.compute_s == pytest.approx(1_800)
    head = found.total_s(cluster) / 3600
    assert model.dollars(costs, cluster, prices, found, images) == pytest.approx(
        2.0 + head + 0.18 * 0.4
    )
    spot = replace(cluster, spot=True)
    assert model.dollars(costs, spot, prices, found, images) == pytest.approx(
        1.0 + head + 0.18 * 0.4
    )


def test_costs_are_taken_from_a_run(
    segment_here: Callable[..., Any],
    config: Callable[..., Any],
    phantoms: Path,
    demo_bundle: str,
    tmp_path: Path,
) -> None:
    first = min(path for path in phantoms.iterdir() if path.is_dir())
    source = Path(shutil.copytree(first, tmp_path / "source" / first.name)).parent
    done = segment_here(str(source), str(tmp_path / "out"), demo_bundle, config(), run_id="r")
    costs = model.measure(str(tmp_path / "out"), "r", 1e9, peak_tflops=10.0, share=0.5)
    files = sum(path.stat().st_size for path in source.rglob("*.png"))
    assert costs.bytes_in * done.computed_images == pytest.approx(files)
    assert costs.predict_s == pytest.approx(1e9 / 5e12)
    stages = done.stage_seconds
    assert costs.decode_s * done.computed_images == pytest.approx(stages["decode"], rel=0.05)
    assert costs.bytes_out > 0
    for name in ("read_s", "decode_s", "finish_s", "write_s", "bytes_in", "bytes_out"):
        assert costs.origin[name].startswith("measured")
    assert costs.origin["predict_s"].startswith("assumed")
