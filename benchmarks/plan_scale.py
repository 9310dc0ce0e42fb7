"""Planning, publishing and comparing nights at scale, without images and without a network.

    python benchmarks/plan_scale.py OUT [--images N] [--shards N ...] [--nights N] [--keep]

The archive is a folder of Parquet case shards, 10 images a case, made in two sizes: N images in each
of the numbers of shards, and a tenth of both, so that "cost is linear in images" can be checked: by
the ratio of CPU times, which other work on the machine moves less than the clock. The target is a
no-change night of 1,000,000 images under 60 s and 2 GB on 2 cores.

Real are the shards (of images of a few bytes that no decoder would take), plans, receipts, parts and
commits: all are made by the functions that a run uses. The network and the decoder are not there: the
mask of an image is 8 x 8 pixels out of the digest of its bytes, so exactly the masks of changed images
change. Nor is Ray: parts are written by a pool of processes, which is not measured.

Night 0 is all new. In night 1 a thousandth of the images changed, all in a row; in night 2 another
thousandth, one in each hundredth case. Later nights change one image each: `--nights 30` shows what a
longer history costs.

Each measurement runs in a process of its own; its peak memory has the interpreter and the imports in
it (about 170 MiB), its time has not. "plan" freezes the plan if there is anything to do. "publish"
reads the plan and the receipts, looks at each part's size, makes the record, commits to the three
tables and seals the night; it leaves out `verify_receipts`, which reads all new parts.
"no-change night" and "roll back" are the whole commands. What is made stays in OUT with
`--keep`, and the next call measures again what can be measured again; each such call makes the history
two nights longer, since it rolls back and forth.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pipeline
from pipeline import results, runs, upkeep
from pipeline.bundle import load_bundle
from pipeline.cases import DecodedCase, PredictedCase, SliceRecord, finish_case
from pipeline.config import SegmentConfig
from pipeline.diffing import diff_nights
from pipeline.flows.nightly import roll_back, run_nightly
from pipeline.flows.segment import Staged, make_record, publish_staged
from pipeline.flows.stages import Job, write_shard
from pipeline.formats import FORMATS, Source
from pipeline.planning import make_plan
from pipeline.policy import GroupsConfig, NightlyConfig
from pipeline.records import EncodedCase, EncodedSlice, Work
from pipeline.telemetry import RunLog, format_table
from pipeline.transforms import Recipe

BUNDLE = str(Path(pipeline.__file__).parent / "defaults" / "demo-bundle")
IMAGES_A_CASE = 10
CHANGED = 1000
"""One in so many images changes from night 0 to night 1, and from night 1 to night 2."""
SIDE = 8
SPAWN = multiprocessing.get_context("spawn")
NO_STEPS = Recipe(preprocess=(), postprocess=())
SHARD_SCHEMA = pa.schema(
    [
        ("case_id", pa.string()),
        ("slice_names", pa.list_(pa.string())),
        ("images", pa.list_(pa.large_binary())),
    ]
)


@dataclass(frozen=True, slots=True)
class Archive:
    """Some images in some shards, and the results beside them."""

    folder: Path
    images: int
    shards: int

    @property
    def source(self) -> str:
        return str(self.folder / "source")

    @property
    def results(self) -> str:
        return str(self.folder / "results")

    @property
    def figures(self) -> Path:
        """What was measured while the nights were made; there when all of them are."""
        return self.folder / "figures.json"

    @property
    def images_a_shard(self) -> int:
        return self.images // self.shards


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    note: str


def measure(function: Callable[[Archive], str], archive: Archive) -> Figure:
    """Run a function in a fresh process."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        figure = pool.submit(_measure_here, function, archive).result()
    print(f"  {figure.wall_s:.2f} s, {figure.note}", file=sys.stderr, flush=True)
    return figure


def _measure_here(function: Callable[[Archive], str], archive: Archive) -> Figure:
    started, cpu = time.perf_counter(), time.process_time()
    note = function(archive)
    return Figure(
        wall_s=time.perf_counter() - started,
        cpu_s=time.process_time() - cpu,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        note=note,
    )


# The source


