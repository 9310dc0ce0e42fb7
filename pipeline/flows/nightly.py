"""Nightly: plan -> segment into staging -> compare -> gate -> publish -> report -> collect.

What a night was found to be lies beside its run (`examination.json`, `cases.parquet`,
`images.parquet`, `review.*`, `report.html`), whether it was published or refused.
"""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.parquet as pq

from pipeline import results, runs, storage, upkeep
from pipeline.bundle import load_bundle
from pipeline.compare import Comparison, compare_nights
from pipeline.config import decode
from pipeline.correction import Exported, export_cases
from pipeline.drift import Drift, find_drift, reference_cases
from pipeline.errors import CommitConflict, ConfigError, ResegError, ResultsError
from pipeline.flows.labelled import check_labelled, must_score, score_labelled
from pipeline.flows.segment import (
    Staged,
    Summary,
    make_record,
    publish_staged,
    stage_run,
    summarize,
)
from pipeline.gate import PairedScores, Verdict, judge, verdict_from_plain
from pipeline.groups import make_group_of
from pipeline.lock import locked
from pipeline.planning import check_apart, new_run_id, operator
from pipeline.policy import NightlyConfig, ReportConfig
from pipeline.review import ReviewItem, make_review, review_csv
from pipeline.telemetry import Report, RunLog, silent
from pipeline.upkeep import Waste
from pipeline.webpage import read_rows, write_page

