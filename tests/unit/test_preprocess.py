import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.errors import BadImage, BundleError, ErrorClass
from pipeline.synthetic import make_phantom
from pipeline.transforms import READY_RECIPES, recipe_from_plain
from pipeline.transforms.preprocess import (
    Context,
    CropToContent,
    DropEndSlices,
    PadToMultiple,
    PadToSquare,
    Resize,
    ScaleBy,
    ScaleToRange,
    ToChannels,
    ZScore,
    apply_preprocess,
    to_native,
    trace_from_plain,
    trace_to_plain,
)

RNG = np.random.default_rng(5)


def volume(shape=(9, 70, 58, 3), seed=0):
    """Something with empty borders on all sides, as a scan has."""
    rng = np.random.default_rng(seed)
    values = np.zeros(shape, np.uint8)
    values[1:-1, 6:-9, 11:-3] = rng.integers(
        0, 256, (shape[0] - 2, shape[1] - 15, shape[2] - 14, shape[3])
    )
    return values


def published_recipe(volume_ZHWC, side):
    """The brain-segmentation recipe, written down from its description, slow and plain."""
    v = volume_ZHWC[1:-1].copy()
    v[v < 0.1 * v.max()] = 0
    z, y, x = (
        np.flatnonzero(v.max(axis=tuple(a for a in range(4) if a != axis))) for axis in range(3)
    )
    v = v[z[0] : z[-1] + 1, y[0] : y[-1] + 1, x[0] : x[-1] + 1]
    short = max(v.shape[1:3]) - np.array(v.shape[1:3])
    v = np.pad(v, [(0, 0)] + [(d // 2, d - d // 2) for d in short] + [(0, 0)])
    unit = v / 255.0
    factors = (1, side / v.shape[1], side / v.shape[2], 1)
    resized = ndimage.zoom(unit, factors, order=2, mode="grid-constant", grid_mode=True)
    resized = np.clip(resized, unit.min(), unit.max())
    p10, p99 = np.percentile(resized, (10, 99))
    rescaled = np.clip((resized - p10) / (p99 - p10), 0, 1)
    return (rescaled - rescaled.mean(axis=(0, 1, 2))) / rescaled.std(axis=(0, 1, 2))


def buda_steps(side):
    plain = READY_RECIPES["buda-lgg"]
    steps = [
        s | {"height": side, "width": side} if s["step"] == "resize" else s
        for s in plain["preprocess"]
    ]
    return recipe_from_plain({**plain, "preprocess": steps}).preprocess


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_buda_recipe_is_the_published_one(kind):
    source = volume()
    ready, _ = apply_preprocess(kind(source), buda_steps(64), Context(full_scale=255.0))
    expected = published_recipe(source, 64)
    assert np.abs(np.asarray(ready) - expected).max() < 1e-9 * np.abs(expected).max()


def test_buda_recipe_on_real_patients(shared):
    from PIL import Image

    for patient in sorted(shared("data", "lgg").iterdir())[:2]:
        names = list(patient.glob("*.webp"))
        names.sort(key=lambda p: int(p.stem.rpartition("_")[2]))
        source = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in names[:8]])
        ready, _ = apply_preprocess(source, buda_steps(256), Context(full_scale=255.0))
        expected = published_recipe(source, 256)
        assert np.abs(ready - expected).max() < 1e-9 * np.abs(expected).max()


def test_resize_is_at_least_20_times_faster_than_the_4d_resize():
    unit = RNG.random((4, 200, 180, 3))
    step = Resize(height=256, width=256, order=2)
    step.apply(unit, Context())
    started = time.perf_counter()
    ours, _ = step.apply(unit, Context())
    ours_s = time.perf_counter() - started
    started = time.perf_counter()
    ndimage.zoom(unit, (1, 256 / 200, 256 / 180, 1), order=2, mode="grid-constant", grid_mode=True)
    assert (time.perf_counter() - started) / ours_s > 20
    assert ours.shape == (4, 256, 256, 3)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("size", [(33, 91), (128, 40), (57, 57), (1, 1)])
def test_resize_equals_the_spline_of_the_whole_volume(order, size):
    unit = RNG.random((2, 57, 64, 3))
    factors = (1, size[0] / 57, size[1] / 64, 1)
    whole = ndimage.zoom(unit, factors, order=order, mode="grid-constant", grid_mode=True)
    ours, _ = Resize(height=size[0], width=size[1], order=order).apply(unit, Context())
    assert np.abs(ours - np.clip(whole, unit.min(), unit.max())).max() < 1e-12


STEPS = st.lists(
    st.one_of(
        st.just(DropEndSlices()),
        st.just(CropToContent()),
        st.just(PadToSquare()),
        st.builds(PadToMultiple, of=st.integers(1, 40)),
        st.builds(Resize, height=st.integers(8, 90), width=st.integers(8, 90), order=st.just(0)),
        st.builds(ScaleBy, factor=st.sampled_from([0.5, 1.0, 1.7])),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, z=st.integers(1, 6), seed=st.integers(0, 99))
def test_masks_always_return_to_the_native_grid(steps, z, seed):
    source = np.random.default_rng(seed).integers(1, 256, (z, 31, 44, 1), np.uint8)
    ready, trace = apply_preprocess(source, steps, Context(full_scale=255.0))
    trace = trace_from_plain(trace_to_plain(trace))
    native = to_native(np.ones(ready.shape[:3], np.uint8), trace)
    assert native.shape == source.shape[:3]
    only_windows = all(move.kind == "window" for move in trace)
    if only_windows:
        back = to_native(np.ascontiguousarray(ready[..., 0]), trace)
        kept = native > 0
        assert np.array_equal(back[kept], source[..., 0][kept])


def test_a_single_picture_and_an_empty_one_pass_the_volume_recipe():
    steps = buda_steps(64)
    for source in (
        volume()[4:5],
        np.zeros((1, 30, 40, 3), np.uint8),
        np.full((5, 30, 40, 3), 9, np.uint8),
    ):
        ready, trace = apply_preprocess(source, steps, Context(full_scale=255.0))
        assert np.isfinite(ready).all()
        assert to_native(np.zeros(ready.shape[:3], np.uint8), trace).shape == source.shape[:3]


def test_channels_and_ranges():
    grey = RNG.integers(0, 256, (2, 5, 6, 1), np.uint8)
    assert ToChannels(count=3).apply(grey, Context())[0].shape == (2, 5, 6, 3)
    rgb, _ = ToChannels(count=1).apply(np.repeat(grey, 3, 3), Context())
    assert np.allclose(rgb, grey)
    with pytest.raises(BadImage) as caught:
        ToChannels(count=2).apply(np.repeat(grey, 3, 3), Context())
    assert caught.value.error_class == ErrorClass.CHANNEL_MISMATCH
    assert ScaleToRange().apply(grey, Context(full_scale=255.0))[0].max() <= 1
    own, _ = ScaleToRange(of="volume", low=-1).apply(grey, Context(full_scale=255.0))
    assert (own.min(), own.max()) == (-1, 1)
    each, _ = ZScore(over="image").apply(grey, Context())
    assert np.allclose(each.mean(axis=(1, 2)), 0)


def test_numpy_and_torch_give_the_same_values():
    source = make_phantom(3).volume_ZHW[..., None]
    for name in READY_RECIPES:
        steps = recipe_from_plain(READY_RECIPES[name]).preprocess
        one, trace = apply_preprocess(source, steps, Context(full_scale=255.0))
        other, trace_too = apply_preprocess(
            torch.from_numpy(source), steps, Context(full_scale=255.0)
        )
        assert trace == trace_too
        assert np.allclose(one, other.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"preprocess": [{"step": "resize", "height": 4}], "postprocess": []}, "width"),
        ({"preprocess": [{"step": "rezise"}]}, "unknown preprocessing step 'rezise'"),
        ({"postprocess": [{"step": "sigmoid"}]}, "threshold or argmax"),
        ({"postprocess": [{"step": "sigmoid"}, {"step": "argmax"}]}, "argmax needs softmax"),
        ({"postprocess": [{"step": "threshold"}, {"step": "sigmoid"}]}, "the order is"),
        (
            {"postprocess": [{"step": "sigmoid"}, {"step": "threshold", "att": 1.0}]},
            "unknown key 'att'",
        ),
        ({"extra": []}, "unknown part"),
    ],
)
def test_recipes_that_cannot_work_are_refused(recipe, words):
    with pytest.raises(BundleError, match=words):
        recipe_from_plain(recipe)
