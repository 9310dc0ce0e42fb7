"""Train the small network that ships in `pipeline/defaults/demo-bundle`.

    python benchmarks/make_demo_bundle.py OUT

Phantoms 1000-1079 train, 2000-2011 judge; the demo segments 0-23, which neither sees. Prints the
Dice of the judging phantoms. Takes some two minutes on one core.
"""

import dataclasses
import sys

import numpy as np
import torch
from safetensors.torch import save
from torch.nn import functional

from pipeline.bundle import load_model, save_bundle
from pipeline.config import InferenceConfig
from pipeline.inference import Predictor
from pipeline.models.unet import UNet, UNetOptions
from pipeline.synthetic import make_phantom
from pipeline.transforms import recipe_from_plain
from pipeline.transforms.preprocess import Context, apply_preprocess

RECIPE = {
    "preprocess": [
        {"step": "to_channels", "count": 1},
        {"step": "scale_to_range"},
        {"step": "percentile_rescale", "low": 1.0, "high": 99.5},
        {"step": "zscore", "over": "volume"},
        {"step": "pad_to_multiple", "of": 8},
    ],
    "postprocess": [
        {"step": "sigmoid"},
        {"step": "threshold", "at": 0.5},
        {"step": "to_native_grid"},
        {"step": "minimum_size", "pixels": 12, "dimensions": 3, "connectivity": "full"},
    ],
}
TRAIN, JUDGE, STEPS, BATCH = range(1000, 1080), range(2000, 2012), 700, 16


def main(out: str) -> None:
    """Train, export, judge."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    recipe = recipe_from_plain(RECIPE)
    images, masks = [], []
    for index in TRAIN:
        phantom = make_phantom(index)
        volume, _ = apply_preprocess(
            phantom.volume_ZHW[..., None], recipe.preprocess, Context(full_scale=255.0)
        )
        images.append(torch.tensor(volume, dtype=torch.float32).permute(0, 3, 1, 2))
        masks.append(torch.tensor(phantom.mask_ZHW, dtype=torch.float32)[:, None])
    images_NCHW, masks_NCHW = torch.cat(images), torch.cat(masks)
    options = UNetOptions(in_channels=1, out_channels=1, width=8, depth=3)
    model = UNet(options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    for step in range(STEPS):
        chosen = torch.from_numpy(rng.choice(len(images_NCHW), BATCH, replace=False))
        batch, target = images_NCHW[chosen], masks_NCHW[chosen]
        if rng.random() < 0.5:
            batch, target = batch.flip(-1), target.flip(-1)
        logits = model(batch)
        probability = torch.sigmoid(logits)
        overlap = (probability * target).sum()
        dice = 1 - (2 * overlap + 1) / (probability.sum() + target.sum() + 1)
        loss = dice + functional.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.4f}")
    bundle = save_bundle(
        out,
        name="demo-phantom",
        architecture="unet",
        options=dataclasses.asdict(options),
        labels=["lesion"],
        recipe=RECIPE,
        weights=save({k: v.contiguous() for k, v in model.eval().state_dict().items()}),
        provenance={"made_by": "benchmarks/make_demo_bundle.py", "train": "phantoms 1000-1079"},
    )
    load_model(bundle)
    predictor = Predictor(bundle, InferenceConfig(), "cpu")
    judged = [make_phantom(index) for index in JUDGE]
    scores = []
    for phantom, result in zip(
        judged, predictor.predict(p.volume_ZHW[..., None] for p in judged), strict=True
    ):
        mask, truth = result.labels_ZHW > 0, phantom.mask_ZHW > 0
        scores.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    print(
        f"Dice on {len(scores)} unseen phantoms: mean {np.mean(scores):.4f}, min {min(scores):.4f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
