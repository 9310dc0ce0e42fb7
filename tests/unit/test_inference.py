import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pipeline.bundle import load_bundle, load_model, save_bundle
from pipeline.config import InferenceConfig
from pipeline.errors import BadImage, ErrorClass
from pipeline.inference import Predictor
from pipeline.models.unet import UNet, UNetOptions
from pipeline.synthetic import make_phantom
from pipeline.transforms.preprocess import Context, apply_preprocess

VOLUMES = [make_phantom(i, num_slices=5, side=48).volume_ZHW[..., None] for i in range(4)]


def make_bundle(folder, options, recipe=None, labels=("lesion",), state=None):
    torch.manual_seed(4)
    state = state or UNet(options).state_dict()
    return save_bundle(
        str(folder),
        name="t",
        architecture="unet",
        options=dataclasses.asdict(options),
        labels=list(labels),
        recipe=recipe
        or {
            "preprocess": [{"step": "scale_to_range"}],
            "postprocess": [{"step": "sigmoid"}, {"step": "threshold"}],
        },
        weights=save({k: v.contiguous() for k, v in state.items()}),
        provenance={},
    )


@pytest.fixture(scope="module")
def demo(demo_bundle):
    return load_bundle(demo_bundle)


def labels_of(bundle, volumes, **config):
    found = list(Predictor(bundle, InferenceConfig(**config), "cpu").predict(iter(volumes)))
    return [item.labels_ZHW for item in found]


def test_predictions_are_those_of_a_plain_loop(demo):
    model = load_model(demo)
    for volume, labels in zip(VOLUMES, labels_of(demo, VOLUMES), strict=True):
        ready, _ = apply_preprocess(volume, demo.recipe.preprocess, Context(full_scale=255.0))
        with torch.inference_mode():
            logits = model(torch.from_numpy(np.moveaxis(ready, 3, 1).astype(np.float32)))
        assert np.array_equal(labels, (torch.sigmoid(logits)[:, 0] > 0.5).numpy())
        assert labels.any()


