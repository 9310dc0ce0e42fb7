"""Batches for training: decoded ahead of the device, each case once while it fits the memory.

Threads, each with a sandboxed decoder process, prepare the cases of the next batches; one more
puts batches together. What is in a batch never depends on which of them was faster.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.cases import DecodedCase
from pipeline.dataset import (
    IndexedCase,
    IndexJob,
    ReadyCase,
    SlicePool,
    open_sandbox,
    read_ready,
)
from pipeline.records import UNLABELLED, Problem
from pipeline.sandbox import Sandbox
from pipeline.transforms.augment import Seeds, crop_corners

T = TypeVar("T")

_BATCHES_AHEAD = 4


@dataclass(slots=True, kw_only=True)
class TrainCase:
    """A case in memory: what batches are cut from."""

    images_ZHWC: npt.NDArray[np.float32]
    labels_ZHW: npt.NDArray[np.uint8]
    weights_ZHW: npt.NDArray[np.float32] | None = None

    @property
    def size_bytes(self) -> int:
        """Of all its arrays."""
        weights = 0 if self.weights_ZHW is None else self.weights_ZHW.nbytes
        return self.images_ZHWC.nbytes + self.labels_ZHW.nbytes + weights


@dataclass(slots=True, kw_only=True)
class Batch:
    """images_NCHW float32 (channels last in memory), labels_NHW uint8, pixel weights float32."""

    images_NCHW: torch.Tensor
    labels_NHW: torch.Tensor
    weights_NHW: torch.Tensor | None
    seeds_N: Seeds


class CaseReader(Generic[T]):
    """Cases by number, decoded in threads, kept until `limit_bytes` are over; not for sharing.

    convert: what to keep of a case that could be prepared, and its bytes; fallback: what stands
    in for one that could not, whose problem is then in `problems`.
    """

    def __init__(
        self,
        job: IndexJob,
        cases: Sequence[IndexedCase],
        *,
        limit_bytes: int,
        threads: int,
        convert: Callable[[ReadyCase], tuple[T, int]],
        fallback: Callable[[IndexedCase], T],
    ) -> None:
        self.problems: dict[str, Problem] = {}
        self._job, self._cases = job, cases
        self._limit, self._used = limit_bytes, 0
        self._sizes: dict[int, int] = {}
        self._convert, self._fallback = convert, fallback
        self._kept: OrderedDict[int, Future[tuple[T, int]]] = OrderedDict()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reseg-read")
        self._own = threading.local()
        self._sandboxes: list[Sandbox] = []

    def request(self, number: int) -> Future[tuple[T, int]]:
        """Start decoding a case unless it is there or on its way."""
        if number in self._kept:
            self._kept.move_to_end(number)
        else:
            self._kept[number] = self._pool.submit(self._load, number)
        return self._kept[number]

    def get(self, number: int) -> T:
        """The case, as soon as it is decoded."""
        case, size = self.request(number).result()
        if number not in self._sizes:
            self._sizes[number] = size
            self._used += size
        return case

    def make_room(self, needed: set[int]) -> None:
        """Forget the cases that were used longest ago, but none of `needed`, until the rest fits."""
        if self._used <= self._limit:
            return
        for number in [n for n in self._kept if n in self._sizes and n not in needed]:
            del self._kept[number]
            self._used -= self._sizes.pop(number)
            if self._used <= self._limit:
                return

    def close(self) -> None:
        """End threads and decoder processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for sandbox in self._sandboxes:
            sandbox.close()

    def _load(self, number: int) -> tuple[T, int]:
        case = self._cases[number]
        ready = read_ready(
            self._job,
            case.shard_path,
            case.ref,
            self._sandbox(),
            case.digest,
            number=case.source,
        )
        if isinstance(ready, DecodedCase):
            self.problems[case.case_id] = next(
                item.problem for item in ready.slices if item.problem is not None
            )
            return self._fallback(case), 0
        return self._convert(ready)

    def _sandbox(self) -> Sandbox:
        if not hasattr(self._own, "sandbox"):
            self._own.sandbox = open_sandbox(self._job.source.limits)
            self._sandboxes.append(self._own.sandbox)
        sandbox: Sandbox = self._own.sandbox
        return sandbox


