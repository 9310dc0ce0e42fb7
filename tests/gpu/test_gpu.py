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
