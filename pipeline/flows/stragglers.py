"""Stragglers: the last shards of a run, stuck on a slow or frozen worker, are computed again elsewhere.

The first receipt of a shard is the one that counts (`runs.put_receipt`), so a second attempt can
do no harm: the first one may go on, come back later, or never.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from pipeline.balance import worked_s
from pipeline.config import ResourceConfig
from pipeline.errors import RunStalled
from pipeline.records import Receipt, Work

_POLL_S = 0.5
_LEAST_PATIENCE_S = 1.0
_NOTE = "a shard hung on its worker and was computed again on another"


class Stragglers:
    """Watches, in a thread, which receipts a stream has yet to deliver, and for how long it is silent.

    start: begins the second attempt at a shard and returns a future of Ray's for its receipt.
    close: ends the stream, which frees what its workers hold. in_flight: how many shards can be in
    work at once; as long as more are missing, those that are only waiting cannot be told from
    those that hang.
    """

    def __init__(
        self,
        works: Sequence[Work],
        resources: ResourceConfig,
        *,
        in_flight: int,
        start: Callable[[Work], Any],
        close: Callable[[], None],
    ) -> None:
        self._missing = {work.shard_id: work for work in works}
        self._resources = resources
        self._in_flight = in_flight
        self._start, self._close = start, close
        self._durations_s: list[float] = []
        self._attempts: dict[str, list[Any]] = {}
        self._heard = time.monotonic()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reseg-stragglers", daemon=True)

    def __enter__(self) -> Self:
        if self._resources.straggler_factor > 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray

        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        for attempts in self._attempts.values():
            for attempt in attempts:
                ray.cancel(attempt, force=True)

    def delivered(self, receipt: Receipt) -> None:
        """To be called with each receipt that the stream yields."""
        with self._lock:
            self._missing.pop(receipt.shard_id, None)
            self._durations_s.append(worked_s(receipt))
            self._heard = time.monotonic()

    @property
    def have_begun(self) -> bool:
        """Whether shards are being computed a second time, so that the stream can be done without."""
        return bool(self._attempts)

    def rest(self) -> Iterator[Receipt]:
        """The receipts that the stream did not deliver, as second attempts end.

        An attempt may itself hang, as on a frozen machine that takes it and never answers: after
        growing pauses each shard gets another one. Raises RunStalled if none ends in
        `stall_timeout_s`, and what Ray raises for an attempt.
        """
        import ray

        self._over.set()
        heard, patience_s = time.monotonic(), max(self._limit_s(), _LEAST_PATIENCE_S)
        while waiting := self._missing.keys() & self._attempts.keys():
            futures = {future: key for key in waiting for future in self._attempts[key]}
            done, _ = ray.wait([*futures], timeout=min(patience_s, self._resources.stall_timeout_s))
            if done:
                receipt: Receipt = ray.get(done[0])
                heard = time.monotonic()
                del self._missing[futures[done[0]]]
                yield replace(receipt, notes=(*receipt.notes, _NOTE))
            elif time.monotonic() - heard >= self._resources.stall_timeout_s:
                raise RunStalled(
                    f"{len(waiting)} shards hang, and hang again wherever they are computed anew, "
                    f"for {self._resources.stall_timeout_s:g} s; the same command resumes the run"
                )
            else:
                patience_s *= 2
                for key in waiting:
                    self._attempts[key].append(self._start(self._missing[key]))

    def _watch(self) -> None:
        """Begin second attempts once the stream is silent; end it when it is no longer needed.

        It is also ended after twice that silence, for its idle workers may hold the GPUs that the
        second attempts wait for.
        """
        while not self._over.wait(_POLL_S):
            if len(self._missing) > self._in_flight:
                continue
            with self._lock:
                missing = list(self._missing.values())
                silent_s = time.monotonic() - self._heard
                limit_s = self._limit_s()
            if not missing:
                return
            if self._attempts:
                if self._are_made(missing) or silent_s > 2 * limit_s:
                    self._close()
                    return
            elif silent_s > limit_s:
                self._attempts = {work.shard_id: [self._start(work)] for work in missing}

    def _limit_s(self) -> float:
        """How long the stream may be silent; for good while no shard was done to compare with."""
        if not self._durations_s:
            return float("inf")
        usual_s = self._resources.straggler_factor * statistics.median(self._durations_s)
        return max(usual_s, self._resources.straggler_floor_s)

    def _are_made(self, missing: Sequence[Work]) -> bool:
        """Whether every missing shard has a second attempt that ended."""
        import ray

        attempts = [self._attempts[work.shard_id][0] for work in missing]
        done, _ = ray.wait(attempts, num_returns=len(attempts), timeout=0)
        return len(done) == len(attempts)
