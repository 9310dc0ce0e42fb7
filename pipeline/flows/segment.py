"""Segment: plan -> compute -> verify -> publish, as the driver does it.

What is computed goes through `stream`, by the workers of `stages`. Only receipts come back; the driver
alone commits.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline import results, runs, storage, upkeep
from pipeline.balance import Balance, Workers, measure
from pipeline.bundle import Bundle, build_model, load_bundle
from pipeline.config import SegmentConfig, output_digest
from pipeline.errors import ConfigError, ResegError, ResultsError, TooManyBadImages
from pipeline.flows.cluster import connect, num_cores, plan_pool
from pipeline.flows.monitor import Monitor
from pipeline.flows.placement import Pool
from pipeline.flows.stages import Job
from pipeline.flows.stream import stream_receipts
from pipeline.formats import Source
from pipeline.planning import Selection, check_run_id, make_plan, operator
from pipeline.records import (
    Receipt,
)
from pipeline.runs import RunPlan
from pipeline.telemetry import Report, RunLog, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run did, for people and for `--json`."""

    run_id: str
    night: int | None
    published: bool
    resumed: bool
    counts: Mapping[str, Any]
    computed_images: int
    bad_by_class: Mapping[str, int]
    seconds: float
    stage_seconds: Mapping[str, float]
    stage_bytes: Mapping[str, int]
    busy_share: float | None
    advice: str
    notes: Sequence[str] = ()

    def to_plain(self) -> dict[str, Any]:
        """The object that `reseg segment --json` prints."""
        values = asdict(self)
        counts = values.pop("counts")
        return {**values, "cases": counts["cases"], "images": counts["images"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A run that is computed, and of which nothing is visible yet; or what was found done already.

    published_as: the night of a run that was published before. With nothing to do, `is_idle`.
    list_s: what planning took. workers: who computed, None if nobody had to.
    """

    plan: RunPlan
    results: str
    receipts: dict[str, Receipt]
    resumed: bool
    published_as: int | None
    started: float
    log: RunLog
    list_s: float = 0.0
    workers: Workers | None = None

    @property
    def is_idle(self) -> bool:
        """Whether the source, the bundle and the settings are those of the published night."""
        return not self.plan.works and not self.plan.removed

    @property
    def ordered(self) -> list[Receipt]:
        """Receipts in the order of the plan."""
        return [self.receipts[work.shard_id] for work in self.plan.works]


def run_segment(
    location: str,
    results_location: str,
    bundle_location: str,
    config: SegmentConfig,
    *,
    run_id: str | None = None,
    limit: int | None = None,
    address: str | None = None,
    report: Report | None = None,
    only: Selection | None = None,
) -> Summary:
    """Bring the results up to date with source, bundle and configuration; publish one night.

    Does nothing if nothing changed. Finishes an unfinished run whose plan still holds, and takes
    over from one that no longer holds the shards that are still the same. only: the part of
    the source to look at. Raises ResegError.
    """
    staged = stage_run(
        location,
        results_location,
        bundle_location,
        config,
        run_id=run_id,
        limit=limit,
        address=address,
        report=report,
        only=only,
    )
    if staged.published_as is not None or staged.is_idle:
        return summarize(staged, staged.published_as)
    record = make_record(staged)
    total, bad = record["totals"]["images"], record["counts"]["images"]["bad"]
    if total and bad / total > config.max_bad_share:
        raise TooManyBadImages(
            f"{bad} of {total} images are bad ({bad / total:.1%}, allowed are "
            f"{config.max_bad_share:.1%}): {_classes_in_words(record['bad_by_class'])}; run "
            f"{staged.plan.run_id} is complete but not published; the same command with a higher "
            "--max-bad-share publishes it at once"
        )
    night = publish_staged(staged, record)
    return summarize(staged, night, record)


def stage_run(
    location: str,
    results_location: str,
    bundle_location: str,
    config: SegmentConfig,
    *,
    run_id: str | None = None,
    limit: int | None = None,
    address: str | None = None,
    report: Report | None = None,
    only: Selection | None = None,
) -> Staged:
    """Plan, compute and verify, up to but without the commit. Raises ResegError."""
    started = time.monotonic()
    report = report or silent
    bundle = load_bundle(bundle_location)
    results_uri = storage.resolve(results_location)
    storage.check_writable(results_uri)
    plan, resumed = _find_or_make_plan(
        location, results_uri, bundle, config, run_id, limit, only, report
    )
    list_s = time.monotonic() - started
    log = RunLog(runs.run_uri(results_uri, plan.run_id, "log.jsonl"))
    done = None
    if plan.base_night is not None or resumed:
        done = results.night_of_run(results_uri, plan.run_id, since=plan.base_night)
    staged = Staged(
        plan=plan,
        results=results_uri,
        receipts={},
        resumed=resumed,
        published_as=done,
        started=started,
        log=log,
        list_s=list_s,
    )
    if done is not None or staged.is_idle:
        _close_published(results_uri)
        if plan.base_night is not None:
            results.settle(results_uri)
        return staged
    build_model(bundle)
    storage.require_commits(results_uri)
    log("start", run=plan.run_id, resumed=resumed, shards=len(plan.works), counts=plan.counts)
    try:
        receipts, workers = _complete(staged, bundle, config, address, report)
        runs.verify_receipts(results_uri, plan, receipts)
    except BaseException as error:
        log("stopped", run=plan.run_id, reason=type(error).__name__)
        with suppress(ResegError, OSError):  # what stopped the run matters more than its log
            if runs.has_plan(results_uri, plan.run_id):
                log.save()
        raise
    log.save()
    return replace(staged, receipts=receipts, workers=workers)


def _complete(
    staged: Staged, bundle: Bundle, config: SegmentConfig, address: str | None, report: Report
) -> tuple[dict[str, Receipt], Workers | None]:
    """Compute the shards that have no receipt; all receipts, and who computed if anybody had to."""
    plan, results_uri, resumed = staged.plan, staged.results, staged.resumed
    receipts = runs.load_receipts(results_uri, plan) if resumed else {}
    if len(receipts) == len(plan.works):
        return receipts if resumed else _start_run(plan, results_uri, resumed=False), None
    threads = max(1, config.inference.threads)
    wanted_cpus = (config.resources.actors or num_cores()) * threads
    with connect(address, wanted_cpus, config.resources.object_store_bytes):
        pool = plan_pool(config.resources, threads, len(plan.works), report)
        receipts = _start_run(plan, results_uri, resumed=resumed)
        _compute(plan, receipts, results_uri, bundle, config, pool, report, staged.log)
    workers = Workers(
        num_actors=pool.num_actors,
        decoders=config.resources.decoders,
        have_gpus=pool.gpus_per_actor > 0,
    )
    return receipts, workers


def make_record(staged: Staged) -> dict[str, Any]:
    """What the commit of a staged run will say about it."""
    plan = staged.plan
    totals = night_totals(staged.results, plan, staged.ordered)
    counts = {key: dict(value) for key, value in plan.counts.items()}
    counts["images"]["bad"], counts["cases"]["bad"] = totals.num_bad, totals.num_bad_cases
    return {
        "bundle": dict(plan.bundle),
        "config": dict(plan.config),
        "config_digest": plan.config_digest,
        "source": dict(plan.source),
        "counts": counts,
        "totals": {"cases": totals.num_cases, "images": totals.num_images},
        "code": dict(plan.code),
        "operator": operator(),
        "bad_by_class": bad_by_class(staged.ordered),
        "computed_images": sum(receipt.num_computed for receipt in staged.ordered),
    }


def publish_staged(staged: Staged, record: Mapping[str, Any]) -> int:
    """Commit a staged run; the number of its night. Raises CommitConflict."""
    plan = staged.plan
    night = results.publish(staged.results, plan, staged.receipts, record)
    upkeep.seal_all(staged.results)
    for finished in runs.open_runs(staged.results):  # others were planned on an older night
        runs.close_run(staged.results, finished)
    total, bad = record["totals"]["images"], record["counts"]["images"]["bad"]
    staged.log("published", run=plan.run_id, night=night, images=total, bad=bad)
    staged.log.save()
    return night


def _close_published(results_uri: str) -> None:
    """Take runs off the list that were killed between their commit and their last word."""
    for run_id in runs.open_runs(results_uri):
        if results.night_of_run(results_uri, run_id) is not None:
            runs.close_run(results_uri, run_id)


def _start_run(plan: RunPlan, results_uri: str, *, resumed: bool) -> dict[str, Receipt]:
    """Freeze a new plan and take over what open runs have done of it; the receipts there are."""
    if not resumed:
        runs.save_plan(results_uri, plan)
        for abandoned in runs.open_runs(results_uri):
            if abandoned != plan.run_id:
                runs.adopt_receipts(results_uri, plan, abandoned)
    return runs.load_receipts(results_uri, plan)


def _find_or_make_plan(
    location: str,
    results_uri: str,
    bundle: Bundle,
    config: SegmentConfig,
    run_id: str | None,
    limit: int | None,
    only: Selection | None,
    report: Report,
) -> tuple[RunPlan, bool]:
    """The plan to carry out, and whether it is that of a run that was started before."""
    if run_id is not None:
        frozen = runs.load_plan(results_uri, check_run_id(run_id))
        if frozen is not None:
            _check_frozen(frozen, location, bundle, config)
            return frozen, True
    plan = make_plan(
        location,
        results_uri,
        bundle,
        config,
        run_id=run_id,
        limit=limit,
        only=only,
        progress=report,
    )
    if run_id is None:
        for candidate in runs.open_runs(results_uri):
            with suppress(ResultsError):  # a damaged plan is set aside with its run
                frozen = runs.load_plan(results_uri, candidate)
                if frozen is not None and _is_same_plan(frozen, plan):
                    return frozen, True
    return plan, False


def _is_same_plan(frozen: RunPlan, plan: RunPlan) -> bool:
    return (
        frozen.base_night == plan.base_night
        and frozen.work_keys() == plan.work_keys()
        and frozen.removed == plan.removed
    )


def _check_frozen(frozen: RunPlan, location: str, bundle: Bundle, config: SegmentConfig) -> None:
    """Refuse to finish a run with another source, bundle or configuration."""
    if frozen.source["uri"] != storage.resolve(location):
        raise ConfigError(
            f"run {frozen.run_id} is of the source {frozen.source['uri']}, not {location}; "
            "start another run"
        )
    if frozen.bundle["digest"] != bundle.digest:
        raise ConfigError(
            f"run {frozen.run_id} was planned with the bundle {frozen.bundle['digest'][:12]} "
            f"({frozen.bundle['uri']}), not {bundle.digest[:12]}; finish it with that one, or "
            "start another run"
        )
    if frozen.config_digest != output_digest(config):
        raise ConfigError(
            f"run {frozen.run_id} was planned with another configuration; it is in its config.json; "
            "finish it with that one, or start another run"
        )


# The driver


def _compute(
    plan: RunPlan,
    receipts: dict[str, Receipt],
    results_uri: str,
    bundle: Bundle,
    config: SegmentConfig,
    pool: Pool,
    report: Report,
    log: RunLog,
) -> None:
    """Add to `receipts` those of the planned shards that have none yet, by computing them."""
    todo = [work for work in plan.works if work.shard_id not in receipts]
    source = Source(
        uri=plan.source["uri"],
        format=plan.source["format"],
        config=config.source,
        limits=config.limits,
        num_buckets=plan.source["num_buckets"],
    )
    job = Job(
        run_id=plan.run_id,
        results=results_uri,
        source=source,
        bundle_uri=bundle.uri,
        bundle_digest=bundle.digest,
        config=config,
        config_digest=plan.config_digest,
        recipe=bundle.recipe,
        labels=bundle.labels,
    )
    log("compute", run=plan.run_id, shards=len(todo), **asdict(pool))
    started, images = time.monotonic(), 0
    monitor = Monitor(plan.run_id, pool.num_actors, len(todo))
    for receipt in stream_receipts(todo, job, pool) if todo else ():
        receipts[receipt.shard_id] = receipt
        monitor.count(receipt)
        images += receipt.num_computed
        rate = images / max(time.monotonic() - started, 1e-9)
        report(len(receipts), len(plan.works), "shards", f"{rate:,.1f} images/s")
        log(
            "shard",
            run=plan.run_id,
            shard=receipt.shard_id,
            images=receipt.num_images,
            bad=receipt.num_bad,
            seconds=receipt.seconds,
            bytes=receipt.num_bytes,
        )
        for case, slice_index, error_class in receipt.bad_images:
            log(
                "bad image",
                run=plan.run_id,
                shard=receipt.shard_id,
                case=case,
                slice=slice_index,
                error_class=error_class,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What a night holds in all, the shards that the run does not touch included."""

    num_cases: int
    num_images: int
    num_bad_cases: int
    num_bad: int


def night_totals(results_uri: str, plan: RunPlan, receipts: Sequence[Receipt]) -> Totals:
    """The night that publishing a run would make."""
    touched = {work.shard_id for work in plan.works}
    removed = {parts.masks for parts in plan.removed}
    base = None if plan.base_night is None else results.open_night(results_uri, plan.base_night)
    counted: list[Receipt | results.PublishedShard] = list(receipts)
    if base is not None:
        counted += [
            shard
            for shard in base.shards.values()
            if shard.shard_id not in touched and shard.parts.masks not in removed
        ]
    return Totals(
        num_cases=sum(item.num_cases for item in counted),
        num_images=sum(item.num_images for item in counted),
        num_bad_cases=sum(item.num_bad_cases for item in counted),
        num_bad=sum(item.num_bad for item in counted),
    )


def bad_by_class(receipts: Iterable[Receipt]) -> dict[str, int]:
    """How many images of the written parts have each error class."""
    found: Counter[str] = Counter()
    for receipt in receipts:
        found.update(receipt.bad_by_class)
    return dict(sorted(found.items()))


def _classes_in_words(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "from earlier nights"


def summarize(
    staged: Staged, night: int | None, record: Mapping[str, Any] | None = None
) -> Summary:
    """What a run did. record: what the commit recorded or would record, where the run has one."""
    plan = staged.plan
    receipts = staged.ordered if record else []
    balance = balance_of(staged, receipts)
    idle = staged.is_idle and staged.published_as is None
    return Summary(
        run_id=plan.run_id,
        night=plan.base_night if idle else night,
        published=night is not None,
        resumed=staged.resumed,
        counts=record["counts"] if record else plan.counts,
        computed_images=sum(receipt.num_computed for receipt in receipts),
        bad_by_class=record["bad_by_class"] if record else {},
        seconds=round(time.monotonic() - staged.started, 3),
        stage_seconds=balance.seconds if receipts else {},
        stage_bytes=balance.num_bytes if receipts else {},
        busy_share=balance.busy_share,
        advice=balance.advice,
        notes=tuple(dict.fromkeys(note for receipt in receipts for note in receipt.notes)),
    )


def balance_of(staged: Staged, receipts: Sequence[Receipt]) -> Balance:
    """Where the time of a staged run went."""
    return measure(receipts, staged.list_s, staged.workers, len(staged.plan.works))
