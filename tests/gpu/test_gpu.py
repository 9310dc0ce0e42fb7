"""What must hold on a real CUDA device; skipped where there is none."""

import numpy as np
import pytest
import torch

from pipeline.bundle import load_bundle
from pipeline.config import InferenceConfig
from pipeline.inference import Predictor
from pipeline.synthetic import make_phantom

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOLUMES = [make_phantom(i).volume_ZHW[..., None] for i in range(6)]


def labels(bundle, device, **config):
    predictor = Predictor(load_bundle(bundle), InferenceConfig(**config), device)
    return [item.labels_ZHW for item in predictor.predict(VOLUMES)]


def test_the_gpu_agrees_with_the_cpu(demo_bundle):
    cpu, gpu = labels(demo_bundle, "cpu"), labels(demo_bundle, "cuda")
    wrong = sum((a != b).sum() for a, b in zip(cpu, gpu, strict=True))
    assert wrong <= 1e-5 * sum(a.size for a in cpu) + 1


def test_batches_change_no_bit_on_the_gpu(demo_bundle):
    expected = labels(demo_bundle, "cuda")
    for batch_size in (1, 7, 32):
        found = labels(demo_bundle, "cuda", batch_size=batch_size)
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_training_on_a_gpu_learns_and_resumes(phantoms, tmp_path):
    from pipeline import preparation
    from pipeline.config import TrainConfig, load_config
    from pipeline.training import run_worker

    config = load_config(
        TrainConfig,
        options={
            "source.images": "{case}/{case}_{slice}.png",
            "source.masks": "{case}/{case}_{slice}_mask.png",
            "labels": ["lesion"],
            "epochs": 20,
            "batch_size": 8,
            "model.options": {"width": 8, "depth": 3},
            "split.validation_patients": ["phantom_0006", "phantom_0007"],
            "sampling.by": "foreground",
            "optimizer.lr": 1e-2,
            "augment.elastic_px": 2.0,
            "augment.noise": 0.1,
        },
    )
    request = preparation.check_request(str(phantoms), str(tmp_path / "out"), config)
    job = preparation.make_job(request)
    index = preparation.index_here(job.index_job, preparation.shard_groups(request))
    preparation.write_index(request.out, index)
    job = preparation.with_index(job, index)
    assert run_worker(job, device="cuda", tell=lambda state: state.get("step", 0) >= 10) is None
    result = run_worker(job, device="cuda")
    assert result["device"] == "cuda"
    assert result["mean_dice"] > 0.8
