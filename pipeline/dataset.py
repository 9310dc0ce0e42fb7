"""What a network is trained on: an index of cases and slices, whose turn each is, and who judges.

The index is built once, by decoding every case: for each slice the lesion area on the network's
grid, for each bad one its reason. Split, order and weights are pure functions of index,
configuration and (seed, epoch, position); nothing about them is stored.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.cases import DecodedCase, decode_case, mark_unusable
from pipeline.config import LimitsConfig, SamplingConfig, SplitConfig
from pipeline.errors import BadImage, ConfigError, ErrorClass
from pipeline.formats import FORMATS, Source
from pipeline.records import UNLABELLED, CaseRef, case_from_plain, to_plain
from pipeline.sandbox import Sandbox
from pipeline.transforms import Recipe
from pipeline.transforms.arrays import to_numpy
from pipeline.transforms.preprocess import Trace, run_preprocess, to_network

Part = Literal["train", "validation", "test"]

_STR, _I32 = pa.string(), pa.int32()

INDEX_SCHEMA = pa.schema(
    [
        ("case_id", _STR),
        ("shard_path", _STR),
        ("source", pa.int16()),
        ("ref", _STR),  # the CaseRef as JSON: where the bytes are, and of which version
        ("digest", _STR),  # of names, bytes, spacing; what is read later must have the same
        ("height", _I32),  # on the network's grid
        ("width", _I32),
        ("channels", _I32),
        ("foreground", pa.list_(_I32)),  # pixels a slice of the network's grid; -1: no reference
        ("label_pixels", pa.list_(pa.int64())),  # by label, on the network's grid
        ("num_images", _I32),
        ("problems", _STR),  # [[slice, error class, message], …] as JSON
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexJob:
    """What it takes to decode a case and bring it to the network's grid."""

    source: Source
    recipe: Recipe
    num_labels: int
    channels: int
    """Of the network's input."""
    also: tuple[Source, ...] = ()
    """More sources, numbered from 1; `source` is number 0."""

    def source_number(self, number: int) -> Source:
        """One of the sources."""
        return (self.source, *self.also)[number]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedCase:
    """One case that can be trained on or judged by, from one row of the index."""

    case_id: str
    shard_path: str
    ref: CaseRef
    digest: str
    shape_HWC: tuple[int, int, int]
    foreground_Z: npt.NDArray[np.int32]
    source: int = 0

    @property
    def size_bytes(self) -> int:
        """Of the images (float32) and labels (uint8) on the network's grid."""
        height, width, channels = self.shape_HWC
        return len(self.foreground_Z) * height * width * (4 * channels + 1)


@dataclass(slots=True, kw_only=True)
class ReadyCase:
    """A case on the network's grid: float32 channels last, labels with UNLABELLED slices."""

    decoded: DecodedCase
    ready_ZHWC: Any
    labels_ZHW: npt.NDArray[np.uint8]
    trace: Trace
    native_ZHW: tuple[int, ...]


def read_ready(
    job: IndexJob,
    shard_path: str,
    ref: CaseRef,
    sandbox: Sandbox,
    digest: str | None = None,
    *,
    number: int = 0,
) -> ReadyCase | DecodedCase:
    """Read, decode and prepare one case; where nothing of it can be used, only what was decoded.

    digest: what the case's content must have; another one makes all its slices unusable.
    number: of the source.
    """
    source = job.source_number(number)
    encoded = next(iter(FORMATS[source.format].read_cases(source, shard_path, [ref])))
    max_pixels = source.limits.max_case_pixels
    decoded = decode_case(encoded, sandbox, source.config, job.num_labels, max_pixels=max_pixels)
    if digest is not None and decoded.digest != digest:
        message = "the case is not what it was when the index was made"
        mark_unusable(decoded, BadImage(ErrorClass.CHANGED_DURING_RUN, message))
    return prepare(job, decoded)


def prepare(job: IndexJob, decoded: DecodedCase) -> ReadyCase | DecodedCase:
    """A decoded case on the network's grid, with its references brought along."""
    if decoded.volume_ZHWC is None:
        return decoded
    try:
        ready_ZHWC, trace = run_preprocess(decoded.volume_ZHWC, job.recipe.preprocess)
        if ready_ZHWC.shape[3] != job.channels:
            message = (
                f"the image has {ready_ZHWC.shape[3]} channels, the network takes {job.channels}"
            )
            raise BadImage(ErrorClass.CHANNEL_MISMATCH, message)
    except BadImage as error:
        mark_unusable(decoded, error)
        return decoded
    labels_ZHW = np.full(decoded.volume_ZHWC.shape[:3], UNLABELLED, np.uint8)
    for z, reference_HW in enumerate(decoded.references):
        if reference_HW is not None:
            labels_ZHW[z] = reference_HW
    return ReadyCase(
        decoded=decoded,
        ready_ZHWC=to_numpy(ready_ZHWC).astype(np.float32, copy=False),
        labels_ZHW=to_network(labels_ZHW, trace),
        trace=trace,
        native_ZHW=decoded.volume_ZHWC.shape[:3],
    )


