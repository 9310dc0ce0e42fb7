"""Updates: schedules, averaging, accumulation, recomputation, and the state between them."""

import numpy as np
import pytest
import torch

from pipeline.config import (
    AugmentConfig,
    NumericsConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from pipeline.learning import Learner, Ranks, learning_rate, validations_since_best
from pipeline.loading import Batch
from pipeline.losses import make_loss
from pipeline.models.unet import UNet, UNetOptions
from pipeline.transforms.augment import sample_seeds

STILL = AugmentConfig(flip_horizontal=0.0, rotation_deg=0.0, scale=0.0)
PLAIN = NumericsConfig(dtype="fp32", channels_last=False)


def batch(number: int = 0, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(size, 1, 16, 16, generator=generator)
    return Batch(
        images_NCHW=images,
        labels_NHW=(images[:, 0] > 0.5).to(torch.uint8),
        weights_NHW=None,
        seeds_N=sample_seeds(0, 0, np.arange(size)),
    )


def learner(norm: bool = True, optimizer: OptimizerConfig | None = None, **numerics) -> Learner:
    config = TrainConfig(
        batch_size=4,
        augment=STILL,
        optimizer=optimizer or OptimizerConfig(ema=0.0),
        numerics=NumericsConfig(**{"dtype": "fp32", "channels_last": False, **numerics}),
    )
    torch.manual_seed(0)
    model = UNet(UNetOptions(in_channels=1, width=4, depth=2, norm=norm, bias=not norm))
    return Learner(model, make_loss(config.loss, "sigmoid"), config, Ranks(), torch.device("cpu"))


def weights(of: Learner) -> torch.Tensor:
    return torch.cat(
        [value.detach().reshape(-1).double() for value in of.model.state_dict().values()]
    )


def rates(schedule: ScheduleConfig, steps=100, scores=()):
    config = OptimizerConfig(lr=1.0)
    return [learning_rate(config, schedule, step, steps, scores) for step in range(steps + 1)]


def test_courses_of_the_learning_rate():
    cosine = rates(ScheduleConfig(name="cosine", warmup_steps=0, final_share=0.1))
    assert cosine[0] == 1
    assert cosine[50] == pytest.approx(0.55)
    assert cosine[100] == pytest.approx(0.1)
    poly = rates(ScheduleConfig(name="poly", warmup_steps=0, power=0.9, final_share=0.0))
    assert poly[50] == pytest.approx(0.5**0.9)
    assert set(rates(ScheduleConfig(name="constant", warmup_steps=0))) == {1.0}
    warm = rates(ScheduleConfig(name="constant", warmup_steps=10))
    assert warm[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    short = rates(ScheduleConfig(name="constant", warmup_steps=50), steps=20)
    assert short[:2] == pytest.approx([0.5, 1.0])


def test_the_rate_falls_after_each_plateau():
    plateau = ScheduleConfig(name="plateau", warmup_steps=0, patience=2, factor=0.5)
    for scores, wanted in (
        ([0.5, 0.6, 0.6], 1.0),
        ([0.5, 0.6, 0.6, 0.55], 0.5),
        ([0.5, 0.4, 0.4, 0.4, 0.4], 0.25),
        ([None, None], 0.5),
        ([0.5, 0.4, 0.4, 0.7, 0.6], 0.5),
    ):
        assert learning_rate(OptimizerConfig(lr=1.0), plateau, 0, 10, scores) == wanted


def test_validations_without_a_better_score_are_counted():
    assert validations_since_best([0.1, 0.3, 0.2, 0.3]) == 2
    assert validations_since_best([0.1, 0.3]) == 0
    assert validations_since_best([None, None]) == 2


def test_an_update_lowers_the_loss_of_its_batch():
    one = learner()
    losses = [one.update(batch(), 1e-2).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_accumulation_gives_the_gradients_of_the_whole_batch():
    bce = OptimizerConfig(ema=0.0, clip_norm=0.0, name="sgd", momentum=0.0, weight_decay=0.0)
    results = []
    for accumulate in (1, 2, 4):
        config = OptimizerConfig(
            **{**{f: getattr(bce, f) for f in bce.__dataclass_fields__}, "accumulate": accumulate}
        )
        one = learner(norm=False, optimizer=config)
        one._loss = make_loss(type(one.config.loss)(terms={"bce": 1.0}), "sigmoid")
        one.update(batch(), 0.1)
        results.append(weights(one))
    assert torch.allclose(results[0], results[1], atol=1e-7)
    assert torch.allclose(results[0], results[2], atol=1e-7)


def test_recomputed_activations_change_neither_gradients_nor_statistics():
    plain, frugal = learner(), learner(activation_checkpointing=True)
    for number in range(3):
        first = plain.update(batch(number), 1e-2)
        second = frugal.update(batch(number), 1e-2)
        assert first.loss == second.loss
    assert torch.equal(weights(plain), weights(frugal))


def test_averaged_weights_follow_and_forget_their_start():
    one = learner(optimizer=OptimizerConfig(ema=0.9))
    for number in range(60):
        one.update(batch(number), 1e-3)
    mean = torch.cat([p.detach().reshape(-1) for p in one.averaged.parameters()])
    now = torch.cat([p.detach().reshape(-1) for p in one.model.parameters()])
    torch.manual_seed(0)
    start = torch.cat([p.detach().reshape(-1) for p in UNet(one.model.options).parameters()])
    assert 0 < (mean - now).norm() < 0.5 * (start - now).norm()
    assert not one.averaged.training
    with one.evaluated() as model:
        assert model is one.averaged
    assert one.model.training


def test_the_average_by_hand():
    one = learner(optimizer=OptimizerConfig(ema=0.9))
    before = one.averaged.head.weight.clone()
    one.update(batch(), 1e-2)
    decay = min(0.9, 2 / 11)
    wanted = before * decay + one.model.head.weight * (1 - decay)
    assert torch.allclose(one.averaged.head.weight, wanted, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_restored_learner_goes_on_with_the_same_bits(name):
    optimizer = OptimizerConfig(name=name, ema=0.9)
    whole, first, second = (learner(optimizer=optimizer) for _ in range(3))
    for number in range(6):
        whole.update(batch(number), 1e-2)
    for number in range(3):
        first.update(batch(number), 1e-2)
    values, tensors = first.state()
    second.load_state(values, {name: value.clone() for name, value in tensors.items()})
    for number in range(3, 6):
        second.update(batch(number), 1e-2)
    assert torch.equal(weights(whole), weights(second))
    for one, other in zip(whole.averaged.parameters(), second.averaged.parameters(), strict=True):
        assert torch.equal(one, other)
    assert second.step == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_is_not_applied(bad):
    one = learner()
    one.update(batch(), 1e-2)
    before = [p.detach().clone() for p in one.model.parameters()]
    poisoned = batch(1)
    poisoned.images_NCHW[0, 0, 3, 3] = bad
    result = one.update(poisoned, 1e-2)
    assert not result.is_finite
    assert one.step == 1
    for old, new in zip(before, one.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_gradients_are_clipped_to_the_norm():
    config = OptimizerConfig(ema=0.0, clip_norm=1e-3, name="sgd", momentum=0.0, weight_decay=0.0)
    one = learner(optimizer=config)
    before = torch.cat([p.detach().reshape(-1) for p in one.model.parameters()])
    result = one.update(batch(), 1.0)
    after = torch.cat([p.detach().reshape(-1) for p in one.model.parameters()])
    assert result.gradient_norm > 1e-3
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_bf16_and_channels_last_learn_the_same_thing():
    plain, fast = learner(), learner(dtype="bf16", channels_last=True)
    for _ in range(20):
        one, other = plain.update(batch(), 1e-2), fast.update(batch(), 1e-2)
    assert other.loss == pytest.approx(one.loss, rel=0.1)
