"""Prediction without Ray: a bundle and a device in; volumes in, label maps and confidence out.

The network always sees batches of one shape: a chunk of `forward_batch` slices of one size, the
last one filled with zeros. So a mask depends neither on its neighbours nor on the batch size, the
number of actors or a retry. TF32 and autotuning are off; the CPU runs one thread an actor.
"""

import ctypes
import logging
import math
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from pipeline.bundle import Bundle, load_model
from pipeline.cases import DecodedCase, PredictedCase, mark_unusable
from pipeline.config import InferenceConfig, decode
from pipeline.errors import BadImage, ErrorClass
from pipeline.models import MODELS
from pipeline.transforms import Recipe
from pipeline.transforms.postprocess import Argmax, Sigmoid, Softmax, Threshold, ToNativeGrid
from pipeline.transforms.preprocess import Trace, run_preprocess

T = TypeVar("T")

_log = logging.getLogger("reseg.inference")

_FORWARD_BATCH = {"cpu": 2, "cuda": 16}
_FLIPS: tuple[tuple[int, ...], ...] = ((-1,), (-2,), (-2, -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One case's result on the grid that `trace` leads back from.

    labels_ZHW: uint8. confidence_ZHW: uint8, 255 times the probability of the pixel's label.
    finite_Z: False where the network returned NaN or infinity; such a slice has no mask.
    """

    labels_ZHW: npt.NDArray[np.uint8]
    confidence_ZHW: npt.NDArray[np.uint8]
    finite_Z: npt.NDArray[np.bool_]
    trace: Trace


def choose_device(wanted: str) -> str:
    """ "auto" as "cuda" where there is one, else "cpu"."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


class Predictor:
    """A bundle's network on a device, ready to predict cases."""

    def __init__(
        self,
        bundle: Bundle,
        config: InferenceConfig,
        device: str = "auto",
        model: nn.Module | None = None,
    ) -> None:
        """model: a network to use in place of the bundle's weights, as while it is trained."""
        self.bundle = bundle
        self.config = config
        self.device = torch.device(choose_device(device))
        self.forward_batch = config.forward_batch or _FORWARD_BATCH.get(self.device.type, 16)
        self.notes: list[str] = []
        self.preprocess_s = 0.0
        """Seconds of all recipes so far; on a GPU those that the host took to ask for them."""
        _make_deterministic(config.threads or 1)
        architecture = MODELS[bundle.architecture]
        self._options: Any = decode(architecture.options, bundle.options, bundle.architecture)
        self._architecture = architecture
        self._layout = torch.channels_last if config.channels_last else torch.contiguous_format
        network: Any = (load_model(bundle) if model is None else model).to(self.device)
        self._model = network.to(memory_format=self._layout)

    @property
    def numerics(self) -> str:
        """What bits of a logit depend on, beside the bundle: stored with every row."""
        where = self.device.type
        if where == "cuda":
            where = torch.cuda.get_device_name(self.device).replace(" ", "_")
        parts = [where, self.config.dtype, f"b{self.forward_batch}", f"t{torch.get_num_threads()}"]
        if self.config.channels_last:
            parts.append("nhwc")
        return "-".join([*parts, f"torch{torch.__version__}"])

    def predict(self, volumes_ZHWC: Iterable[npt.NDArray[Any]]) -> Iterator[Prediction | BadImage]:
        """Predict cases in order; a case that cannot fit the recipe gives its BadImage.

        volumes: arrays ZHWC of uint8, uint16 or float32.
        """
        return self.decide_each(self._prepared(volumes_ZHWC), self.decide)

    def _prepared(
        self, volumes_ZHWC: Iterable[npt.NDArray[Any]]
    ) -> Iterator["PreparedCase | BadImage"]:
        for volume_ZHWC in volumes_ZHWC:
            started = time.monotonic()
            prepared: PreparedCase | BadImage
            try:
                prepared = self.prepare(volume_ZHWC)
            except BadImage as error:
                prepared = error
            self.preprocess_s += time.monotonic() - started
            yield prepared

    def decide_each(
        self, cases: Iterable["PreparedCase | BadImage"], decide: "Callable[[PreparedCase], T]"
    ) -> "Iterator[T | BadImage]":
        """What `decide` makes of each case once its logits are there, in order.

        Slices of several cases share a batch; a BadImage is handed through in its place.
        """
        waiting: deque[PreparedCase | BadImage] = deque()
        planes: dict[tuple[int, ...], list[tuple[PreparedCase, int]]] = defaultdict(list)
        for case in cases:
            waiting.append(case)
            if isinstance(case, PreparedCase):
                if self._is_windowed(case):
                    self._run_windows(case)
                else:
                    planes[tuple(case.images_ZCHW.shape[1:])] += [
                        (case, z) for z in range(len(case.images_ZCHW))
                    ]
                self._run_full(planes, at_least=self.config.batch_size)
            yield from _finished(waiting, decide)
        self._run_full(planes, at_least=1)
        yield from _finished(waiting, decide)

    def predict_logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits NKHW (float32) of any number of equal images, in forward passes of one shape."""
        chunks, start = [], 0
        while start < len(images_NCHW):
            size = self.forward_batch
            chunk = images_NCHW[start : start + size]
            filled = functional.pad(chunk, [0, 0, 0, 0, 0, 0, 0, size - len(chunk)])
            try:
                logits_NKHW = self._forward(filled)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or size == 1:
                    raise
                self._halve_batch()
                continue
            chunks.append(logits_NKHW[: len(chunk)])
            start += size
        return torch.cat(chunks)

    def _halve_batch(self) -> None:
        """After running out of memory: smaller passes, still all of one shape, and say so."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.forward_batch //= 2
        note = f"out of memory: from here on {self.forward_batch} slices a forward pass"
        self.notes.append(note)
        _log.warning(note)

    def prepare(self, volume_ZHWC: npt.NDArray[Any]) -> "PreparedCase":
        """Run the recipe's first half on the device. Raises BadImage if the case does not fit."""
        # on a CPU, NumPy multiplies float64 twice as fast as torch
        ready_ZHWC, trace = run_preprocess(
            volume_ZHWC, self.bundle.recipe.preprocess, self._to_device
        )
        ready_ZHWC = torch.as_tensor(ready_ZHWC)
        wanted, _ = self._architecture.channels(self._options)
        if ready_ZHWC.shape[3] != wanted:
            message = f"the image has {ready_ZHWC.shape[3]} channels, the network takes {wanted}"
            raise BadImage(ErrorClass.CHANNEL_MISMATCH, message)
        native = tuple(int(size) for size in volume_ZHWC.shape[:3])
        return PreparedCase(ready_ZHWC, trace, native)

    def _to_device(self, volume_ZHWC: npt.NDArray[Any]) -> Any:
        if self.device.type == "cpu":
            return volume_ZHWC
        return torch.from_numpy(np.ascontiguousarray(volume_ZHWC)).to(self.device)

    def _is_windowed(self, case: "PreparedCase") -> bool:
        return 0 < self.config.window < max(case.images_ZCHW.shape[2:])

    def _run_full(
        self, planes: dict[tuple[int, ...], list[tuple["PreparedCase", int]]], at_least: int
    ) -> None:
        """Predict the slices that wait, by size, where enough of one size have come together."""
        for shape, members in planes.items():
            while len(members) >= at_least:
                batch = members[: self.config.batch_size]
                del members[: self.config.batch_size]
                images = torch.stack([case.images_ZCHW[z] for case, z in batch])
                for (case, z), logits_KHW in zip(
                    batch, self._covering_logits(images, shape[1], shape[2]), strict=True
                ):
                    case.logits[z] = logits_KHW

    def _covering_logits(self, images_NCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Logits of exactly height x width, whatever the network makes of its borders."""
        padding, mirrored = self._architecture.input_padding(self._options, height, width)
        top, bottom, left, right = padding
        if mirrored:
            images_NCHW = _mirror(images_NCHW, padding)
        elif any(padding):
            images_NCHW = functional.pad(images_NCHW, [left, right, top, bottom])
        return self.predict_logits(images_NCHW)[..., :height, :width]

    def _run_windows(self, case: "PreparedCase") -> None:
        """Predict each slice in overlapping windows, blended by a Gaussian, in fixed order."""
        height, width = case.images_ZCHW.shape[2:]
        size = (min(self.config.window, height), min(self.config.window, width))
        corners = [
            (y, x)
            for y in _positions(height, size[0], self.config.overlap)
            for x in _positions(width, size[1], self.config.overlap)
        ]
        weight_HW = _gaussian(size).to(self.device)
        for z, image_CHW in enumerate(case.images_ZCHW):
            windows = torch.stack(
                [image_CHW[:, y : y + size[0], x : x + size[1]] for y, x in corners]
            )
            logits = self._covering_logits(windows, *size)
            total = torch.zeros((logits.shape[1], height, width), device=self.device)
            share = torch.zeros((height, width), device=self.device)
            for (y, x), logits_KHW in zip(corners, logits, strict=True):
                total[:, y : y + size[0], x : x + size[1]] += logits_KHW * weight_HW
                share[y : y + size[0], x : x + size[1]] += weight_HW
            case.logits[z] = total / share

    def _forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        images_NCHW = images_NCHW.contiguous(memory_format=self._layout)
        flips = _FLIPS if self.config.tta else ()
        autocast = (
            torch.autocast(self.device.type, torch.bfloat16)
            if self.config.dtype == "bf16"
            else nullcontext()
        )
        with torch.inference_mode(), autocast:
            total: torch.Tensor = self._model(images_NCHW).float()
            for axes in flips:
                total = total + self._model(images_NCHW.flip(axes)).float().flip(axes)
            return total / (1 + len(flips)) if flips else total

    def decide(self, case: "PreparedCase", recipe: Recipe | None = None) -> Prediction:
        """Activation and decision on the device; only labels and confidence leave it.

        recipe: another one than the bundle's, of which only the second half is used.
        """
        logits_ZKHW = torch.stack([case.logits[z] for z in range(len(case.images_ZCHW))])
        finite_Z = torch.isfinite(logits_ZKHW).flatten(1).all(1)
        trace = case.trace
        values = logits_ZKHW
        labels: torch.Tensor | None = None
        confidence = torch.zeros(0)
        background = 0
        for step in (recipe or self.bundle.recipe).postprocess:
            if isinstance(step, ToNativeGrid) and labels is None:
                values, finite_Z = _to_native(values, finite_Z, trace, case.native)
                trace = ()
            elif isinstance(step, Sigmoid):
                values = torch.sigmoid(values)
            elif isinstance(step, Softmax):
                values = torch.softmax(values, dim=1)
                background = 1
            elif isinstance(step, Threshold):
                labels, confidence = _choose(values[:, background:], step.at)
            elif isinstance(step, Argmax):
                labels, confidence = _choose(values, None)
        assert labels is not None
        labels = labels * finite_Z[:, None, None]  # before shapes, which reach over slices
        return Prediction(
            labels_ZHW=labels.to(torch.uint8).cpu().numpy(),
            confidence_ZHW=(confidence * 255).round().to(torch.uint8).cpu().numpy(),
            finite_Z=finite_Z.cpu().numpy(),
            trace=trace,
        )


def predict_cases(decoded: Iterable[DecodedCase], predictor: Predictor) -> list[PredictedCase]:
    """Predict all cases of a shard; a case without a usable slice passes by the network."""
    cases: list[DecodedCase] = []

    def volumes() -> Iterator[Any]:
        for case in decoded:
            cases.append(case)
            if case.volume_ZHWC is not None:
                yield case.volume_ZHWC
                case.volume_ZHWC = None
                case_has_volume.add(id(case))

    case_has_volume: set[int] = set()
    outcomes = list(predictor.predict(volumes()))
    predicted, position = [], 0
    for case in cases:
        if id(case) not in case_has_volume:
            predicted.append(PredictedCase(decoded=case))
            continue
        outcome = outcomes[position]
        position += 1
        if isinstance(outcome, BadImage):
            mark_unusable(case, outcome)
            predicted.append(PredictedCase(decoded=case))
            continue
        predicted.append(
            PredictedCase(
                decoded=case,
                labels_ZHW=outcome.labels_ZHW,
                confidence_ZHW=outcome.confidence_ZHW,
                nonfinite_Z=None if outcome.finite_Z.all() else ~outcome.finite_Z,
                trace=outcome.trace,
            )
        )
    return predicted


@dataclass(slots=True, eq=False)
class PreparedCase:
    """A case on its way through the network: its input, and the logits of slices so far."""

    images_ZCHW: torch.Tensor
    trace: Trace
    native: tuple[int, ...]
    logits: dict[int, torch.Tensor]

    def __init__(self, ready_ZHWC: torch.Tensor, trace: Trace, native: tuple[int, ...]) -> None:
        self.images_ZCHW = ready_ZHWC.permute(0, 3, 1, 2).to(torch.float32).contiguous()
        self.trace, self.native, self.logits = trace, native, {}


def _finished(
    waiting: deque[PreparedCase | BadImage], decide: Callable[[PreparedCase], T]
) -> Iterator[T | BadImage]:
    """Take from the front of the line what is complete."""
    while waiting:
        case = waiting[0]
        if isinstance(case, BadImage):
            yield case
        elif len(case.logits) < len(case.images_ZCHW):
            return
        else:
            result = decide(case)
            case.logits.clear()
            yield result
        waiting.popleft()


def _choose(values_ZKHW: torch.Tensor, at: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and the probability of each, by threshold or (None) by argmax; NaN is no label."""
    best, index = torch.nan_to_num(values_ZKHW, nan=0.0).max(dim=1)
    if at is None:
        return index, best
    is_label = best > at
    return torch.where(is_label, index + 1, 0), torch.where(is_label, best, 1 - best)


def _to_native(
    values: torch.Tensor, finite_Z: torch.Tensor, trace: Trace, native: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolate maps ZKHW back through the trace, bilinearly; outside a crop lowest logits."""
    for move in reversed(trace):
        if move.kind == "resize":
            values = functional.interpolate(
                values, size=move.before[1:], mode="bilinear", align_corners=False
            )
        else:
            values, finite_Z = _undo_window(values, finite_Z, move)
    return values, finite_Z


def _undo_window(
    values: torch.Tensor, finite_Z: torch.Tensor, move: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    from pipeline.transforms.preprocess import _overlap

    (tz, ty, tx), (sz, sy, sx) = _overlap(move)
    z, y, x = move.before
    outside = torch.full((values.shape[1],), -30.0, device=values.device)
    if values.shape[1] > 1:
        outside[0] = 30.0
    native = outside[None, :, None, None].expand(z, -1, y, x).clone()
    native[tz, :, ty, tx] = values[sz, :, sy, sx]
    finite = torch.ones(z, dtype=torch.bool, device=values.device)
    finite[tz] = finite_Z[sz]
    return native, finite


def _mirror(images_NCHW: torch.Tensor, padding: tuple[int, int, int, int]) -> torch.Tensor:
    """Mirror at the borders, again and again where an image is smaller than the padding."""
    top, bottom, left, right = padding
    rows = _reflected(images_NCHW.shape[2], top, bottom)
    columns = _reflected(images_NCHW.shape[3], left, right)
    return images_NCHW[:, :, rows][:, :, :, columns]


def _reflected(size: int, before: int, after: int) -> torch.Tensor:
    if size == 1:
        return torch.zeros(before + after + 1, dtype=torch.long)
    period = 2 * (size - 1)
    positions = torch.arange(-before, size + after).remainder(period)
    return torch.where(positions < size, positions, period - positions)


def _positions(length: int, window: int, overlap: float) -> list[int]:
    """Window starts, evenly spread, from edge to edge."""
    if window >= length:
        return [0]
    count = math.ceil((length - window) / max(1, int(window * (1 - overlap)))) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


@lru_cache(maxsize=8)
def _gaussian(size: tuple[int, int]) -> torch.Tensor:
    """Weights of a window: a Gaussian with sigma an eighth of each side (as nnU-Net and MONAI)."""
    profiles = []
    for side in size:
        distance = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
        profiles.append(torch.exp(-0.5 * (distance / max(side / 8, 1e-6)) ** 2))
    weight = torch.outer(*profiles).clamp_min(1e-6)
    return (weight / weight.max()).to(torch.float32)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text


def _make_deterministic(threads: int) -> None:
    """Settings under which equal shapes give equal bits."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next batch instead of mapping them afresh.

    Activations of a large batch otherwise cost more time in page faults than in convolutions.
    Does nothing on other C libraries.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
