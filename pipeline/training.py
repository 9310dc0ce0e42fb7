"""Training without Ray: what one worker of a data-parallel job does, from index to bundle.

A worker that is alone needs no cluster: `run_worker(job)` trains, validates, writes checkpoints
and exports. Started again on the same folder it goes on where the newest good checkpoint is.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from pipeline import checkpoint, storage
from pipeline.bundle import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    Bundle,
    build_model,
    load_bundle,
    load_model,
    save_bundle,
)
from pipeline.config import InferenceConfig, loss_terms
from pipeline.dataset import (
    IndexedCase,
    Leg,
    ReadyCase,
    SlicePool,
    count_index,
    draw_epoch,
    indexed_cases,
    make_pool,
    rank_positions,
    rank_share,
    split_cases,
    steps_per_epoch,
)
from pipeline.errors import ConfigError, ResegError, TooManyBadImages
from pipeline.inference import Prediction, Predictor, PreparedCase, choose_device, keep_freed_memory
from pipeline.learning import Learner, Ranks, learning_rate, validations_since_best, with_prefix
from pipeline.loading import CaseReader, TrainCase, iter_batches, train_case, unlabelled_case
from pipeline.losses import boundary_weights, make_loss
from pipeline.planning import code_version
from pipeline.preparation import BUNDLE_FOLDER, INDEX_FILE, RESULT_FILE, TrainJob, read_index
from pipeline.records import Problem
from pipeline.report import draw_curves, draw_sheet
from pipeline.transforms import Recipe
from pipeline.transforms.augment import sample_seeds
from pipeline.transforms.postprocess import Sigmoid
from pipeline.validation import (
    Reader,
    Row,
    decided_cases,
    draw_case,
    mean_dice,
    recipes_by_threshold,
    score_case,
    validation_reader,
)

_CURVES_EVERY_S = 60.0
_TELL_EVERY_S = 0.5
_NUM_SAMPLES = 12

T = TypeVar("T")

Tell = Callable[[Mapping[str, Any]], bool]
"""Takes what worker 0 has to say about its progress; answers whether the user wants to stop."""


class NonFiniteLoss(ResegError):
    """The loss or the gradients became NaN or infinite; nothing was updated with them."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a training stands, beside its tensors; what a checkpoint says in plain values.

    legs, steps_in_leg: what workers of other numbers did of the running epoch, and how many updates
    the `world` of now. epochs: a record for each finished epoch.
    """

    epoch: int = 0
    legs: list[Leg] = field(default_factory=list)
    steps_in_leg: int = 0
    world: int = 1
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    bad_cases: dict[str, list[str]] = field(default_factory=dict)
    train_seconds: float = 0.0

    @property
    def scores(self) -> list[float | None]:
        """Mean validation Dice of each validation so far."""
        return [record["score"] for record in self.epochs if "score" in record]


# The worker


def run_worker(
    job: TrainJob, ranks: Ranks | None = None, device: str = "auto", tell: Tell = lambda _: False
) -> dict[str, Any] | None:
    """Train `job` to its end and export its bundle; the result, or None if it was stopped before.

    All workers of a job call this, each with its `ranks`. tell: called by worker 0 with what it
    is doing. Raises NonFiniteLoss, TooManyBadImages and ConfigError on all workers alike.
    """
    keep_freed_memory()
    storage.expect(job.out, job.source.uri)
    _be_deterministic()
    worker = _Worker(job, ranks or Ranks(), torch.device(choose_device(device)), tell)
    with closing(worker):
        return worker.run()


def _be_deterministic() -> None:
    """Same shapes, same bits, as far as the device has a deterministic way."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # NaN in every fresh buffer would find bugs of torch and cost a pass over memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


