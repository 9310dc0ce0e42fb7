"""The labelled set: what the published network and tonight's reach on it, case by case.

Each network with its settings has a results folder of its own in `_labelled/`, so a network is run
there once, and again only for what has changed in the set.
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from pipeline import results, storage
from pipeline.bundle import load_bundle
from pipeline.config import SegmentConfig, decode, output_digest
from pipeline.errors import BundleError
from pipeline.flows.evaluate import check_references
from pipeline.flows.segment import Staged, run_segment
from pipeline.gate import PairedScores, pair_scores
from pipeline.policy import NightlyConfig, labelled_segment_config
from pipeline.records import sha256_hex
from pipeline.results import Night, Record
from pipeline.telemetry import Report

_LABELLED = "_labelled"


def check_labelled(config: NightlyConfig) -> None:
    """Say at once what would be found out only after the archive was segmented. Raises ConfigError."""
    if config.labelled.uri:
        check_references(config.labelled.uri, labelled_segment_config(config))


def must_score(config: NightlyConfig, staged: Staged, base: Night | Record | None) -> bool:
    """Whether a labelled set has to say something: another network or other settings than published."""
    if base is None or not config.labelled.uri:
        return False
    before = (base.metadata["bundle"]["digest"], base.metadata["config_digest"])
    return before != (staged.plan.bundle["digest"], staged.plan.config_digest)


def score_labelled(
    config: NightlyConfig, staged: Staged, address: str | None, told: Report
) -> tuple[PairedScores | None, str, str | None]:
    """Dice of the published and of tonight's bundle on the labelled set; why not; where it lies."""
    if not config.labelled.uri:
        return None, "no labelled set is configured", None
    base = results.record_of(staged.results)
    digest = staged.plan.bundle["digest"]
    segment = labelled_segment_config(config)
    if base is None:
        _segment_labelled(config, config.bundle, digest, segment, address, told)
        why = "there is no published night to compare with"
        return None, why, _labelled_key(config, digest, segment)
    if not must_score(config, staged, base):
        why = "same network and settings as the published night"
        return None, why, base.metadata.get("labelled")
    scores, why = score_bundles(config, base, digest, address, told)
    return scores, why, _labelled_key(config, digest, segment)


def score_bundles(
    config: NightlyConfig, base: Night | Record, digest: str, address: str | None, told: Report
) -> tuple[PairedScores | None, str]:
    """Dice on the labelled set of the published bundle and of `config.bundle`; or why there is none.

    digest: of config.bundle.
    """
    if not config.labelled.uri:
        return None, "no labelled set is configured"
    segment = labelled_segment_config(config)
    after = _segment_labelled(config, config.bundle, digest, segment, address, told)
    before = _published_scores(config, base, address, told)
    if before is None:
        return None, f"the published bundle {base.metadata['bundle']['uri']} is gone"
    scores = pair_scores(before, after)
    return scores, "" if scores else "no labelled case has a score from both bundles"


def _labelled_key(config: NightlyConfig, bundle_digest: str, segment: SegmentConfig) -> str:
    """One folder of results for each network, its settings, and labelled set."""
    place = sha256_hex(storage.resolve(config.labelled.uri).encode())
    return f"{bundle_digest[:16]}-{output_digest(segment)[:16]}-{place[:8]}"


def _segment_labelled(
    config: NightlyConfig,
    bundle: str,
    digest: str,
    segment: SegmentConfig,
    address: str | None,
    told: Report,
) -> list[dict[str, Any]]:
    """The `cases` rows of the labelled set with one bundle; computed only where something changed."""
    out = _labelled_folder(config, _labelled_key(config, digest, segment))
    run_segment(config.labelled.uri, out, bundle, segment, address=address, report=told)
    night = results.open_night(out)
    assert night is not None
    rows: list[dict[str, Any]] = results.read_table(night, "cases").to_pylist()
    return rows


def _labelled_folder(config: NightlyConfig, key: str) -> str:
    return storage.join(storage.resolve(config.results), _LABELLED, key)


def _published_scores(
    config: NightlyConfig, base: Night | Record, address: str | None, told: Report
) -> list[dict[str, Any]] | None:
    """Those of the published bundle: brought up to date if it is still there, else as last scored."""
    old = decode(SegmentConfig, base.metadata["config"])
    segment = replace(labelled_segment_config(config), inference=old.inference, limits=old.limits)
    uri, digest = base.metadata["bundle"]["uri"], base.metadata["bundle"]["digest"]
    with suppress(BundleError):
        if load_bundle(uri).digest == digest:
            return _segment_labelled(config, uri, digest, segment, address, told)
    key = base.metadata.get("labelled") or _labelled_key(config, digest, segment)
    night = results.open_night(_labelled_folder(config, key))
    return None if night is None else results.read_table(night, "cases").to_pylist()