def open_sandbox(limits: LimitsConfig) -> Sandbox:
    """A decoder child with the configured limits."""
    return Sandbox(
        max_pixels=limits.max_pixels,
        timeout_s=limits.decode_timeout_s,
        memory_bytes=limits.decode_memory_bytes,
    )


# The index


def index_cases(
    job: IndexJob, shard_path: str, cases: Sequence[CaseRef], number: int = 0
) -> pa.Table:
    """Decode some cases of one shard of a source: a row of INDEX_SCHEMA for each, good or bad."""
    rows = []
    storage.expect(job.source.uri)
    with open_sandbox(job.source.limits) as sandbox:
        for ref in cases:
            ready = read_ready(job, shard_path, ref, sandbox, number=number)
            rows.append({**_index_row(shard_path, ref, ready, job.num_labels), "source": number})
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def _index_row(
    shard_path: str, ref: CaseRef, case: ReadyCase | DecodedCase, num_labels: int
) -> dict[str, Any]:
    decoded = case.decoded if isinstance(case, ReadyCase) else case
    row = {
        "case_id": decoded.case_id,
        "shard_path": shard_path,
        "ref": json.dumps(to_plain(ref)),
        "digest": decoded.digest,
        "num_images": len(decoded.slices),
        "problems": json.dumps(
            [
                [item.name, item.problem.error_class, item.problem.message]
                for item in decoded.slices
                if item.problem is not None
            ]
        ),
        "foreground": [],
        "label_pixels": [],
    }
    if isinstance(case, ReadyCase):
        labels_ZHW = case.labels_ZHW
        unlabelled_Z = (labels_ZHW == UNLABELLED).any((1, 2))
        foreground_Z = ((labels_ZHW > 0) & (labels_ZHW != UNLABELLED)).sum((1, 2))
        counts = np.bincount(labels_ZHW.ravel(), minlength=num_labels + 1)
        row |= {
            "height": case.ready_ZHWC.shape[1],
            "width": case.ready_ZHWC.shape[2],
            "channels": case.ready_ZHWC.shape[3],
            "foreground": np.where(unlabelled_Z, -1, foreground_Z).tolist(),
            "label_pixels": counts[1 : num_labels + 1].tolist(),
        }
    return row


def indexed_cases(index: pa.Table) -> list[IndexedCase]:
    """The rows of an index that have a labelled slice, in order of their case ids."""
    cases = []
    for row in sorted(index.to_pylist(), key=lambda row: cast(str, row["case_id"])):
        foreground_Z = np.array(row["foreground"], np.int32)
        if (foreground_Z >= 0).any():
            cases.append(
                IndexedCase(
                    case_id=row["case_id"],
                    shard_path=row["shard_path"],
                    ref=case_from_plain(json.loads(row["ref"])),
                    digest=row["digest"],
                    shape_HWC=(row["height"], row["width"], row["channels"]),
                    foreground_Z=foreground_Z,
                    source=row["source"] or 0,
                )
            )
    return cases


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexCounts:
    """What an index says in all. bad: (case id, slice, error class, message)."""

    num_cases: int
    num_images: int
    num_labelled: int
    label_pixels: tuple[int, ...]
    bad: tuple[tuple[str, str, str, str], ...]

    @property
    def bad_by_class(self) -> dict[str, int]:
        """Number of bad images by error class."""
        return dict(sorted(Counter(kind for _, _, kind, _ in self.bad).items()))


def count_index(index: pa.Table, num_labels: int) -> IndexCounts:
    """Totals of an index, and every bad image in it."""
    pixels = np.zeros(num_labels, np.int64)
    images = labelled = 0
    bad: list[tuple[str, str, str, str]] = []
    for row in index.select(
        ["case_id", "num_images", "foreground", "label_pixels", "problems"]
    ).to_pylist():
        images += row["num_images"]
        labelled += sum(value >= 0 for value in row["foreground"])
        pixels += np.array(row["label_pixels"] or [0] * num_labels, np.int64)
        bad += [(row["case_id"], *problem) for problem in json.loads(row["problems"])]
    return IndexCounts(
        num_cases=index.num_rows,
        num_images=images,
        num_labelled=labelled,
        label_pixels=tuple(int(value) for value in pixels),
        bad=tuple(sorted(bad)),
    )