class _Worker:
    """The state of one worker; `run` reads as the training itself."""

    def __init__(self, job: TrainJob, ranks: Ranks, device: torch.device, tell: Tell) -> None:
        config = job.config
        self.job, self.config, self.ranks, self.device = job, config, ranks, device
        self.notes: list[str] = []
        self._tell, self._last_tell, self._last_curves = tell, 0.0, 0.0
        index = read_index(job.out)
        if index is None:
            raise ResegError(f"{job.out} has no index; start `reseg train` again")
        self.counts = count_index(index, len(config.labels))
        split = split_cases(indexed_cases(index), config.split, config.seed)
        self.pool: SlicePool = make_pool(split["train"])
        self.steps_per_epoch = steps_per_epoch(self.pool, config.sampling, config.batch_size)
        self.num_steps = self.steps_per_epoch * config.epochs
        self.split = split
        self.train_reader = _train_reader(job, split["train"])
        self.validation = split["validation"][ranks.rank :: ranks.world]
        self.validation_reader = _validation_reader(job, self.validation)
        self.learner = Learner(
            initial_model(job), make_loss(config.loss, job.activation), config, ranks, device
        )
        torch.manual_seed(config.seed * 1009 + ranks.rank)
        self.progress = Progress(world=ranks.world)
        self._board = _tensorboard(job) if config.tensorboard and ranks.rank == 0 else None

    def close(self) -> None:
        """End reading threads and decoder processes."""
        self.train_reader.close()
        self.validation_reader.close()
        if self._board is not None:
            self._board.close()

    def run(self) -> dict[str, Any] | None:
        """Epochs of updates, validation and checkpoints; then the export."""
        self._resume()
        while self.progress.epoch < self.config.epochs and not self._is_over():
            if not self._train_epoch():
                return None
            record = self._epoch_record()
            if self._is_validated(self.progress.epoch):
                record |= self._validate()
            self._collect_problems()
            self._end_epoch(record)
        return self._export()

    def _is_over(self) -> bool:
        """Whether early stopping has spoken."""
        limit, scores = self.config.early_stop, self.progress.scores
        return bool(limit and scores and validations_since_best(scores) >= limit)

    def _is_validated(self, epoch: int) -> bool:
        return (epoch + 1) % self.config.validate_every == 0 or epoch + 1 == self.config.epochs

    # updates

    def _train_epoch(self) -> bool:
        """The rest of the running epoch; False if the user stopped it."""
        progress, config = self.progress, self.config
        share = rank_share(config.batch_size, self.ranks.world, self.ranks.rank)
        positions, slices = self._rest_of_epoch()
        started, last_saved = time.monotonic(), self.learner.step
        batches = iter_batches(
            self.train_reader,
            self.pool,
            slices,
            sample_seeds(config.seed, progress.epoch, positions),
            size=share,
            patch=config.sampling.patch,
            pin=self.device.type == "cuda",
        )
        with closing(batches):
            for batch in batches:
                lr = learning_rate(
                    config.optimizer,
                    config.schedule,
                    self.learner.step,
                    self.num_steps,
                    progress.scores,
                )
                result = self.learner.update(batch, lr, wants_stop=self._told(started))
                if not result.is_finite:
                    raise NonFiniteLoss(self._non_finite(result.loss, result.gradient_norm))
                progress.losses.append(result.loss)
                progress.rates.append(lr)
                progress.steps_in_leg += 1
                due = config.checkpoint_steps and (
                    self.learner.step - last_saved >= config.checkpoint_steps
                )
                if due or result.wants_stop:
                    progress.train_seconds += time.monotonic() - started
                    self._save()
                    started, last_saved = time.monotonic(), self.learner.step
                if result.wants_stop:
                    return False
        progress.train_seconds += time.monotonic() - started
        return True

    def _rest_of_epoch(self) -> tuple[Any, Any]:
        """Positions that this worker still computes, and the slices drawn for them."""
        progress, config = self.progress, self.config
        drawn = draw_epoch(
            self.pool, config.sampling, config.batch_size, config.seed, progress.epoch
        )
        positions = rank_positions(
            self.pool,
            drawn,
            progress.legs,
            world=self.ranks.world,
            rank=self.ranks.rank,
            batch_size=config.batch_size,
            cache_bytes=config.sampling.cache_bytes,
            seed=config.seed,
            epoch=progress.epoch,
        )
        share = rank_share(config.batch_size, self.ranks.world, self.ranks.rank)
        positions = positions[progress.steps_in_leg * share :]
        return positions, drawn[positions]

    def _told(self, started: float) -> bool:
        """Say at most twice a second where we are; whether somebody wants to stop."""
        now = time.monotonic()
        if self.ranks.rank or now - self._last_tell < _TELL_EVERY_S:
            return False
        self._last_tell = now
        progress = self.progress
        seconds = progress.train_seconds + now - started
        return self._tell(
            {
                "phase": "training",
                "epoch": progress.epoch + 1,
                "epochs": self.config.epochs,
                "step": self.learner.step,
                "steps": self.num_steps,
                "loss": progress.losses[-1] if progress.losses else None,
                "score": next((s for s in reversed(progress.scores) if s is not None), None),
                "images_per_s": self.learner.step * self.config.batch_size / max(seconds, 1e-9),
            }
        )

    def _enter(self, phase: str) -> None:
        """Say what is done between updates."""
        if not self.ranks.rank:
            self._tell({"phase": phase})

    def _non_finite(self, loss: float, norm: float) -> str:
        what = (
            f"the loss became {loss}" if not math.isfinite(loss) else f"the gradients became {norm}"
        )
        good = checkpoint.names(self.job.out, "step-")
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        return (
            f"{what} at step {self.learner.step + 1} (epoch {self.progress.epoch + 1}); no worker "
            f"was updated with it, and {last}. Lower optimizer.lr, or set numerics.dtype to fp32, "
            "in a new folder"
        )

    def _collect_problems(self, others: Mapping[str, Problem] | None = None) -> None:
        """Cases that could no longer be read, of all workers. Raises TooManyBadImages."""
        mine = {**self.train_reader.problems, **self.validation_reader.problems, **(others or {})}
        plain = {k: [str(v.error_class), v.message] for k, v in mine.items()}
        for theirs in self.ranks.gather(plain):
            self.progress.bad_cases |= theirs
        bad = self.progress.bad_cases
        if not bad:
            return
        sizes = {c.case_id: len(c.ref.slices) for part in self.split.values() for c in part}
        share = sum(sizes[case_id] for case_id in bad) / max(1, self.counts.num_images)
        if share > self.config.max_bad_share:
            case_id, (kind, message) = sorted(bad.items())[0]
            raise TooManyBadImages(
                f"{len(bad)} cases ({share:.1%} of the images, allowed are "
                f"{self.config.max_bad_share:.1%}) can no longer be read, as {case_id}: {kind}: "
                f"{message}; put the source back as it was and start again, or raise max_bad_share"
            )

    # validation

    def _validate(self) -> dict[str, Any]:
        """Score the averaged weights on the validation cases, and keep them if they are the best."""
        started = time.monotonic()
        self._enter("validating")
        with self.learner.evaluated() as model:
            predictor = self._predictor(model)
            mine = [
                row
                for ready, prediction in self._decided(predictor, predictor.decide)
                for row in score_case(ready, prediction, self.job.recipe, self.config.labels)
            ]
        rows = _in_case_order(row for part in self.ranks.gather(mine) for row in part)
        score = mean_dice(rows)
        best = self.progress.best
        if best is None or (score is not None and score > (best["score"] or -1)):
            self._keep_best(score, rows)
        return {
            "score": score,
            "dice": {
                name: mean_dice([row for row in rows if row["label_name"] == name])
                for name in self.config.labels
            },
            "validation_seconds": round(time.monotonic() - started, 3),
        }

    def _predictor(self, model: nn.Module) -> Predictor:
        settings = InferenceConfig(
            channels_last=self.config.numerics.channels_last, threads=torch.get_num_threads()
        )
        return Predictor(self.job.description, settings, str(self.device), model)

    def _decided(
        self, predictor: Predictor, decide: Callable[[PreparedCase], T]
    ) -> Iterator[tuple[ReadyCase, T]]:
        """This worker's validation cases."""
        return decided_cases(self.validation_reader, len(self.validation), predictor, decide)

    def _keep_best(self, score: float | None, rows: list[dict[str, Any]]) -> None:
        step = self.learner.step
        self.progress.best = {
            "name": checkpoint.best_name(step),
            "step": step,
            "epoch": self.progress.epoch + 1,
            "score": score,
            "cases": rows,
        }
        if self.ranks.rank == 0:
            weights = self.learner.averaged.state_dict()
            checkpoint.save(self.job.out, checkpoint.best_name(step), {"step": step}, weights)

    # checkpoints

    def _epoch_record(self) -> dict[str, Any]:
        recent = self.progress.losses[-self.steps_per_epoch :]
        return {
            "epoch": self.progress.epoch + 1,
            "step": self.learner.step,
            "loss": float(np.mean(recent)),
            "seconds": round(self.progress.train_seconds, 3),
            "workers": self.ranks.world,
        }

    def _end_epoch(self, record: dict[str, Any]) -> None:
        progress = self.progress
        progress.epochs.append(record)
        progress.epoch += 1
        progress.legs, progress.steps_in_leg = [], 0
        self._save()
        if self.ranks.rank:
            return
        if self._board is not None:
            _log_to_board(self._board, progress, record)
        if time.monotonic() - self._last_curves > _CURVES_EVERY_S:
            self._write_curves()
            self._last_curves = time.monotonic()

    def _save(self) -> None:
        """A checkpoint of all workers; only the first writes it."""
        states = self.ranks.gather(_random_state(self.device))
        if self.ranks.rank:
            return
        values, tensors = self.learner.state()
        for rank, state in enumerate(states):
            tensors |= {f"random.{rank}.{name}": value for name, value in state.items()}
        plain = asdict(self.progress)
        tensors["losses"] = torch.tensor(plain.pop("losses"), dtype=torch.float64)
        tensors["rates"] = torch.tensor(plain.pop("rates"), dtype=torch.float64)
        values |= plain | {"index_digest": self.job.index_digest}
        checkpoint.save(self.job.out, checkpoint.step_name(self.learner.step), values, tensors)
        checkpoint.prune(self.job.out)

    def _resume(self) -> None:
        """Take up the newest checkpoint that holds, if there is one."""
        found = checkpoint.load_latest(self.job.out, self.notes.append)
        self.ranks.gather(None)  # nobody writes before all have read
        if self.ranks.rank == 0:
            checkpoint.set_aside_after(self.job.out, found[0]["step"] if found else -1)
        if found is None:
            return
        values, tensors = found
        if values["index_digest"] != self.job.index_digest:
            raise ConfigError(
                f"the checkpoints in {self.job.out} were trained on other data than its "
                f"{INDEX_FILE} holds now; put the source back as it was, or use another folder"
            )
        self.learner.load_state(values, tensors)
        known = {name: values[name] for name in asdict(self.progress) if name in values}
        known["legs"] = [(int(world), int(steps)) for world, steps in known["legs"]]
        known["losses"], known["rates"] = tensors["losses"].tolist(), tensors["rates"].tolist()
        self.progress = Progress(**known)
        before, now = self.progress.world, self.ranks.world
        if before != now:
            if self.progress.steps_in_leg:
                self.progress.legs.append((before, self.progress.steps_in_leg))
                self.progress.steps_in_leg = 0
            self.progress.world = now
            self.notes.append(
                f"from step {self.learner.step} on with {now} workers, before {before}"
            )
        else:
            random = with_prefix(tensors, f"random.{self.ranks.rank}.")
            _set_random_state(random, self.device)

    # the end

    def _export(self) -> dict[str, Any]:
        """Best weights as a bundle, curves, samples, and the result, which is written last."""
        self._enter("exporting")
        weights = self._best_weights()
        best = self.progress.best
        assert best is not None
        self.learner.averaged.load_state_dict(weights)
        recipe, threshold = self.job.recipe, None
        with self.learner.evaluated() as model:
            predictor = self._predictor(model)
            if self.config.calibrate_threshold:
                recipe, threshold, rows = self._calibrate(predictor, best["cases"])
                best = {**best, "cases": rows, "score": mean_dice(rows)}
            test = self._score_test(predictor, recipe)
            if self.ranks.rank == 0:
                self._write_samples(predictor, recipe, best["cases"])
        if self.ranks.rank:
            return {}
        self._write_curves()
        result = self._result(best, threshold, test)
        bundle = self._save_bundle(weights, recipe, result)
        result |= {"bundle": bundle.uri, "bundle_digest": bundle.digest}
        text = json.dumps(result, indent=1).encode()
        storage.write(storage.join(self.job.out, RESULT_FILE), text)
        return result

    def _best_weights(self) -> dict[str, torch.Tensor]:
        """The best weights; where they were damaged the last ones, judged anew."""
        best, weights = self.progress.best, None
        assert best is not None
        try:
            _, weights = checkpoint.load(self.job.out, best["name"])
        except checkpoint.DamagedCheckpoint as error:
            self.notes.append(f"{error}; the last weights are exported instead")
        if all(self.ranks.gather(weights is not None)):
            assert weights is not None
            return weights
        self.progress.best = None
        self._validate()
        return {k: v.clone() for k, v in self.learner.averaged.state_dict().items()}

    def _score_test(self, predictor: Predictor, recipe: Recipe) -> list[Row]:
        """The cases that were held back, looked at once."""
        mine = self.split["test"][self.ranks.rank :: self.ranks.world]
        with closing(_validation_reader(self.job, mine)) as reader:
            rows = [
                row
                for ready, prediction in decided_cases(
                    reader, len(mine), predictor, lambda case: predictor.decide(case, recipe)
                )
                for row in score_case(ready, prediction, recipe, self.config.labels)
            ]
            self._collect_problems(reader.problems)
        return [row for part in self.ranks.gather(rows) for row in part]

    def _result(
        self, best: Mapping[str, Any], threshold: float | None, test: list[Row]
    ) -> dict[str, Any]:
        progress = self.progress
        scores = [row["dice"] for row in best["cases"] if row["dice"] is not None]
        return {
            "out": self.job.out,
            "epochs": progress.epoch,
            "steps": self.learner.step,
            "best_epoch": best["epoch"],
            "mean_dice": best["score"],
            "median_dice": float(np.median(scores)) if scores else None,
            "last_dice": next((s for s in reversed(progress.scores) if s is not None), None),
            "threshold": threshold,
            "test_dice": mean_dice(test),
            "cases": best["cases"],
            "test_cases": test,
            "num_cases": {part: len(cases) for part, cases in self.split.items()},
            "train_slices": len(self.pool),
            "images_per_s": round(
                self.learner.step * self.config.batch_size / max(progress.train_seconds, 1e-9), 3
            ),
            "train_seconds": round(progress.train_seconds, 3),
            "workers": self.ranks.world,
            "device": self.device.type,
            "bad": self.counts.bad_by_class,
            "bad_images": [list(item) for item in self.counts.bad],
            "bad_cases": progress.bad_cases,
            "notes": self.notes,
        }

    def _calibrate(
        self, predictor: Predictor, rows_before: list[Row]
    ) -> tuple[Recipe, float | None, list[Row]]:
        """The recipe with the best mean validation Dice (of equals nearest 0.5), and its scores."""
        recipes = recipes_by_threshold(self.job.recipe)
        if not recipes:
            self.notes.append("the recipe decides by argmax: there is no threshold to calibrate")
            return self.job.recipe, None, rows_before

        def decide_all(case: PreparedCase) -> dict[float, Prediction]:
            return {at: predictor.decide(case, recipe) for at, recipe in recipes.items()}

        rows: dict[float, list[dict[str, Any]]] = {at: [] for at in recipes}
        for ready, predictions in self._decided(predictor, decide_all):
            for at, prediction in predictions.items():
                rows[at] += score_case(ready, prediction, recipes[at], self.config.labels)
        parts = self.ranks.gather(rows)
        merged = {at: _in_case_order(row for part in parts for row in part[at]) for at in recipes}
        best = max(recipes, key=lambda at: (mean_dice(merged[at]) or 0.0, -abs(at - 0.5)))
        return recipes[best], best, merged[best]

    def _save_bundle(
        self, weights: Mapping[str, torch.Tensor], recipe: Recipe, result: Mapping[str, Any]
    ) -> Bundle:
        uri = storage.join(self.job.out, BUNDLE_FOLDER)
        for name in (DESCRIPTION_FILE, WEIGHTS_FILE):  # of an export that was cut off
            storage.remove(storage.join(uri, name))
        progress = self.progress
        return save_bundle(
            uri,
            name=self.job.description.name,
            architecture=self.job.architecture,
            options=self.job.options,
            labels=self.config.labels,
            recipe=recipe.to_plain(),
            weights=save_tensors({k: v.cpu().contiguous() for k, v in weights.items()}),
            provenance={
                "made_by": "reseg train",
                "data": self.job.index_digest,
                "cases": {part: len(cases) for part, cases in self.split.items()},
                "config": _without_places(asdict(self.config)),
                "code": {**_version_only(code_version()), "torch": torch.__version__},
                "steps": self.learner.step,
                "curves": [
                    {key: record[key] for key in ("epoch", "loss", "score") if key in record}
                    for record in progress.epochs
                ],
            },
            scores={
                "validation": {
                    "mean_dice": result["mean_dice"],
                    "median_dice": result["median_dice"],
                    "cases": result["cases"],
                },
                "test": {"mean_dice": result["test_dice"], "cases": result["test_cases"]},
            },
        )

    def _write_curves(self) -> None:
        progress = self.progress
        picture = draw_curves(progress.losses, progress.rates, progress.epochs)
        storage.write(storage.join(self.job.out, "curves.png"), picture)

    def _write_samples(
        self, predictor: Predictor, recipe: Recipe, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Of the worst validation cases the slice with most wrong pixels, outlined; worst first."""
        known = [row for row in rows if row["dice"] is not None]
        worst: list[str] = []
        known.sort(key=lambda row: (row["dice"], row["case_id"]))
        for row in known:
            if row["case_id"] not in worst and len(worst) < _NUM_SAMPLES:
                worst.append(row["case_id"])
        by_id = {case.case_id: case for case in self.split["validation"]}
        dice = {row["case_id"]: row["dice"] for row in reversed(known)}
        chosen = [by_id[case_id] for case_id in worst]
        with closing(_validation_reader(self.job, chosen, keep_pixels=True)) as reader:
            pictures = [
                draw_case(ready, prediction, recipe, dice[ready.decoded.case_id])
                for ready, prediction in decided_cases(
                    reader, len(chosen), predictor, lambda case: predictor.decide(case, recipe)
                )
            ]
        if pictures:
            storage.write(storage.join(self.job.out, "samples.png"), draw_sheet(pictures))


# Pieces of the worker


def initial_model(job: TrainJob) -> nn.Module:
    """The network before its first update: from the seed, or from `model.init`.

    Of the head, the channels of labels that the bundle knows by name are taken over, if both end in
    the same activation; the others start from the seed.
    """
    torch.manual_seed(job.config.seed)
    model = build_model(job.description)
    if job.config.model.init:
        init = load_bundle(job.config.model.init)
        known, state = load_model(init).state_dict(), model.state_dict()
        before, now = _channel_names(init), _channel_names(job.description)
        for name, value in state.items():
            if not name.startswith("head."):
                value.copy_(known[name])
                continue
            for channel, label in enumerate(now):
                if label in before:
                    value[channel] = known[name][before.index(label)]
        model.load_state_dict(state)
    return model


def _channel_names(bundle: Bundle) -> list[str]:
    """What each output channel of a bundle's network stands for, activation included."""
    if any(isinstance(step, Sigmoid) for step in bundle.recipe.postprocess):
        return [f"sigmoid {label}" for label in bundle.labels]
    return ["softmax, background", *(f"softmax {label}" for label in bundle.labels)]


def _in_case_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["case_id"], row["label"]))


