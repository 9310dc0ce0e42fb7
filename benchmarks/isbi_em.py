"""Train on ISBI 2012 slices 0-19, judge by slices 20-23 with the challenge's own metrics.

    python benchmarks/isbi_em.py ISBI_FOLDER OUT [--epochs N]

ISBI_FOLDER holds `image/NN.png` and `label/NN.png`, 255 = cell interior, which is label 1 here;
membranes are background. Prints V_Rand and V_Info (foreground-restricted, thinned), pixel error and
warping error at threshold 0.5, and the best V_Rand over thresholds, as the challenge ranks.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.bundle import load_bundle
from pipeline.config import InferenceConfig, TrainConfig, load_config
from pipeline.flows.train import run_train
from pipeline.inference import Predictor
from pipeline.metrics.boundary import pixel_error, v_info, v_rand, warping_error
from pipeline.validation import recipes_by_threshold

JUDGES = ["20", "21", "22", "23"]


def train(folder: Path, out: Path, epochs: int) -> dict:
    config = load_config(
        TrainConfig,
        options={
            "labels": ["cell"],
            "epochs": epochs,
            "batch_size": 8,
            "validate_every": 4,
            "source.images": "image/{case}.png",
            "source.masks": "label/{case}.png",
            "split.validation_patients": JUDGES,
            "model.options": {"width": 16},
            "sampling.patch": 256,
            "sampling.slices_per_epoch": 400,
            "augment.flip_vertical": 0.5,
            "augment.rotation_deg": 180.0,
            "augment.scale": 0.1,
            "augment.elastic_px": 5.0,
            "augment.brightness": 0.2,
            "augment.contrast": 0.2,
            "augment.noise": 0.1,
            "loss.terms": {"bce": 1.0, "dice": 0.5},
            "optimizer.lr": 2e-3,
            "optimizer.ema": 0.995,
        },
    )
    return run_train(str(folder), str(out), config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=24)
    options = parser.parse_args()
    result = train(options.folder, options.out, options.epochs)
    print(json.dumps({k: result[k] for k in ("mean_dice", "steps", "train_seconds")}))
    bundle = load_bundle(result["bundle"])
    predictor = Predictor(bundle, InferenceConfig(), "cpu")
    recipes = recipes_by_threshold(bundle.recipe)
    found: dict[float, list[tuple[float, ...]]] = {at: [] for at in recipes}
    for name in JUDGES:
        image = np.asarray(Image.open(options.folder / "image" / f"{name}.png").convert("L"))
        truth = np.asarray(Image.open(options.folder / "label" / f"{name}.png").convert("L")) > 127
        prepared = predictor.prepare(image[None, :, :, None])
        (masks,) = predictor.decide_each(
            [prepared],
            lambda case: {at: predictor.decide(case, recipe) for at, recipe in recipes.items()},
        )
        for at, prediction in masks.items():
            cells = prediction.labels_ZHW[0][: truth.shape[0], : truth.shape[1]] > 0
            whole = at == 0.5
            found[at].append(
                (
                    v_rand(cells, truth).score,
                    v_info(cells, truth).score,
                    pixel_error(cells, truth),
                    warping_error(cells, truth) if whole else np.nan,
                )
            )
    means = {at: np.mean(rows, axis=0) for at, rows in found.items()}
    for at in (0.5, max(means, key=lambda at: means[at][0])):
        rand, info, pixel, warping = means[at]
        print(
            f"threshold {at:g}: V_Rand {rand:.4f}, V_Info {info:.4f}, pixel error {pixel:.4f}"
            + ("" if np.isnan(warping) else f", warping error {warping:.6f}")
        )
    for name, row in zip(JUDGES, found[0.5], strict=True):
        print(f"  slice {name}: " + " ".join(f"{value:.6f}" for value in row))


if __name__ == "__main__":
    main()
