import copy

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from pipeline.metrics import METRICS, compute_metrics, metric_columns

RNG = np.random.default_rng(11)


def blob(shape, threshold, seed):
    noise = np.random.default_rng(seed).standard_normal(shape)
    return ndimage.gaussian_filter(noise, 1.5) > threshold


def brute_force(mask, reference, spacing):
    """Surface distances by comparing every pair of surface pixels."""

    def points(m):
        inside = np.zeros(m.shape, bool)
        inside[tuple(slice(1, -1) for _ in m.shape)] = True
        for axis in range(m.ndim):
            for step in (-1, 1):
                inside &= np.roll(m, step, axis)
        return np.argwhere(m & ~inside) * np.array(spacing)

    distances = cdist(points(mask), points(reference))
    there, back = distances.min(1), distances.min(0)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return hd95, np.concatenate([there, back]).mean()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((40, 31), (1.0, 1.0)), ((40, 31), (0.4, 2.5)), ((9, 20, 17), (3.0, 1.0, 0.7))],
)
def test_surface_distances_equal_brute_force(shape, spacing, seed):
    mask, reference = blob(shape, 0.15, seed), blob(shape, 0.1, seed + 100)
    table = "image" if len(shape) == 2 else "case"
    values = compute_metrics(table, mask, reference, spacing)
    hd95, assd = brute_force(mask, reference, spacing)
    assert values["hd95"] == pytest.approx(hd95, rel=1e-9)
    assert values["assd"] == pytest.approx(assd, rel=1e-9)
    tp, fp, fn = (mask & reference).sum(), (mask & ~reference).sum(), (~mask & reference).sum()
    assert (values["tp"], values["fp"], values["fn"]) == (tp, fp, fn)
    assert values["dice"] == pytest.approx(2 * tp / (mask.sum() + reference.sum()))
    assert values["iou"] == pytest.approx(tp / (mask | reference).sum())


def test_empty_against_empty_has_no_score_and_says_so():
    empty = np.zeros((5, 5), bool)
    values = compute_metrics("image", empty, empty, (1.0, 1.0))
    assert values["both_empty"] is True
    assert values["dice"] is values["iou"] is values["hd95"] is values["assd"] is None
    assert (values["tp"], values["fp"], values["fn"], values["area_px"]) == (0, 0, 0, 0)


def test_one_empty_scores_zero_without_a_distance():
    empty, one = np.zeros((5, 5), bool), np.eye(5, dtype=bool)
    for pair in ((empty, one), (one, empty)):
        values = compute_metrics("image", *pair, (1.0, 1.0))
        assert values["dice"] == values["iou"] == 0
        assert values["hd95"] is None
        assert values["both_empty"] is False


def test_one_pixel_and_masks_at_the_border():
    a, b = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    a[0, 0] = b[0, 3] = True
    values = compute_metrics("image", a, b, (2.0, 2.0))
    assert values["hd95"] == values["assd"] == 6.0
    full = np.ones((9, 9), bool)
    values = compute_metrics("image", full, full, (1.0, 1.0))
    assert values["hd95"] == 0
    assert values["dice"] == 1
    assert values["bbox"] == [0, 0, 9, 9]
    hd95, _ = brute_force(full, b, (1.0, 1.0))
    assert compute_metrics("image", full, b, (1.0, 1.0))["hd95"] == pytest.approx(hd95)


def test_without_a_reference_only_shape_is_measured():
    values = compute_metrics("image", np.eye(4, dtype=bool), None, (1.0, 1.0))
    assert values["area_px"] == 4
    assert values["components"] == 1
    assert all(values[k] is None for k in ("tp", "dice", "hd95", "both_empty", "reference_area_px"))


@pytest.mark.parametrize("name", list(METRICS))
def test_contract_of_every_metric(name):
    metric = METRICS[name]
    for table in metric.tables:
        shape, spacing = (
            ((12, 13), (1.0, 1.0)) if table == "image" else ((4, 12, 13), (1.0, 1.0, 1.0))
        )
        masks = [
            blob(shape, 0.1, 1),
            blob(shape, 0.1, 2),
            np.zeros(shape, bool),
            np.ones(shape, bool),
        ]
        for mask in masks:
            for reference in (*masks, None):
                before = copy.deepcopy((mask, reference))
                first = metric.compute(mask, reference, spacing)
                assert first == metric.compute(mask, reference, spacing)
                assert set(first) == set(metric.columns)
                assert np.array_equal(mask, before[0])
                assert not any(isinstance(v, float) and np.isnan(v) for v in first.values())
    assert len({column for column, _ in metric_columns("image")}) == len(metric_columns("image"))
