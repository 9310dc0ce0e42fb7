"""Augmentation: images and masks move together, and every number follows from its seed."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.config import AugmentConfig
from pipeline.transforms.augment import augment, crop_corners, sample_seeds, uniform

OFF = AugmentConfig(flip_horizontal=0.0, rotation_deg=0.0, scale=0.0)
SEEDS = sample_seeds(7, 3, np.arange(4))
GEOMETRY = {
    "flip_horizontal": 1.0,
    "flip_vertical": 1.0,
    "rotation_deg": 30.0,
    "scale": 0.3,
    "shift": 0.2,
    "elastic_px": 4.0,
}
INTENSITY = {"gamma": 0.5, "brightness": 0.5, "contrast": 0.5, "noise": 0.5, "blur_px": 2.0}


def images(height: int = 48, width: int = 40) -> torch.Tensor:
    """Smooth, and different everywhere."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None]
    base = torch.stack([torch.sin(3 * x + y), y * x + 0.5 * y])
    return base.expand(4, 2, height, width).clone()


def no_labels(batch: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(batch), *batch.shape[2:], dtype=torch.uint8)


@pytest.mark.parametrize("change", GEOMETRY)
def test_a_marked_patch_moves_with_its_mask(change):
    marked = torch.zeros(4, 1, 48, 40)
    marked[:, :, 10:17, 22:29] = 1.0
    masks = marked[:, 0].to(torch.uint8) * 3
    config = dataclasses.replace(OFF, **{change: GEOMETRY[change]})
    moved, moved_masks, moved_weights = augment(marked, masks, SEEDS, config, marked[:, 0])
    assert set(moved_masks.unique().tolist()) <= {0, 3}
    assert moved_masks.dtype == torch.uint8
    assert not torch.equal(moved_masks, masks)
    inside, outside = moved[:, 0] > 0.75, moved[:, 0] < 0.25
    assert inside.any()
    assert (moved_masks[inside] == 3).all()
    assert (moved_masks[outside] == 0).all()
    assert torch.allclose(moved_weights, moved[:, 0])


def test_every_label_survives_as_itself():
    masks = torch.randint(0, 200, (4, 48, 40), dtype=torch.uint8)
    masks[:, :4] = 255
    _, moved, _ = augment(images(), masks, SEEDS, AugmentConfig(elastic_px=3.0, shift=0.1))
    assert set(moved.unique().tolist()) <= set(masks.unique().tolist())


@pytest.mark.parametrize("change", [*GEOMETRY, *INTENSITY])
def test_each_change_alone_changes_the_image_and_depends_on_the_seed_alone(change):
    batch = images()
    value = {**GEOMETRY, **INTENSITY}[change]
    config = dataclasses.replace(OFF, probability=1.0, **{change: value})
    first, labels, _ = augment(batch, no_labels(batch), SEEDS, config)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, batch)
    if change in INTENSITY:
        assert not labels.any()
    again, _, _ = augment(batch, no_labels(batch), SEEDS, config)
    assert torch.equal(first, again)
    alone, _, _ = augment(batch[2:3], no_labels(batch[2:3]), SEEDS[2:3], config)
    assert torch.allclose(alone[0], first[2], atol=1e-6)
    if not change.startswith("flip"):
        other, _, _ = augment(batch, no_labels(batch), sample_seeds(8, 3, np.arange(4)), config)
        assert not torch.equal(first, other)


def test_nothing_asked_for_changes_nothing():
    batch = images()
    same, labels, weights = augment(batch, no_labels(batch), SEEDS, OFF)
    assert torch.equal(same, batch)
    assert not labels.any()
    assert weights is None


def test_turning_one_change_on_leaves_the_draws_of_the_others():
    batch = images()
    brighter = dataclasses.replace(OFF, probability=1.0, brightness=0.5)
    both = dataclasses.replace(brighter, flip_horizontal=0.5)
    bright, _, _ = augment(batch, no_labels(batch), SEEDS, brighter)
    flipped, _, _ = augment(batch, no_labels(batch), SEEDS, both)
    shift = (bright - batch).mean((1, 2, 3))
    assert torch.allclose((flipped - batch).mean((1, 2, 3)), shift, atol=1e-5)


def test_probability_0_leaves_intensities_alone():
    batch = images()
    config = dataclasses.replace(OFF, probability=0.0, **INTENSITY)
    assert torch.equal(augment(batch, no_labels(batch), SEEDS, config)[0], batch)


def test_rotation_keeps_circles_round_in_oblong_images():
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(100.0), indexing="ij")
    disc = ((y - 29.5) ** 2 + (x - 49.5) ** 2 < 15**2).to(torch.uint8)[None].repeat(4, 1, 1)
    turned = dataclasses.replace(OFF, rotation_deg=90.0)
    _, moved, _ = augment(disc[:, None].float(), disc, SEEDS, turned)
    assert ((moved != disc).sum((1, 2)) < 0.08 * disc[0].sum()).all()


def test_uniform_numbers_are_uniform_and_streams_differ():
    seeds = sample_seeds(0, 0, np.arange(20_000))
    values = uniform(seeds, "flip", 2)
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.var() - 1 / 12) < 0.005
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(values[:, 0], uniform(seeds, "scale", 1)[:, 0])[0, 1]) < 0.03
    assert len(np.unique(sample_seeds(0, 1, np.arange(1000)))) == 1000


def test_crops_stay_inside_where_they_can_and_are_centred_where_they_cannot():
    seeds = sample_seeds(1, 1, np.arange(500))
    sizes = np.tile([[40, 20]], (500, 1))
    corners = crop_corners(seeds, sizes, 32)
    assert corners[:, 0].min() == 0 and corners[:, 0].max() == 8
    assert set(corners[:, 1]) == {-6}