# The split


def patient_of(case_id: str, pattern: str) -> str:
    """The part of a case id that is the patient. Raises ConfigError where the pattern does not fit."""
    before, _, after = pattern.partition("{patient}")
    regex = "(.+)".join(
        ".*".join(re.escape(piece) for piece in side.split("*")) for side in (before, after)
    )
    found = re.fullmatch(regex, case_id, re.DOTALL)
    if not found:
        raise ConfigError(f"split.patient {pattern!r} does not fit the case id {case_id!r}")
    return found.group(1)


def split_patients(patients: Iterable[str], config: SplitConfig, seed: int) -> dict[str, Part]:
    """For each patient its part. Raises ConfigError for named patients that are not there.

    A patient's part is a hash of name and seed, so that new patients move nobody.
    """
    known = set(patients)
    for name in (*config.validation_patients, *config.test_patients):
        if name not in known:
            raise ConfigError(f"[split] the patient {name!r} is not in the source")
    return {patient: _part_of(patient, config, seed) for patient in sorted(known)}


def _part_of(patient: str, config: SplitConfig, seed: int) -> Part:
    if patient in config.test_patients:
        return "test"
    if patient in config.validation_patients:
        return "validation"
    digest = hashlib.sha256(f"{seed}:{patient}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    test = 0.0 if config.test_patients else config.test
    if place < test:
        return "test"
    place = (place - test) / (1 - test)
    if config.folds:
        return "validation" if int(place * config.folds) == config.fold else "train"
    validation = 0.0 if config.validation_patients else config.validation / (1 - test)
    return "validation" if place < validation else "train"


def split_cases(
    cases: Sequence[IndexedCase], config: SplitConfig, seed: int
) -> dict[Part, list[IndexedCase]]:
    """Cases by part. Raises ConfigError if there is nothing to train on, or nothing to judge by."""
    parts = parts_of_cases([case.case_id for case in cases], config, seed)
    split: dict[Part, list[IndexedCase]] = {"train": [], "validation": [], "test": []}
    for case in cases:
        split[parts[case.case_id]].append(case)
    return split


def parts_of_cases(case_ids: Sequence[str], config: SplitConfig, seed: int) -> dict[str, Part]:
    """The part of each case, by its patient. Raises ConfigError as `split_cases` does."""
    patients = {case_id: patient_of(case_id, config.patient) for case_id in case_ids}
    parts = split_patients(patients.values(), config, seed)
    for part in ("train", "validation"):
        if part not in parts.values():
            raise ConfigError(
                f"no patient is left for {part}: {len(parts)} patients in all, split by "
                f"validation = {config.validation:g}, test = {config.test:g}, folds = {config.folds}"
                ", seed = " + f"{seed}; change these, or name patients in split.validation_patients"
            )
    return {case_id: parts[patient] for case_id, patient in patients.items()}


# The order


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePool:
    """All slices that can be trained on; arrays over slices (S) and over cases."""

    case_S: npt.NDArray[np.int32]
    slice_S: npt.NDArray[np.int32]
    foreground_S: npt.NDArray[np.int32]
    case_bytes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.case_S)


def make_pool(cases: Sequence[IndexedCase]) -> SlicePool:
    """The labelled slices of some cases, numbered by their places in `cases`."""
    usable = [np.flatnonzero(case.foreground_Z >= 0) for case in cases]
    return SlicePool(
        case_S=np.repeat(np.arange(len(cases), dtype=np.int32), [len(found) for found in usable]),
        slice_S=np.concatenate(usable).astype(np.int32),
        foreground_S=np.concatenate(
            [case.foreground_Z[found] for case, found in zip(cases, usable, strict=True)]
        ),
        case_bytes=np.array([case.size_bytes for case in cases], np.int64),
    )


def steps_per_epoch(pool: SlicePool, config: SamplingConfig, batch_size: int) -> int:
    """Updates in an epoch; the rest of a batch is left to other epochs. Raises ConfigError."""
    num_slices = config.slices_per_epoch or len(pool)
    if num_slices < batch_size:
        raise ConfigError(
            f"an epoch of {num_slices} slices is smaller than one batch of {batch_size}; "
            "set batch_size lower, or sampling.slices_per_epoch higher"
        )
    return num_slices // batch_size