_EXAMINATION = "examination.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a night. verdict None: there was nothing to judge."""

    summary: Summary
    verdict: Verdict | None
    review: Sequence[ReviewItem]
    report: str | None
    waste: Waste | None
    case_states: Mapping[str, int]
    base_night: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether the gate kept the night back."""
        return self.verdict is not None and not self.verdict.passed and not self.summary.published

    def to_plain(self) -> dict[str, Any]:
        """The object that `reseg nightly --json` prints."""
        return {
            **self.summary.to_plain(),
            "refused": self.refused,
            "verdict": self.verdict and self.verdict.to_plain(),
            "review": [item.to_plain() for item in self.review],
            "report": self.report,
            "report_notes": list(self.notes),
            "collected": self.waste and self.waste.to_plain(),
        }


def run_nightly(
    config: NightlyConfig,
    *,
    run_id: str | None = None,
    address: str | None = None,
    report: Report | None = None,
) -> Outcome:
    """Do a whole night; safe to call again after any end.

    What a dead run left is finished if its plan still holds; else it is set aside, and the shards
    whose work is the same are taken over. A night that the gate refuses stays staged. Raises
    ResegError; `Busy` if another process is at it.
    """
    config.check_places()
    results_uri = storage.resolve(config.results)
    storage.check_writable(results_uri)
    check_apart(storage.resolve(config.source), results_uri)
    group_of = make_group_of(config.groups)
    load_bundle(config.bundle)
    check_labelled(config)
    if config.report.path:
        _check_page(config.report.path)
    told = report or silent
    with locked(storage.join(results_uri, "_runs"), "running a night"):
        staged = stage_run(
            config.source,
            results_uri,
            config.bundle,
            config.segment,
            run_id=run_id,
            address=address,
            report=told,
        )
        if staged.published_as is not None or staged.is_idle:
            return _nothing_to_do(staged, config, told)
        record = make_record(staged)
        scores, why_no_scores, key = score_labelled(config, staged, address, told)
        verdict, review, states = _examine(
            staged, config, record, group_of, (scores, why_no_scores), told
        )
        night = None
        if verdict.passed:
            night = publish_staged(
                staged, record | {"verdict": verdict.to_plain(), "labelled": key}
            )
        staged.log("judged", run=staged.plan.run_id, passed=verdict.passed)
        staged.log.save()
        waste = _tidy(results_uri, config, told)
        page, note = _write_report(results_uri, staged.plan.run_id, config.report, told)
        return Outcome(
            summary=summarize(staged, night, record),
            verdict=verdict,
            review=review,
            report=page,
            waste=waste,
            case_states=states,
            base_night=staged.plan.base_night,
            notes=(note,) if note else (),
        )


def _nothing_to_do(staged: Staged, config: NightlyConfig, told: Report) -> Outcome:
    """The published night stands; finish what a killed run may have left to do after its commit."""
    run_id = results.published_run(staged.results)
    page, note = None, ""
    if run_id is not None:
        page, note = _write_report(staged.results, run_id, config.report, told, again=False)
    return Outcome(
        summary=summarize(staged, staged.published_as),
        verdict=None,
        review=(),
        report=page,
        waste=_tidy(staged.results, config, told),
        case_states={},
        notes=(note,) if note else (),
    )


def _tidy(results_uri: str, config: NightlyConfig, told: Report) -> Waste | None:
    """Seal the published night, and collect what no kept night needs."""
    if results.latest_night_number(results_uri) is None:
        return None
    upkeep.seal_all(results_uri)
    waste = upkeep.find_waste(results_uri, config.keep)
    if waste.files or waste.nights_dropped:
        upkeep.collect(results_uri, waste, told)
    return waste


def _examine(
    staged: Staged,
    config: NightlyConfig,
    record: Mapping[str, Any],
    group_of: Callable[[str], str],
    scored: tuple[PairedScores | None, str],
    told: Report,
) -> tuple[Verdict, list[ReviewItem], dict[str, int]]:
    """Compare with the published night, hold against the gate, list for review; all of it is kept."""
    plan = staged.plan
    base = None if plan.base_night is None else results.open_night(staged.results, plan.base_night)
    after = results.staged_night(plan, staged.receipts, base, staged.results)
    comparison = compare_nights(base, after, group_of, progress=told)
    reference = reference_cases(base, group_of)
    drift = find_drift(comparison.cases, reference)
    scores, why_no_scores = scored
    verdict = judge(
        config.gate,
        comparison,
        drift,
        num_images=record["totals"]["images"],
        num_bad=record["counts"]["images"]["bad"],
        scores=scores,
        why_no_scores=why_no_scores,
        must_score=must_score(config, staged, base),
    )
    review = make_review(comparison, drift, reference, most=config.report.review_cases, base=base)
    summary = summarize(staged, None, record)
    page = asdict(config.report)
    _keep_examination(staged, comparison, verdict, review, drift, scores, summary, page)
    return verdict, review, comparison.case_states


def _keep_examination(
    staged: Staged,
    comparison: Comparison,
    verdict: Verdict,
    review: Sequence[ReviewItem],
    drift: Sequence[Drift],
    scores: PairedScores | None,
    summary: Summary,
    page: Mapping[str, Any],
) -> None:
    run_id = staged.plan.run_id

    def keep(name: str, data: bytes) -> None:
        storage.write(runs.run_uri(staged.results, run_id, name), data)

    for name, table in (("cases", comparison.cases), ("images", comparison.images)):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        keep(f"{name}.parquet", buffer.getvalue())
    keep("review.csv", review_csv(review))
    values = {
        "run_id": run_id,
        "base_night": staged.plan.base_night,
        "examined_s": time.time(),
        "bundle": dict(staged.plan.bundle),
        "source": dict(staged.plan.source),
        "code": dict(staged.plan.code),
        "summary": summary.to_plain(),
        "verdict": verdict.to_plain(),
        "comparison": {
            "counts": dict(comparison.counts),
            "case_states": comparison.case_states,
            "num_cases_before": comparison.num_cases_before,
            "num_cases_after": comparison.num_cases_after,
        },
        "drift": [asdict(item) for item in drift],
        "scores": scores and asdict(scores),
        "review": [item.to_plain() for item in review],
        "page": dict(page),
    }
    keep(_EXAMINATION, json.dumps(values).encode())


def load_examination(results_uri: str, run_id: str) -> dict[str, Any]:
    """What a nightly run found. Raises ResultsError if there is nothing."""
    try:
        data = storage.read(runs.run_uri(results_uri, run_id, _EXAMINATION))
        values: dict[str, Any] = json.loads(data)
        verdict_from_plain(values["verdict"])
        decode(ReportConfig, values["page"])
        for item in values["review"]:
            ReviewItem(**item)
        if not {"run_id", "summary", "comparison", "drift", "bundle"} <= values.keys():
            raise KeyError
    except (FileNotFoundError, NotADirectoryError):
        raise ResultsError(
            f"run {run_id} in {results_uri} was not examined: only nightly runs are"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError):
        raise ResultsError(f"the examination of run {run_id} in {results_uri} is damaged") from None
    return values


def _check_page(path: str) -> None:
    """Whether the page can be written where the configuration wants it. Raises ConfigError."""
    uri = storage.resolve(path)
    if storage.is_folder(uri):
        raise ConfigError(f"report.path {uri} is a folder; say the name of a file")
    storage.check_writable(uri.rpartition("/")[0])


def _write_report(
    results_uri: str, run_id: str, page: ReportConfig, told: Report, *, again: bool = True
) -> tuple[str | None, str]:
    """Write the page of a run, beside it and where the configuration wants it; what went wrong.

    None where there was nothing to do. A report that fails does not make a published night look
    failed: it is said, and made the next time.
    """
    uri = runs.run_uri(results_uri, run_id, "report.html")
    places = [uri, *([storage.resolve(page.path)] if page.path else [])]
    if not again and all(storage.file_info(place) is not None for place in places):
        return None, ""
    if not _was_examined(results_uri, run_id):
        return None, ""
    told(0, 1, "writing the report", "")
    try:
        html = write_page(results_uri, load_examination(results_uri, run_id), page.worst_cases)
        for place in places:
            storage.write(place, html)
    except (ResegError, OSError) as error:
        return None, f"the report could not be written: {error}"
    return uri, ""


# By hand: publishing a refused night, taking one back


def publish_refused(
    results_location: str, run_id: str, because: str, *, report: Report | None = None
) -> Outcome:
    """Publish a staged night over the gate's head, on the record.

    Raises ConfigError without a reason, ResultsError for a run that is not complete, CommitConflict
    if another night was published since.
    """
    if not because.strip():
        raise ConfigError("an override goes on the record: say why, with --because")
    results_uri = storage.resolve(results_location)
    told = report or silent
    plan = runs.load_plan(results_uri, run_id)
    if plan is None:
        waiting = ", ".join(runs.open_runs(results_uri)) or "none"
        raise ResultsError(f"{results_uri} has no run {run_id!r}; staged are: {waiting}")
    log = RunLog(runs.run_uri(results_uri, run_id, "log.jsonl"))
    done = results.night_of_run(results_uri, run_id)
    staged = Staged(
        plan=plan,
        results=results_uri,
        receipts={},
        resumed=True,
        published_as=done,
        started=time.monotonic(),
        log=log,
    )
    if done is not None:
        record = next(n for n in results.history(results_uri) if n["night"] == done)
        summary = replace(summarize(staged, done), counts=record["counts"])
        return _as_outcome(replace(summary, bad_by_class=record["bad_by_class"]), None, None)
    if results.latest_night_number(results_uri) != plan.base_night:
        raise CommitConflict(
            f"run {run_id} was planned against night {plan.base_night}, but another run has published "
            "since; its night cannot be published any more: run the nightly command again"
        )
    with locked(storage.join(results_uri, "_runs"), "running a night"):
        for receipt in runs.all_receipts(results_uri, run_id):
            staged.receipts[receipt.shard_id] = receipt
        missing = len(plan.works) - len(staged.receipts)
        if missing:
            raise ResultsError(
                f"run {run_id} is not complete: {missing} of {len(plan.works)} shards are not "
                "computed; the command that started it goes on with it"
            )
        runs.verify_receipts(results_uri, plan, staged.receipts)
        record = make_record(staged) | {"because": because, "operator": operator()}
        verdict, examined = None, None
        try:
            examined = load_examination(results_uri, run_id)
            verdict = verdict_from_plain(examined["verdict"])
            record["verdict"] = {**verdict.to_plain(), "overridden": not verdict.passed}
        except ResultsError:
            record["verdict"] = None
        night = publish_staged(staged, record)
        page, note = None, ""
        if examined is not None:
            where = decode(ReportConfig, examined["page"])
            page, note = _write_report(results_uri, run_id, where, told)
    outcome = _as_outcome(summarize(staged, night, record), verdict, page)
    return replace(outcome, notes=(note,) if note else ())


def _as_outcome(summary: Summary, verdict: Verdict | None, page: str | None) -> Outcome:
    return Outcome(
        summary=summary, verdict=verdict, review=(), report=page, waste=None, case_states={}
    )


def roll_back(results_location: str, to: int, because: str) -> dict[str, Any]:
    """Publish night `to` again as a new night; what was done, for `--json`."""
    results_uri = storage.resolve(results_location)
    run_id = f"rollback-{new_run_id()}"
    with locked(storage.join(results_uri, "_runs"), "rolling back"):
        night = results.rollback(results_uri, to, because, run_id=run_id, operator=operator())
        for staged in runs.open_runs(results_uri):  # planned on the night that was taken back
            runs.close_run(results_uri, staged)
        upkeep.seal_all(results_uri)
    opened = results.open_night(results_uri, night)
    assert opened is not None
    return {
        "night": night,
        "run_id": run_id,
        "content_of": to,
        "because": because,
        "images": sum(shard.num_images for shard in opened.shards.values()),
    }


def _newest_run(results_uri: str, run_id: str | None) -> str:
    """The run asked for, or the newest nightly one: a staged one before the published one."""
    if run_id is not None:
        return run_id
    waiting = [r for r in runs.open_runs(results_uri) if _was_examined(results_uri, r)]
    for candidate in [
        *reversed(waiting),
        *(n.get("run_id", "") for n in results.history(results_uri)),
    ]:
        if _was_examined(results_uri, candidate):
            return str(candidate)
    raise ResultsError(f"none of the nights of {results_uri} was a nightly run: none was examined")


def _was_examined(results_uri: str, run_id: str) -> bool:
    return storage.file_info(runs.run_uri(results_uri, run_id, _EXAMINATION)) is not None


def remake_report(
    results_location: str, run_id: str | None, worst_cases: int, report: Report | None = None
) -> bytes:
    """The page of a run made again; run_id None: of the newest nightly run, published or refused."""
    results_uri = storage.resolve(results_location)
    examined = load_examination(results_uri, _newest_run(results_uri, run_id))
    (report or silent)(0, 1, "writing the report", "")
    return write_page(results_uri, examined, worst_cases)


def read_review(results_location: str, run_id: str | None) -> tuple[str, list[dict[str, Any]]]:
    """The run, and its review list, as plain values."""
    results_uri = storage.resolve(results_location)
    chosen = _newest_run(results_uri, run_id)
    items: list[dict[str, Any]] = load_examination(results_uri, chosen)["review"]
    return chosen, items


def export_review(
    results_location: str,
    run_id: str,
    items: Sequence[Mapping[str, Any]],
    folder: str,
    report: Report | None = None,
) -> Exported:
    """Write cases of a run's review list as files to correct; see `correction.export_cases`."""
    results_uri = storage.resolve(results_location)
    _, night = results.nights_of_run(results_uri, run_id)
    rows = read_rows(results_uri, run_id, "cases").select(["case_id", "shard_id"]).to_pylist()
    shard_of = {row["case_id"]: row["shard_id"] for row in rows}
    pairs = [(shard_of[item["case_id"]], item["case_id"]) for item in items]
    return export_cases(night, pairs, storage.resolve(folder), report or silent)