def test_batch_size_order_and_neighbours_change_no_bit(demo):
    predictor = Predictor(demo, InferenceConfig(), "cpu")
    images = torch.rand(9, 1, 48, 48)
    whole = predictor.predict_logits(images)
    for size in (1, 2, 5):
        parts = [predictor.predict_logits(part) for part in images.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    expected = labels_of(demo, VOLUMES)
    for batch_size in (1, 7, 32):
        found = labels_of(demo, VOLUMES[::-1], batch_size=batch_size)[::-1]
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_cases_of_different_sizes_share_a_run_and_keep_their_order(demo):
    sizes = [(48, 40), (31, 57), (48, 40), (100, 33)]
    rng = np.random.default_rng(0)
    volumes = [rng.integers(0, 256, (2, *size, 1), np.uint8) for size in sizes]
    expected = [labels_of(demo, [volume])[0] for volume in volumes]
    found = labels_of(demo, volumes)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_windows_agree_with_the_whole_image_away_from_borders(demo):
    big = np.tile(VOLUMES[0][:1], (1, 3, 3, 1))
    whole = labels_of(demo, [big], window=0)[0]
    windowed = labels_of(demo, [big], window=96, overlap=0.5)[0]
    assert whole.any()
    assert (whole != windowed).mean() < 0.002


def test_flips_are_averaged_and_flip_back(demo):
    flipped = [volume[:, :, ::-1] for volume in VOLUMES]
    straight = labels_of(demo, VOLUMES, tta=True)
    mirrored = labels_of(demo, flipped, tta=True)
    for a, b in zip(straight, mirrored, strict=True):
        assert (a != b[:, :, ::-1]).mean() < 1e-3


def test_bf16_and_channels_last_are_near_fp32(demo):
    expected = labels_of(demo, VOLUMES)
    for config in ({"channels_last": True}, {"dtype": "bf16"}):
        found = labels_of(demo, VOLUMES, **config)
        wrong = sum((a != b).sum() for a, b in zip(expected, found, strict=True))
        assert wrong <= 0.002 * sum(a.size for a in expected)


def test_out_of_memory_halves_the_batch_and_says_so(demo, monkeypatch):
    predictor = Predictor(demo, InferenceConfig(forward_batch=8), "cpu")
    expected = [p.labels_ZHW for p in predictor.predict(VOLUMES)]
    real = predictor._forward
    shapes = []

    def forward(images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        shapes.append(tuple(images.shape))
        return real(images)

    monkeypatch.setattr(predictor, "_forward", forward)
    found = [p.labels_ZHW for p in predictor.predict(VOLUMES)]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(set(shapes)) == 1
    assert predictor.notes == [
        "out of memory: from here on 4 slices a forward pass",
        "out of memory: from here on 2 slices a forward pass",
    ]


def test_other_errors_are_not_taken_for_out_of_memory(demo, monkeypatch):
    predictor = Predictor(demo, InferenceConfig(), "cpu")

    def forward(images):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(predictor, "_forward", forward)
    with pytest.raises(RuntimeError, match="assert"):
        list(predictor.predict(VOLUMES))


def test_nonfinite_logits_are_marked_slice_by_slice(tmp_path):
    options = UNetOptions(in_channels=1, width=2, depth=1)
    volume = np.zeros((3, 16, 16, 1), np.float32)
    volume[1] = 3e38
    plain = {"preprocess": [], "postprocess": [{"step": "sigmoid"}, {"step": "threshold"}]}
    ones = {k: torch.ones_like(v) for k, v in UNet(options).state_dict().items()}
    bundle = make_bundle(tmp_path / "c", options, recipe=plain, state=ones)
    (result,) = Predictor(bundle, InferenceConfig(), "cpu").predict([volume])
    assert result.finite_Z.tolist() == [True, False, True]
    assert result.labels_ZHW[0].all()


def test_the_2015_network_predicts_any_size(tmp_path):
    options = UNetOptions(
        in_channels=1, out_channels=2, width=2, depth=2, norm=False, bias=True, valid=True
    )
    recipe = {
        "preprocess": [{"step": "scale_to_range"}],
        "postprocess": [{"step": "softmax"}, {"step": "argmax"}],
    }
    bundle = make_bundle(tmp_path / "b", options, recipe=recipe)
    for size in ((1, 1), (20, 33), (64, 64)):
        (result,) = Predictor(bundle, InferenceConfig(), "cpu").predict(
            [np.ones((1, *size, 1), np.uint8)]
        )
        assert result.labels_ZHW.shape == (1, *size)


def test_logits_return_to_the_native_grid_before_the_decision(tmp_path):
    recipe = {
        "preprocess": [{"step": "drop_end_slices"}, {"step": "scale_by", "factor": 0.5}],
        "postprocess": [{"step": "to_native_grid"}, {"step": "softmax"}, {"step": "argmax"}],
    }
    bundle = make_bundle(
        tmp_path / "b", UNetOptions(in_channels=1, out_channels=2, width=2), recipe
    )
    (result,) = Predictor(bundle, InferenceConfig(), "cpu").predict([VOLUMES[0]])
    assert result.labels_ZHW.shape == VOLUMES[0].shape[:3]
    assert result.trace == ()
    assert not result.labels_ZHW[[0, -1]].any()


def test_a_case_that_does_not_fit_costs_only_itself(demo):
    wrong = np.zeros((2, 16, 16, 2), np.uint8)
    first, second, third = Predictor(demo, InferenceConfig(), "cpu").predict(
        [VOLUMES[0], wrong, VOLUMES[1]]
    )
    assert isinstance(second, BadImage)
    assert second.error_class == ErrorClass.CHANNEL_MISMATCH
    assert np.array_equal(first.labels_ZHW, labels_of(demo, [VOLUMES[0]])[0])
    assert np.array_equal(third.labels_ZHW, labels_of(demo, [VOLUMES[1]])[0])