def foreground_weights(pool: SlicePool) -> npt.NDArray[np.float64]:
    """Probability of each slice: cases evenly, in a case (s + 0.1 mean) / (1.1 sum) by lesion area s.

    Source: mateuszbuda/brain-segmentation-pytorch, `dataset.py`. Cases without any lesion draw
    their slices evenly.
    """
    num_cases = len(pool.case_bytes)
    total = np.bincount(pool.case_S, pool.foreground_S, num_cases)[pool.case_S]
    count = np.bincount(pool.case_S, minlength=num_cases)[pool.case_S]
    even = 1 / count
    weights = np.divide(
        pool.foreground_S + 0.1 * total * even, 1.1 * total, out=even.copy(), where=total > 0
    )
    return cast(npt.NDArray[np.float64], weights / weights.sum())


def draw_epoch(
    pool: SlicePool, config: SamplingConfig, batch_size: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """The slices of an epoch, as numbers into the pool, at positions 0, 1, …; whole batches."""
    rng = np.random.default_rng([seed, epoch, 1])
    wanted = steps_per_epoch(pool, config, batch_size) * batch_size
    if config.by == "foreground":
        return rng.choice(len(pool), size=wanted, p=foreground_weights(pool)).astype(np.int64)
    rounds = [rng.permutation(len(pool)) for _ in range(-(-wanted // len(pool)))]
    return np.concatenate(rounds)[:wanted].astype(np.int64)


Leg = tuple[int, int]
"""(number of workers, updates that they made together) in an epoch."""


def rank_share(batch_size: int, world: int, rank: int) -> int:
    """How many slices of each batch a worker computes."""
    return batch_size // world + (rank < batch_size % world)


def rank_positions(
    pool: SlicePool,
    drawn: npt.NDArray[np.int64],
    legs: Sequence[Leg],
    *,
    world: int,
    rank: int,
    batch_size: int,
    cache_bytes: int,
    seed: int,
    epoch: int,
) -> npt.NDArray[np.int64]:
    """Positions of the epoch that one worker computes, in its order.

    The slices are lined up by case, in an order of cases that never changes, and the line is cut
    into one stretch a worker: a case is read by one worker, or by two where a cut goes through
    it, and epoch after epoch by the same ones. Inside its stretch a worker shuffles; where the
    decoded cases do not fit its memory, among as many cases as do, so each is decoded once.
    legs: what workers of other numbers did of this epoch before; the rest is dealt out anew, so
    an epoch has the same slices whatever came and went.
    """
    case_order = np.random.default_rng([seed, 2]).permutation(len(pool.case_bytes))
    place_of_case = np.argsort(case_order)
    positions = np.arange(len(drawn))
    line = positions[np.lexsort((positions, place_of_case[pool.case_S[drawn]]))]
    for number, (past_world, steps) in enumerate(legs):
        stretches = [
            _stretch(
                pool, drawn, line, past_world, r, batch_size, cache_bytes, [seed, epoch, number]
            )
            for r in range(past_world)
        ]
        done = [
            stretch[: steps * rank_share(batch_size, past_world, r)]
            for r, stretch in enumerate(stretches)
        ]
        line = line[~np.isin(line, np.concatenate(done))]
    return _stretch(
        pool, drawn, line, world, rank, batch_size, cache_bytes, [seed, epoch, len(legs)]
    )


def _stretch(
    pool: SlicePool,
    drawn: npt.NDArray[np.int64],
    line: npt.NDArray[np.int64],
    world: int,
    rank: int,
    batch_size: int,
    cache_bytes: int,
    seed: list[int],
) -> npt.NDArray[np.int64]:
    """One worker's positions of a line, shuffled within blocks of cases that fit its memory."""
    steps = len(line) // batch_size
    shares = [rank_share(batch_size, world, r) for r in range(world)]
    start = steps * sum(shares[:rank])
    mine = line[start : start + steps * shares[rank]]
    rng = np.random.default_rng([*seed, rank, 3])
    cases = pool.case_S[drawn[mine]]
    blocks = list(_blocks(rng.permutation(np.unique(cases)), pool.case_bytes, cache_bytes))
    shuffled = [rng.permutation(mine[np.isin(cases, block)]) for block in blocks]
    return np.concatenate(shuffled) if shuffled else mine


def _blocks(
    cases: npt.NDArray[Any], case_bytes: npt.NDArray[np.int64], limit: int
) -> Iterator[npt.NDArray[Any]]:
    """Consecutive runs of cases whose decoded sizes stay within the limit; at least one case each."""
    start, total = 0, 0
    for end, case in enumerate(cases):
        size = int(case_bytes[case])
        if end > start and total + size > limit:
            yield cases[start:end]
            start, total = end, 0
        total += size
    if start < len(cases):
        yield cases[start:]
