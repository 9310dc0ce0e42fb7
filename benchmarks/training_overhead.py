"""Images/s of `reseg train` as a share of a plain PyTorch loop over preloaded tensors.

    python benchmarks/training_overhead.py LGG_FOLDER [--patients N] [--epochs N] [--repeats N]

The peer is the loop of the same run: same network (Buda width 16), 128 px, batch 16, bf16,
channels last, optimizer, loss and threads, over tensors that are decoded and prepared beforehand;
no augmentation, no averaged weights, no checkpoints, no check for NaN. `reseg train` runs on Ray with
all of these but augmentation; a second ratio has the default augmentation too. Its time is that of the
updates after the first epoch, in which it also decodes; validation and the start are printed beside.
Then 2 workers of 1 thread against 1 worker of 2 threads. Runs alternate; medians are reported.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pipeline import checkpoint
from pipeline.bundle import build_model
from pipeline.config import TrainConfig, load_config
from pipeline.dataset import indexed_cases, open_sandbox, read_ready, split_cases
from pipeline.flows.train import run_train
from pipeline.learning import make_optimizer
from pipeline.losses import make_loss
from pipeline.preparation import check_request, index_here, make_job, shard_groups

OPTIONS = {
    "source.images": "{case}/{case}_{slice}.tif",
    "source.masks": "{case}/{case}_{slice}_mask.tif",
    "labels": ["tumour"],
    "recipe.ready": "buda-lgg",
    "recipe.side": 128,
    "model.options": {"width": 16},
    "split.validation": 0.2,
    "validate_every": 1000,
}
STILL = {"augment.flip_horizontal": 0.0, "augment.rotation_deg": 0.0, "augment.scale": 0.0}


def preload(folder: Path, config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor, object]:
    """Training slices as tensors NCHW and NHW, by the same recipe; and the job."""
    with tempfile.TemporaryDirectory() as out:
        request = check_request(str(folder), f"{out}/x", config)
        job = make_job(request)
        index = index_here(job.index_job, shard_groups(request))
        cases = split_cases(indexed_cases(index), config.split, config.seed)["train"]
        with open_sandbox(config.limits) as sandbox:
            ready = [read_ready(job.index_job, c.shard_path, c.ref, sandbox) for c in cases]
    images = torch.from_numpy(np.concatenate([item.ready_ZHWC for item in ready]))
    labels = torch.from_numpy(np.concatenate([item.labels_ZHW for item in ready]))
    return images.permute(0, 3, 1, 2), labels, job


def plain_loop(images: torch.Tensor, labels: torch.Tensor, job, epochs: int, threads: int) -> float:
    """Images/s of updates over preloaded tensors."""
    torch.set_num_threads(threads)
    config = job.config
    model = build_model(job.description).to(memory_format=torch.channels_last).train()
    optimizer, loss = (
        make_optimizer(model, config.optimizer),
        make_loss(config.loss, job.activation),
    )
    size = config.batch_size
    done, started = 0, time.monotonic()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(size):
            if len(chosen) < size:
                break
            batch = images[chosen].contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch)
            loss(logits, labels[chosen], None).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            done += size
    return done / (time.monotonic() - started)


def ours(folder: Path, options: dict, epochs: int) -> float:
    """Images/s of the updates of `reseg train` after its first epoch."""
    out = Path(tempfile.mkdtemp(prefix="reseg-bench-"))
    config = load_config(TrainConfig, options={**OPTIONS, "epochs": epochs, **options})
    started = time.monotonic()
    try:
        run_train(str(folder), str(out / "t"), config)
        name = checkpoint.names(str(out / "t"), "step-")[-1]
        records = checkpoint.load_values(str(out / "t"), name)["epochs"]
    finally:
        shutil.rmtree(out)
    first, last = records[0], records[-1]
    steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    whole = time.monotonic() - started
    print(f"  first epoch {first['seconds']:.1f} s, later {seconds:.1f} s, command {whole:.1f} s")
    return steps * config.batch_size / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    one = {"resources.workers": 1, "resources.threads": options.threads}
    two = {"resources.workers": 2, "resources.threads": max(1, options.threads // 2)}
    with tempfile.TemporaryDirectory() as chosen:
        for case in sorted(options.folder.iterdir())[: options.patients]:
            (Path(chosen) / case.name).symlink_to(case.resolve())
        still = load_config(TrainConfig, options={**OPTIONS, **STILL})
        images, labels, job = preload(Path(chosen), still)
        print(f"{len(images)} slices, batch {still.batch_size}")
        rows = []
        for _ in range(options.repeats):
            plain = plain_loop(images, labels, job, options.epochs - 1, options.threads)
            bare = ours(Path(chosen), {**STILL, **one}, options.epochs)
            full = ours(Path(chosen), one, options.epochs)
            pair = ours(Path(chosen), {**STILL, **two}, options.epochs)
            rows.append((bare / plain, full / plain, pair / bare))
            print(
                f"plain {plain:.1f}/s, reseg {bare:.1f}/s, augmented {full:.1f}/s, 2 x 1 {pair:.1f}/s; "
                f"ratios {rows[-1][0]:.3f}, {rows[-1][1]:.3f}, 2 x 1 to 1 x 2 {rows[-1][2]:.3f}"
            )
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(
        f"median of {len(rows)}: reseg to plain {medians[0]:.3f}, with augmentation {medians[1]:.3f}, "
        f"2 workers x 1 thread to 1 x 2 {medians[2]:.3f}"
    )


if __name__ == "__main__":
    main()
