"""The flow's workers in this very process, one after the other: the same code without Ray.

As a program, `python without_ray.py POINT COMMAND ...` runs a command of `reseg` so, and kills itself
with SIGKILL at a named point of the night; `-` kills nowhere.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pyarrow as pa

from pipeline.flows import segment, stages
from pipeline.flows.placement import Pool
from pipeline.records import receipt_from_json


def stream_receipts(todo: Any, job: Any, pool: Any) -> Iterator[Any]:
    """In place of the three Ray Data operators."""
    actor = stages.PredictStage(job)
    for work in todo:
        rows = pa.table({"work": pa.array([work.to_json()], pa.binary())})
        for stage in (
            lambda batch: stages.read_stage(batch, job),
            actor,
            lambda batch: stages.finish_stage(batch, job),
        ):
            rows = pa.concat_tables(list(stage(rows)))
        yield receipt_from_json(rows.column("receipt")[0].as_py())


@contextmanager
def without_ray() -> Iterator[None]:
    """No Ray within this context."""
    pool = Pool(num_actors=1, cpus_per_actor=1, gpus_per_actor=0)
    with (
        mock.patch.object(segment, "stream_receipts", stream_receipts),
        mock.patch.object(segment, "connect", return_value=nullcontext()),
        mock.patch.object(segment, "plan_pool", return_value=pool),
    ):
        yield


def _die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(module: Any, name: str, calls: int = 1) -> Any:
    """Die once a function has been called so often."""
    real, done = getattr(module, name), []

    def function(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        done.append(1)
        if len(done) == calls:
            _die()
        return result

    return mock.patch.object(module, name, function)


def kill_at(point: str) -> Any:
    """A patch that ends this process at a point of the night."""
    from pipeline import results, runs
    from pipeline.flows import nightly

    return {
        "-": lambda: nullcontext(),
        "after-plan": lambda: _after(runs, "save_plan"),
        "mid-segment": lambda: _after(runs, "put_receipt", 3),
        "before-commit": lambda: mock.patch.object(nightly, "publish_staged", _die),
        "between-commits": lambda: _after(results, "_commit_side", 1),
        "before-publication": lambda: _after(results, "_commit_side", 2),
        "after-commit": lambda: _after(results, "_replace_night"),
        "before-report": lambda: mock.patch.object(nightly, "_write_report", _die),
        "mid-collect": lambda: mock.patch.object(nightly, "_tidy", _die),
    }[point]()


if __name__ == "__main__":
    chosen, *sys.argv[1:] = sys.argv[1:]
    from jobs.cli import main

    with without_ray(), kill_at(chosen):
        main()