def train_case(
    ready: ReadyCase, weigh: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]] | None
) -> tuple[TrainCase, int]:
    """What training keeps of a case. weigh: pixel weights of a label map, where a loss wants them."""
    case = TrainCase(
        images_ZHWC=ready.ready_ZHWC,
        labels_ZHW=ready.labels_ZHW,
        weights_ZHW=None if weigh is None else np.stack([weigh(item) for item in ready.labels_ZHW]),
    )
    return case, case.size_bytes


def unlabelled_case(case: IndexedCase) -> TrainCase:
    """Stands in for a case that can no longer be read: zeros that no loss sees."""
    shape = (len(case.foreground_Z), *case.shape_HWC)
    return TrainCase(
        images_ZHWC=np.zeros(shape, np.float32),
        labels_ZHW=np.full(shape[:3], UNLABELLED, np.uint8),
    )


def iter_batches(
    reader: CaseReader[TrainCase],
    pool: SlicePool,
    slices: npt.NDArray[np.int64],
    seeds: Seeds,
    *,
    size: int,
    patch: int,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """Batches of `size` slices, in the order given, assembled ahead of their use.

    slices: numbers into the pool; seeds: one for each. patch: side of random crops, 0 for whole
    slices.
    """
    groups = [slice(start, start + size) for start in range(0, len(slices), size)]

    def assemble(number: int) -> Batch:
        group = groups[number]
        coming = slices[group.start : group.start + _BATCHES_AHEAD * size]
        needed = dict.fromkeys(pool.case_S[coming].tolist())  # in order of first use
        for case in needed:
            reader.request(case)
        batch = _assemble(reader, pool, slices[group], seeds[group], patch)
        reader.make_room(set(needed))
        return _pinned(batch) if pin else batch

    with ThreadPoolExecutor(1, thread_name_prefix="reseg-batch") as ahead:
        waiting = [ahead.submit(assemble, number) for number in range(min(2, len(groups)))]
        for number in range(len(groups)):
            batch = waiting.pop(0).result()
            if number + 2 < len(groups):
                waiting.append(ahead.submit(assemble, number + 2))
            yield batch


def _assemble(
    reader: CaseReader[TrainCase],
    pool: SlicePool,
    slices: npt.NDArray[np.int64],
    seeds: Seeds,
    patch: int,
) -> Batch:
    cases = [reader.get(int(case)) for case in pool.case_S[slices]]
    places = [int(z) for z in pool.slice_S[slices]]
    images = [case.images_ZHWC[z] for case, z in zip(cases, places, strict=True)]
    labels = [case.labels_ZHW[z] for case, z in zip(cases, places, strict=True)]
    has_weights = any(case.weights_ZHW is not None for case in cases)
    weights = [
        np.ones(case.labels_ZHW.shape[1:], np.float32)
        if case.weights_ZHW is None
        else case.weights_ZHW[z]
        for case, z in zip(cases if has_weights else [], places, strict=False)
    ]
    if patch:
        corners = crop_corners(seeds, np.array([label.shape for label in labels]), patch)
        images = [_crop(item, at, patch, 0) for item, at in zip(images, corners, strict=True)]
        labels = [
            _crop(item, at, patch, UNLABELLED) for item, at in zip(labels, corners, strict=True)
        ]
        weights = [_crop(item, at, patch, 0) for item, at in zip(weights, corners, strict=False)]
    return Batch(
        images_NCHW=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        labels_NHW=torch.from_numpy(np.stack(labels)),
        weights_NHW=torch.from_numpy(np.stack(weights)) if weights else None,
        seeds_N=seeds,
    )


def _crop(
    array: npt.NDArray[Any], corner: npt.NDArray[np.int64], side: int, fill: int
) -> npt.NDArray[Any]:
    """A square window of the first two axes; what lies outside is `fill`."""
    top, left = (int(value) for value in corner)
    inside = array[max(0, top) : top + side, max(0, left) : left + side]
    if inside.shape[:2] == (side, side):
        return inside
    window = np.full((side, side, *array.shape[2:]), fill, array.dtype)
    y, x = max(0, -top), max(0, -left)
    window[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return window


def _pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which copies to a GPU do not wait."""
    return Batch(
        images_NCHW=batch.images_NCHW.pin_memory(),
        labels_NHW=batch.labels_NHW.pin_memory(),
        weights_NHW=None if batch.weights_NHW is None else batch.weights_NHW.pin_memory(),
        seeds_N=batch.seeds_N,
    )
