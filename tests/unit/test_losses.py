"""Losses against values worked out by hand, and against each other."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.config import LossConfig, loss_terms
from pipeline.errors import ConfigError
from pipeline.losses import (
    binary_cross_entropy,
    boundary_weights,
    cross_entropy,
    focal,
    make_loss,
    soft_dice,
    tversky,
)
from pipeline.records import UNLABELLED


def pixels(*logits: list[float]) -> torch.Tensor:
    """One image of one row; a list of logits a pixel, as NKHW."""
    return torch.tensor(logits).T[None, :, None, :]


def labels(*values: int) -> torch.Tensor:
    return torch.tensor([[list(values)]], dtype=torch.uint8)


PAIRS = [
    *(("softmax", term) for term in ("cross_entropy", "dice", "focal", "tversky", "boundary")),
    *(("sigmoid", term) for term in ("bce", "dice", "focal", "tversky", "boundary")),
]


def test_cross_entropy_has_the_published_values():
    one = cross_entropy(pixels([2.0, -1.0, 0.5]), labels(0))
    assert one.item() == pytest.approx(0.241311, abs=1e-6)
    assert cross_entropy(pixels([0.0, 0.0]), labels(1)).item() == pytest.approx(math.log(2))
    z = torch.randn(2, 1, 4, 5)
    target = torch.randint(0, 2, (2, 4, 5))
    two = cross_entropy(torch.cat([torch.zeros_like(z), z], 1), target)
    assert two.item() == pytest.approx(binary_cross_entropy(z, target).item(), rel=1e-6)


def test_class_weights_and_ignored_pixels_are_those_of_torch():
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    target[0, 0] = UNLABELLED
    weights = torch.tensor([0.2, 1.0, 3.0])
    wanted = functional.cross_entropy(logits, target, weights, ignore_index=UNLABELLED)
    assert cross_entropy(logits, target, weights).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize(("activation", "term"), PAIRS)
def test_a_batch_without_a_counted_pixel_gives_0_and_no_gradient(term, activation):
    loss = make_loss(LossConfig(terms={term: 1.0}), activation)
    for over in ("batch", "image"):
        loss = make_loss(LossConfig(terms={term: 1.0}, dice_over=over), activation)
        logits = torch.randn(2, 2, 4, 4, requires_grad=True)
        value = loss(logits, torch.full((2, 4, 4), UNLABELLED), torch.ones(2, 4, 4))
        value.backward()
        assert value.item() == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(("activation", "term"), PAIRS)
def test_ignored_pixels_reach_neither_value_nor_gradient(term, activation):
    loss = make_loss(LossConfig(terms={term: 1.0}), activation)
    target = torch.randint(0, 2, (1, 4, 6))
    target[..., 3:] = UNLABELLED
    logits = torch.randn(1, 2, 4, 6)
    values = []
    for wild in (0.0, 50.0):
        changed = logits.clone()
        changed[..., 3:] += wild
        changed.requires_grad_()
        value = loss(changed, target, torch.ones(1, 4, 6))
        value.backward()
        values.append(value.item())
        assert not changed.grad[..., 3:].any()
        assert changed.grad[..., :3].any()
    assert values[0] == values[1]


def test_soft_dice_by_hand():
    logits = torch.logit(torch.tensor([[[[0.8, 0.4]]], [[[0.5, 0.5]]]]))
    target = torch.tensor([[[1, 0]], [[1, 0]]])
    batch = soft_dice(logits, target, "sigmoid", smooth=1.0)
    assert batch.item() == pytest.approx(1 - (2 * 1.3 + 1) / (2.2 + 2 + 1), rel=1e-6)
    image = soft_dice(logits, target, "sigmoid", over="image", smooth=1.0)
    each = [1 - (2 * 0.8 + 1) / (1.2 + 1 + 1), 1 - (2 * 0.5 + 1) / (1 + 1 + 1)]
    assert image.item() == pytest.approx(np.mean(each), rel=1e-6)


def test_tversky_with_equal_weights_is_dice():
    logits, target = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    half = tversky(logits, target, "softmax", alpha=0.5, beta=0.5, smooth=0.5)
    assert half.item() == pytest.approx(soft_dice(logits, target, "softmax").item(), rel=1e-6)
    p = torch.tensor([[[[0.8, 0.4]]]])
    by_hand = 1 - (0.8 + 1) / (0.8 + 0.3 * 0.4 + 0.7 * 0.2 + 1)
    found = tversky(torch.logit(p), labels(1, 0), "sigmoid")
    assert found.item() == pytest.approx(by_hand, rel=1e-6)


def test_focal_loss_is_cross_entropy_at_gamma_0_and_falls_with_gamma():
    logits, target = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    plain = cross_entropy(logits, target).item()
    assert focal(logits, target, "softmax", gamma=0.0).item() == pytest.approx(plain, rel=1e-6)
    assert focal(logits, target, "softmax", gamma=2.0).item() < plain
    one = focal(torch.logit(torch.tensor([[[[0.75]]]])), labels(1), "sigmoid", gamma=2.0)
    assert one.item() == pytest.approx(0.25**2 * -math.log(0.75), rel=1e-5)
    z, binary = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8))
    bce = binary_cross_entropy(z, binary).item()
    assert focal(z, binary, "sigmoid", gamma=0.0).item() == pytest.approx(bce, rel=1e-6)


def test_slopes_of_the_focal_loss_stay_finite_for_certain_pixels():
    for gamma in (0.5, 1.0, 2.0):
        z = torch.full((1, 1, 1, 1), 40.0, requires_grad=True)
        focal(z, labels(1), "sigmoid", gamma=gamma).backward()
        assert torch.isfinite(z.grad).all()


def test_gaps_between_close_objects_weigh_most():
    mask = np.zeros((9, 21), np.uint8)
    mask[:, :8], mask[:, 11:] = 1, 1
    weights = boundary_weights(mask)
    assert weights[4, 4] == 1
    assert weights[4, 9] == pytest.approx(1 + 10 * math.exp(-(4**2) / 50), rel=1e-6)
    mask[:, 11:13] = 0
    assert boundary_weights(mask)[4, 9] < weights[4, 9]
    assert (boundary_weights(np.ones((4, 4), np.uint8)) == 1).all()


def test_a_sum_is_the_weighted_sum_of_its_terms():
    logits, target = torch.randn(2, 2, 8, 8), torch.randint(0, 2, (2, 8, 8))
    both = make_loss(LossConfig(terms={"dice": 2.0, "cross_entropy": 0.5}), "softmax")
    wanted = 2 * soft_dice(logits, target, "softmax") + 0.5 * cross_entropy(logits, target)
    assert both(logits, target, None).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert loss_terms(LossConfig(), "sigmoid") == {"dice": 1.0, "bce": 1.0}
    assert loss_terms(LossConfig(), "softmax") == {"dice": 1.0, "cross_entropy": 1.0}


@pytest.mark.parametrize(
    ("terms", "activation", "weights"),
    [({"bce": 1.0}, "softmax", ()), ({"dice": 1.0}, "softmax", (1.0, 2.0))],
)
def test_terms_that_do_not_fit_are_refused(terms, activation, weights):
    with pytest.raises(ConfigError, match="loss"):
        loss_terms(LossConfig(terms=terms, class_weights=weights), activation)
