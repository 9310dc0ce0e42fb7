"""One update of a network: gradients summed over workers, checked, clipped, applied, averaged.

Workers exchange one buffer an update: gradients, running statistics of the normalisation layers,
the loss, and whether somebody wants to stop. Its layout never changes, so the order of additions
does not either, and an update has the same bits after a resume as without. A NaN of any worker is
in everybody's sum, so all stop at the same update, before it is applied.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import OptimizerConfig, ScheduleConfig, TrainConfig
from pipeline.loading import Batch
from pipeline.losses import Loss
from pipeline.transforms.augment import augment

_EMA_WARM_UP = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This worker among all: exchanges through `torch.distributed`, none where it is alone."""

    rank: int = 0
    world: int = 1

    def sum(self, values: torch.Tensor) -> None:
        """Replace `values` by their sum over all workers."""
        if self.world > 1:
            distributed.all_reduce(values)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in order of rank, on every worker."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one update told: mean loss over the whole batch, norm of the gradients before clipping.

    is_finite: whether the update was applied. wants_stop: whether any worker asked to stop.
    """

    loss: float
    gradient_norm: float
    is_finite: bool
    wants_stop: bool


def learning_rate(
    config: OptimizerConfig,
    schedule: ScheduleConfig,
    step: int,
    num_steps: int,
    scores: Sequence[float | None],
) -> float:
    """The rate of update number `step` (from 0) of `num_steps`, given the validation scores so far.

    Cosine: Loshchilov 2017 (arXiv 1608.03983) without restarts. Poly: (1 - t)^power, as DeepLab
    and nnU-Net. The warm-up rises linearly and overlays the beginning of the course.
    """
    progress = min(1.0, step / max(1, num_steps))
    least = schedule.final_share
    if schedule.name == "cosine":
        share = least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.name == "poly":
        share = max(least, (1 - progress) ** schedule.power)
    elif schedule.name == "plateau":
        share = max(least, schedule.factor ** _num_plateaus(scores, schedule.patience))
    else:
        share = 1.0
    warm_up = min(schedule.warmup_steps, num_steps // 10)
    warm = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    return config.lr * share * warm


def _num_plateaus(scores: Sequence[float | None], patience: int) -> int:
    """How often `patience` validations in a row brought no better score."""
    found, waited, best = 0, 0, -math.inf
    for score in scores:
        if score is not None and score > best:
            best, waited = score, 0
        else:
            waited += 1
        if waited >= patience:
            found, waited = found + 1, 0
    return found


def validations_since_best(scores: Sequence[float | None]) -> int:
    """How many validations have passed since the best score."""
    known = [(score, number) for number, score in enumerate(scores) if score is not None]
    if not known:
        return len(scores)
    best, _ = max(known)
    return len(scores) - 1 - next(number for score, number in known if score == best)


class Learner:
    """Network, optimizer and averaged weights of one worker.

    averaged: the network that is validated and exported, in evaluation mode; its parameters and
    running statistics follow those of `model` by exponential averaging, or are the same.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, config: TrainConfig, ranks: Ranks, device: torch.device
    ) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        layout = torch.channels_last if config.numerics.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(device).to(memory_format=layout).train()  # type: ignore[call-overload]
        self.averaged = copy.deepcopy(self.model).eval() if config.optimizer.ema else self.model
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.step = 0
        self._loss = loss
        self._forward: Callable[..., torch.Tensor] = self.model
        if config.numerics.activation_checkpointing:
            recompute_activations(self.model)
        if config.numerics.compile:
            self._forward = torch.compile(self.model)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._statistics = [b for b in self.model.buffers() if b.is_floating_point()]

    def update(self, batch: Batch, lr: float, *, wants_stop: bool = False) -> StepResult:
        """One update from this worker's share of a batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        told = torch.zeros(2, device=self.device)
        told[0] = self._backward(batch)
        told[1] = float(wants_stop)
        self._exchange(told)
        limit = self.config.optimizer.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        loss, stop, gradient_norm = torch.cat([told, norm.reshape(1)]).tolist()
        is_finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        if is_finite:
            self.optimizer.step()
            self.step += 1
            self._average()
        return StepResult(
            loss=loss, gradient_norm=gradient_norm, is_finite=is_finite, wants_stop=stop > 0
        )

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Gradients of this worker's part of the batch's mean loss; that part."""
        images, labels, weights = (
            None if item is None else item.to(self.device, non_blocking=True)
            for item in (batch.images_NCHW, batch.labels_NHW, batch.weights_NHW)
        )
        assert images is not None and labels is not None
        images, labels, weights = augment(
            images, labels, batch.seeds_N, self.config.augment, weights
        )
        total = torch.zeros((), device=self.device)
        num_parts = min(self.config.optimizer.accumulate, len(images))
        for chosen in torch.arange(len(images)).tensor_split(num_parts):
            first, last = int(chosen[0]), int(chosen[-1]) + 1
            with self._autocast():
                logits_NKHW = self._forward(self._as_layout(images[first:last]))
            of_part = None if weights is None else weights[first:last]
            loss = self._loss(
                logits_NKHW, _cut(labels[first:last], logits_NKHW), _cut(of_part, logits_NKHW)
            )
            loss = loss * ((last - first) / self.config.batch_size)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _autocast(self) -> Any:
        if self.config.numerics.dtype == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _as_layout(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        if self.config.numerics.channels_last:
            return images_NCHW.contiguous(memory_format=torch.channels_last)
        return images_NCHW.contiguous()

    def _exchange(self, told: torch.Tensor) -> None:
        """Sum gradients and what was told over all workers; average running statistics."""
        if self.ranks.world == 1:
            return
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        pieces = [*gradients, *self._statistics, told]
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        self.ranks.sum(flat)
        parts = torch.split(flat, [piece.numel() for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_(part.view_as(piece))
        for statistic in self._statistics:
            statistic /= self.ranks.world

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged network towards the model; at first faster, so that it forgets its start."""
        if self.averaged is self.model:
            return
        decay = min(self.config.optimizer.ema, (1 + self.step) / (_EMA_WARM_UP + self.step))
        pairs = list(zip(_tensors(self.averaged), _tensors(self.model), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(
            [mean for mean, _ in floats], [value for _, value in floats], 1 - decay
        )
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The network to validate, in evaluation mode; training goes on afterwards."""
        self.averaged.eval()
        try:
            yield self.averaged
        finally:
            self.model.train()

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Plain values and tensors that `load_state` takes back exactly."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.averaged is not self.model:
            tensors |= {f"ema.{k}": v for k, v in self.averaged.state_dict().items()}
        scalars: dict[str, Any] = {}
        for number, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{number}.{key}"] = value
                else:
                    scalars[f"{number}.{key}"] = value
        return {"step": self.step, "optimizer": scalars}, tensors

    def load_state(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        self.step = values["step"]
        self.model.load_state_dict(with_prefix(tensors, "model."))
        if self.averaged is not self.model:
            self.averaged.load_state_dict(with_prefix(tensors, "ema."))
        state: dict[int, dict[str, Any]] = {}
        stored = {**with_prefix(tensors, "optimizer."), **values["optimizer"]}
        for name, value in stored.items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _cut(maps_NHW: Any, logits_NKHW: torch.Tensor) -> Any:
    """The middle of label maps or weights, where a network of unpadded convolutions sees less."""
    if maps_NHW is None:
        return None
    height, width = logits_NKHW.shape[-2:]
    top, left = (maps_NHW.shape[-2] - height) // 2, (maps_NHW.shape[-1] - width) // 2
    return maps_NHW[..., top : top + height, left : left + width]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer. Norms and biases are not decayed: they do not overfit, they drift."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(groups, config.lr, momentum=momentum, nesterov=momentum > 0)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, config.lr)


def recompute_activations(model: nn.Module) -> None:
    """Keep only the inputs of a network's blocks, and compute the rest again for the gradients.

    Blocks are the members of its module lists. The second pass leaves running statistics alone.
    """
    for blocks in model.modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        for block in blocks:
            contexts = functools.partial(_contexts, block)
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=contexts
            )


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
