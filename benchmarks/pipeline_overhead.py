"""Throughput of the whole pipeline as a share of a bare loop over preloaded tensors.

    python benchmarks/pipeline_overhead.py LGG_FOLDER BUNDLE [--patients N] [--repeats N]

The peer is the plain loop of the same run: the same network, dtype, thread count and forward batch
over tensors that are decoded and preprocessed beforehand, as many processes as the pipeline has
actors. The pipeline lists, reads, decodes, preprocesses, predicts, finishes, measures, writes and
receipts. Its time runs from the first to the last receipt-bearing second of work, that is without
the start of Ray and of the actors, which is printed beside it; the loop's runs likewise without the
start of its processes. Runs alternate; the median ratio is reported.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

PATTERNS = {
    "source.images": "{case}/{case}_{slice}.tif",
    "source.masks": "{case}/{case}_{slice}_mask.tif",
}


def preload(folder: Path, bundle_uri: str) -> list[np.ndarray]:
    from PIL import Image

    from pipeline.bundle import load_bundle
    from pipeline.formats.patterns import natural_key
    from pipeline.transforms.preprocess import Context, apply_preprocess

    recipe = load_bundle(bundle_uri).recipe
    volumes = []
    for case in sorted(folder.iterdir()):
        names = sorted(
            (p for p in case.glob("*.tif") if "mask" not in p.name),
            key=lambda p: natural_key(p.name),
        )
        volume = np.stack([np.asarray(Image.open(path)) for path in names])
        ready, _ = apply_preprocess(volume, recipe.preprocess, Context(full_scale=255.0))
        volumes.append(np.ascontiguousarray(np.moveaxis(ready, 3, 1), dtype=np.float32))
    return volumes


def loop_worker(bundle_uri, volumes, start, results) -> None:
    import torch

    from pipeline.bundle import load_bundle, load_model
    from pipeline.inference import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    model = load_model(load_bundle(bundle_uri))
    images = torch.from_numpy(np.concatenate(volumes))
    start.wait()
    with torch.inference_mode():
        for batch in images.split(4):
            (torch.sigmoid(model(batch)) > 0.5).to(torch.uint8)
    results.put(time.monotonic())


def bare_loop(bundle_uri: str, volumes: list[np.ndarray], processes: int) -> float:
    """Seconds for all volumes, spread over processes by size."""
    shares: list[list[np.ndarray]] = [[] for _ in range(processes)]
    for volume in sorted(volumes, key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(volume)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes + 1), context.Queue()
    workers = [
        context.Process(target=loop_worker, args=(bundle_uri, share, start, results))
        for share in shares
    ]
    for worker in workers:
        worker.start()
    start.wait()
    started = time.monotonic()
    ended = max(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return ended - started


_FROM_ITS_FIRST_SHARD = ("wait", "preprocess", "predict", "finish", "write")
"""What a shard takes from the moment when an actor has it."""


def pipeline(folder: Path, bundle_uri: str, actors: int) -> tuple[float, float]:
    """(seconds of work, seconds in all) of one run into an empty results folder."""
    from pipeline.config import SegmentConfig, load_config
    from pipeline.flows import segment

    out = Path(tempfile.mkdtemp(prefix="reseg-bench-"))
    config = load_config(SegmentConfig, options={**PATTERNS, "resources.actors": actors})
    started = time.monotonic()
    try:
        summary = segment.run_segment(str(folder), str(out / "r"), bundle_uri, config)
        logs = sorted((out / "r" / "_runs").glob("*/receipts/*.json"))
        firsts = []
        for path in logs:
            receipt = json.loads(path.read_text())
            spent = sum(receipt["seconds"][name] for name in _FROM_ITS_FIRST_SHARD)
            firsts.append(path.stat().st_mtime - spent)
        last = max(path.stat().st_mtime for path in logs)
        assert summary.published
        return last - min(firsts), time.monotonic() - started
    finally:
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("bundle")
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as chosen:
        for case in sorted(options.folder.iterdir())[: options.patients]:
            (Path(chosen) / case.name).symlink_to(case.resolve())
        volumes = preload(Path(chosen), options.bundle)
        slices = sum(map(len, volumes))
        ratios = []
        for _ in range(options.repeats):
            loop_s = bare_loop(options.bundle, volumes, options.actors)
            work_s, whole_s = pipeline(Path(chosen), options.bundle, options.actors)
            ratios.append(loop_s / work_s)
            print(
                f"{slices} slices: loop {slices / loop_s:.2f}/s, pipeline {slices / work_s:.2f}/s "
                f"(with start {slices / whole_s:.2f}/s), ratio {ratios[-1]:.3f}"
            )
    print(f"median ratio {statistics.median(ratios):.3f} of {len(ratios)}")


if __name__ == "__main__":
    main()
