"""Acceptance on real brain MRI: one mask whatever the container, the layout and the batch."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from pipeline.bundle import import_weights, load_bundle, load_model
from pipeline.config import SegmentConfig, load_config
from pipeline.flows.segment import run_segment
from pipeline.formats import open_source
from pipeline.records import sha256_hex
from pipeline.sharding import write_shards
from pipeline.transforms.preprocess import Context, apply_preprocess, to_native

PATTERNS = {
    "source.images": "{case}/{case}_{slice}.tif",
    "source.masks": "{case}/{case}_{slice}_mask.tif",
}
NUM_PATIENTS = {"quick": 2, "whole": 64}


@pytest.fixture(scope="module")
def buda(shared, tmp_path_factory) -> str:
    weights = shared("data", "seed", "buda_layout_w32.pt")
    return import_weights("buda", str(weights), str(tmp_path_factory.mktemp("b") / "buda")).uri


def unpack(shared, folder: Path, patients: int) -> Path:
    script = shared("data", "unpack_lgg.py")
    subprocess.run(
        [sys.executable, script, folder, "--patients", str(patients)],
        check=True,
        capture_output=True,
    )
    return folder


def plain_loop(folder: Path, bundle_uri: str) -> dict[str, str]:
    """The same recipe without Ray, without the predictor: what the masks must equal."""
    bundle = load_bundle(bundle_uri)
    model = load_model(bundle)
    digests = {}
    for case in sorted(folder.iterdir()):
        names = [p.stem.rpartition("_")[2] for p in case.glob("*.tif") if "mask" not in p.stem]
        names.sort(key=int)
        volume = np.stack([np.asarray(Image.open(case / f"{case.name}_{n}.tif")) for n in names])
        ready, trace = apply_preprocess(volume, bundle.recipe.preprocess, Context(full_scale=255.0))
        images = torch.from_numpy(np.moveaxis(ready, 3, 1).astype(np.float32))
        with torch.inference_mode():
            logits = torch.cat([model(batch) for batch in images.split(8)])
        mask = torch.sigmoid(logits)[:, 0].numpy() > 0.5
        numbers, count = ndimage.label(mask)
        if count > 1:
            mask = numbers == 1 + np.argmax(np.bincount(numbers.ravel())[1:])
        native = to_native(mask.astype(np.uint8), trace)
        for name, mask_HW in zip(names, native, strict=True):
            digests[f"{case.name}/{name}"] = sha256_hex(mask_HW.tobytes())
    return digests


@pytest.mark.parametrize("size", ["quick", pytest.param("whole", marks=pytest.mark.storm)])
@pytest.mark.timeout(7200)
def test_folder_parquet_tar_and_plain_loop_agree(
    size, shared, buda, tmp_path, ray_session, read_digests
) -> None:
    folder = unpack(shared, tmp_path / "lgg", NUM_PATIENTS[size])
    expected = plain_loop(folder, buda)
    config = load_config(SegmentConfig, options=PATTERNS)
    source = open_source(str(folder), config.source, config.limits)
    summary = run_segment(str(folder), str(tmp_path / "r-folder"), buda, config)
    assert summary.computed_images == len(expected)
    assert read_digests(tmp_path / "r-folder") == expected
    for kind in ("parquet", "tar"):
        write_shards(source, str(tmp_path / kind), kind)
        run_segment(str(tmp_path / kind), str(tmp_path / f"r-{kind}"), buda, SegmentConfig())
        assert read_digests(tmp_path / f"r-{kind}") == expected, kind


@pytest.mark.storm
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("batch_size", "actors", "shuffled"),
    [(1, 1, False), (7, 2, False), (32, 3, False), (7, 2, True)],
)
def test_layout_does_not_reach_a_mask(
    batch_size, actors, shuffled, shared, buda, tmp_path, ray_session, read_digests
) -> None:
    folder = unpack(shared, tmp_path / "lgg", 6)
    expected = plain_loop(folder, buda)
    if shuffled:
        files = list(folder.rglob("*.tif"))
        random.Random(7).shuffle(files)
        for path in files:
            target = tmp_path / "shuffled" / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        folder = tmp_path / "shuffled"
    options = PATTERNS | {"inference.batch_size": batch_size, "resources.actors": actors}
    config = load_config(SegmentConfig, options=options)
    run_segment(str(folder), str(tmp_path / "r"), buda, config)
    assert read_digests(tmp_path / "r") == expected