def changed_images(archive: Archive, night: int) -> range:
    """The images that are other than in the night before."""
    if night == 0:
        return range(archive.images)
    if night == 1:
        return range(archive.images // CHANGED)
    if night == 2:
        return range(0, archive.images, CHANGED)
    return range(night, night + 1)


def write_source_shard(archive: Archive, night: int, shard: int) -> None:
    """One shard as it is in a night: the bytes of an image say when it changed last."""

    def encoded(image: int) -> bytes:
        changed = (n for n in range(night, -1, -1) if image in changed_images(archive, n))
        return f"image {image} of night {next(changed)}".encode()

    first = shard * archive.images_a_shard
    starts = range(first, first + archive.images_a_shard, IMAGES_A_CASE)
    rows = [
        {
            "case_id": f"case-{start // IMAGES_A_CASE:07d}",
            "slice_names": [f"{index:02d}" for index in range(IMAGES_A_CASE)],
            "images": [encoded(start + index) for index in range(IMAGES_A_CASE)],
        }
        for start in starts
    ]
    table = pa.Table.from_pylist(rows, SHARD_SCHEMA)
    pq.write_table(table, f"{archive.source}/shard-{shard:06d}.parquet")


def write_source(archive: Archive, night: int) -> None:
    """Bring the source to a night; shards without a changed image are not touched."""
    os.makedirs(archive.source, exist_ok=True)
    touched = sorted({image // archive.images_a_shard for image in changed_images(archive, night)})
    with ProcessPoolExecutor(mp_context=SPAWN) as pool:
        list(pool.map(partial(write_source_shard, archive, night), touched, chunksize=64))


# What a run does between plan and publication, without a network


def predicted(encoded: EncodedCase) -> PredictedCase:
    """A case with masks that are a function of its images' bytes."""
    return PredictedCase(
        decoded=DecodedCase(
            case_id=encoded.case_id,
            digest=encoded.digest(),
            spacing_mm=encoded.spacing_mm,
            slices=[
                SliceRecord(
                    name=item.name,
                    source_uri=item.source_uri,
                    image_sha256=item.image_sha256,
                    mask_sha256=item.mask_sha256,
                    height=SIDE,
                    width=SIDE,
                    problem=item.problem,
                )
                for item in encoded.slices
            ],
            references=[None] * len(encoded.slices),
        ),
        labels_ZHW=np.stack([mask_of(item) for item in encoded.slices]),
        confidence_ZHW=np.full((len(encoded.slices), SIDE, SIDE), 200, np.uint8),
    )


def mask_of(item: EncodedSlice) -> np.ndarray:
    digest = hashlib.sha256(item.image or b"").digest()[: SIDE * SIDE // 8]
    return np.unpackbits(np.frombuffer(digest, np.uint8)).reshape(SIDE, SIDE)


def write_work(job: Job, labels: tuple[str, ...], work: Work) -> None:
    """The parts and the receipt of one shard."""
    encoded = FORMATS[work.format].read_cases(job.source, work.path, work.compute)
    rows = [finish_case(predicted(case), NO_STEPS, labels) for case in encoded]
    receipt = write_shard(work, rows, job, {"numerics": "none"})
    runs.put_receipt(job.results, job.run_id, receipt)


def never_wait_for_disk() -> None:
    """In processes of the set-up: 400,000 small files, each synced, take an hour."""
    os.fsync = lambda descriptor: None


def write_parts(archive: Archive, night: int) -> None:
    """The parts and receipts of a frozen plan."""
    plan = runs.load_plan(archive.results, f"night-{night}")
    assert plan is not None
    bundle, config = load_bundle(BUNDLE), SegmentConfig()
    job = Job(
        run_id=plan.run_id,
        results=archive.results,
        source=Source(
            uri=archive.source,
            format=plan.source["format"],
            config=config.source,
            limits=config.limits,
        ),
        bundle_uri=BUNDLE,
        bundle_digest=bundle.digest,
        config=config,
        config_digest=plan.config_digest,
        recipe=bundle.recipe,
        labels=bundle.labels,
    )
    with ProcessPoolExecutor(mp_context=SPAWN, initializer=never_wait_for_disk) as pool:
        list(pool.map(partial(write_work, job, bundle.labels), plan.works, chunksize=16))


# What is measured; each function returns what it found


def plan_night(night: int, archive: Archive) -> str:
    plan = make_plan(
        archive.source,
        archive.results,
        load_bundle(BUNDLE),
        SegmentConfig(),
        run_id=f"night-{night}",
    )
    runs.save_plan(archive.results, plan)
    return f"{len(plan.works):,} shards to write"


def publish_night(night: int, archive: Archive) -> str:
    plan = runs.load_plan(archive.results, f"night-{night}")
    assert plan is not None
    staged = Staged(
        plan=plan,
        results=archive.results,
        receipts=runs.load_receipts(archive.results, plan),
        resumed=True,
        published_as=None,
        started=time.monotonic(),
        log=RunLog(runs.run_uri(archive.results, plan.run_id, "log.jsonl")),
    )
    published = publish_staged(staged, make_record(staged))
    upkeep.seal_all(archive.results)
    assert published == night
    return f"{len(plan.works):,} receipts"


def open_night(archive: Archive) -> str:
    night = results.open_night(archive.results)
    assert night is not None
    assert len(night.shards) == archive.shards
    return f"{len(night.shards):,} shards"


def plan_no_change(archive: Archive) -> str:
    plan = make_plan(archive.source, archive.results, load_bundle(BUNDLE), SegmentConfig())
    assert not plan.works
    assert not plan.removed
    return f"{plan.counts['images']['unchanged']:,} images unchanged"


def no_change_night(archive: Archive) -> str:
    before = results.latest_night_number(archive.results)
    config = NightlyConfig(source=archive.source, results=archive.results, bundle=BUNDLE)
    outcome = run_nightly(config)
    assert outcome.verdict is None
    assert outcome.summary.night == before
    assert results.latest_night_number(archive.results) == before
    ray = "Ray was started" if "ray" in sys.modules else "no Ray"
    return f"{len(upkeep.kept_nights(archive.results))} nights kept, {ray}"


def diff(before: int, archive: Archive) -> str:
    found = diff_nights(archive.results, before, before + 1, GroupsConfig()).comparison
    pairs, wanted = found.counts["pairs_read"], archive.images // CHANGED
    assert pairs == wanted == found.counts["changed"]
    assert found.counts["same"] == archive.images - wanted
    return f"{pairs:,} pairs of masks read"


def history(archive: Archive) -> str:
    return f"{len(results.history(archive.results))} nights"


def roll_back_to_first(archive: Archive) -> str:
    done = roll_back(archive.results, 0, "measured")
    assert done["images"] == archive.images
    return f"night {done['night']} has the content of night 0"


def roll_forth(night: int, archive: Archive) -> str:
    return f"night {roll_back(archive.results, night, 'measured')['night']}"


# The whole


def make_nights(archive: Archive, nights: int) -> None:
    """Make the source and its nights, and keep what was measured on the way."""
    if archive.folder.exists():
        shutil.rmtree(archive.folder)
    kinds = {0: "all new", 1: "0.1 % changed, in a row", 2: "0.1 % changed, spread"}
    figures: dict[str, Figure] = {}
    for night in range(nights):
        run_apart(write_source, archive, night)
        plan = measure(partial(plan_night, night), archive)
        run_apart(write_parts, archive, night)
        publish = measure(partial(publish_night, night), archive)
        if night in kinds:
            figures |= {f"plan: {kinds[night]}": plan, f"publish: {kinds[night]}": publish}
    archive.figures.write_text(json.dumps({name: asdict(f) for name, f in figures.items()}))


def run_apart(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function of the set-up in another process: this one stays small, as a process counts
    the memory of the one that started it."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        pool.submit(function, *arguments).result()


def measure_all(archive: Archive) -> Iterator[tuple[str, Figure]]:
    """What was measured while the nights were made, then what can be measured again."""
    for name, values in json.loads(archive.figures.read_text()).items():
        yield name, Figure(**values)
    yield "open the night", measure(open_night, archive)
    yield "plan: nothing changed", measure(plan_no_change, archive)
    yield "no-change night", measure(no_change_night, archive)
    yield "diff: 0.1 % changed, in a row", measure(partial(diff, 0), archive)
    yield "diff: 0.1 % changed, spread", measure(partial(diff, 1), archive)
    yield "history", measure(history, archive)
    latest = results.latest_night_number(archive.results)
    assert latest is not None
    yield "roll back to night 0", measure(roll_back_to_first, archive)
    measure(partial(roll_forth, latest), archive)


def compare_sizes(small: Archive, large: Archive) -> None:
    """Print the figures of two sizes beside each other."""
    print(
        f"\n{large.images_a_shard:,} images a shard: {small.images:,} images in {small.shards:,} "
        f"shards, and {large.images:,} in {large.shards:,}\n"
    )
    few, many = (dict(measure_all(size)) for size in (small, large))
    rows = [
        {
            "": name,
            f"{small.images:,}: s": few[name].wall_s,
            "CPU s": few[name].cpu_s,
            "MiB": round(few[name].peak_mib),
            f"{large.images:,}: s": figure.wall_s,
            "CPU s ": figure.cpu_s,
            "MiB ": round(figure.peak_mib),
            "ratio of CPU s": figure.cpu_s / few[name].cpu_s,
            "found": f"({figure.note})",
        }
        for name, figure in many.items()
    ]
    print(format_table(rows, rows[0]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--nights", type=int, default=3, help="at least 3")
    parser.add_argument(
        "--keep", action="store_true", help="measure again what OUT has, and leave it"
    )
    options = parser.parse_args()
    if options.nights < 3:
        parser.error("three nights are compared")
    if any(n % 10 or options.images % (n * IMAGES_A_CASE) for n in options.shards):
        parser.error("shards, and a tenth of them, must hold whole cases of 10 images")
    for shards in options.shards:
        sizes = [
            Archive(options.out / f"{images}-{count}", images, count)
            for images, count in ((options.images // 10, shards // 10), (options.images, shards))
        ]
        for archive in sizes:
            if not (options.keep and archive.figures.exists()):
                make_nights(archive, options.nights)
        compare_sizes(*sizes)
        if not options.keep:
            for archive in sizes:
                shutil.rmtree(archive.folder)


if __name__ == "__main__":
    main()