def _train_reader(job: TrainJob, cases: Sequence[IndexedCase]) -> CaseReader[TrainCase]:
    loss = job.config.loss
    weigh = None
    if "boundary" in loss_terms(loss, job.activation):
        weigh = lambda mask: boundary_weights(mask, loss.boundary_weight, loss.boundary_sigma_px)  # noqa: E731
    return CaseReader(
        job.index_job,
        cases,
        limit_bytes=job.config.sampling.cache_bytes,
        threads=job.config.resources.readers,
        convert=lambda ready: train_case(ready, weigh),
        fallback=unlabelled_case,
    )


def _validation_reader(
    job: TrainJob, cases: Sequence[IndexedCase], *, keep_pixels: bool = False
) -> Reader:
    return validation_reader(
        job.index_job,
        cases,
        limit_bytes=job.config.sampling.cache_bytes // 4,
        threads=job.config.resources.readers,
        keep_pixels=keep_pixels,
    )


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _version_only(code: Mapping[str, str]) -> dict[str, str]:
    """What made the weights; who and where stays in the log of the training."""
    return {key: value for key, value in code.items() if key not in ("operator", "host")}


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without patients' names, which a bundle was not asked to hold."""
    split = {k: v for k, v in config["split"].items() if not k.endswith("_patients")}
    return {**config, "split": split}


def _tensorboard(job: TrainJob) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(storage.join(job.out, "tensorboard"))


def _log_to_board(board: Any, progress: Progress, record: Mapping[str, Any]) -> None:
    """The updates of the last epoch, and its scores."""
    first = progress.epochs[-2]["step"] if len(progress.epochs) > 1 else 0
    for step in range(first, len(progress.losses)):
        board.add_scalar("loss/train", progress.losses[step], step + 1)
        board.add_scalar("learning_rate", progress.rates[step], step + 1)
    if record.get("score") is not None:
        board.add_scalar("dice/validation", record["score"], record["step"])
    board.flush()
