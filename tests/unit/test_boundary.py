"""The challenge's metrics on constructed cells."""

import numpy as np
import pytest

from pipeline.metrics.boundary import (
    pixel_error,
    thinned_cells,
    v_info,
    v_rand,
    warping_error,
)


def grid(size: int = 40, cells: int = 4) -> np.ndarray:
    """`cells` x `cells` square cells with one-pixel membranes between them."""
    image = np.ones((size, size), bool)
    step = size // cells
    for line in range(step, size, step):
        image[line], image[:, line] = False, False
    return image


def test_the_truth_itself_is_perfect():
    truth = grid()
    assert v_rand(truth, truth).score == pytest.approx(1)
    assert v_info(truth, truth).score == pytest.approx(1)
    assert pixel_error(truth, truth) == warping_error(truth, truth) == 0


def test_a_border_shifted_by_one_pixel_is_no_error_of_topology():
    truth = grid()
    shifted = truth.copy()
    shifted[10], shifted[11] = True, False
    shifted[10, [10, 20, 30]] = False
    assert pixel_error(shifted, truth) > 0
    assert warping_error(shifted, truth) == 0


def test_one_missing_boundary_pixel_merges_two_cells_and_counts():
    truth = grid()
    leaky = truth.copy()
    leaky[10, 5] = True
    assert warping_error(leaky, truth) == 1 / truth.size
    agreement = v_rand(leaky, truth)
    assert agreement.split == pytest.approx(1)
    assert agreement.merge < 0.95
    assert v_info(leaky, truth).merge < 1 - 1e-3
    assert v_info(leaky, truth).split == pytest.approx(1)


def test_a_wall_through_a_cell_splits_it():
    truth = grid()
    cut = truth.copy()
    cut[1:10, 5] = False
    cut[0, 5] = False
    agreement = v_rand(cut, truth)
    assert agreement.split < 0.99
    assert agreement.merge == pytest.approx(1)
    assert v_info(cut, truth).split < 1 - 1e-3
    assert warping_error(cut, truth) > 0


def test_a_hole_and_an_island_are_errors_of_topology():
    truth = grid()
    holed = truth.copy()
    holed[5, 5] = False
    assert warping_error(holed, truth) == 1 / truth.size
    empty = np.zeros_like(truth)
    island = empty.copy()
    island[5, 5] = True
    assert warping_error(island, empty) == 1 / truth.size


def test_thick_membranes_cost_no_rand_score_but_pixels():
    truth = grid()
    thick = truth.copy()
    thick[9], thick[:, 9] = False, False
    assert v_rand(thick, truth).score == pytest.approx(1)
    assert pixel_error(thick, truth) > 0
    assert warping_error(thick, truth) == 0


def test_v_rand_by_hand_for_two_cells_of_which_one_is_cut_in_half():
    truth = np.ones((4, 9), bool)
    truth[:, 4] = False
    found = np.ones((4, 9), bool)
    found[:, 4] = False
    found[2] = False
    found[2, 5:] = True
    joint = [8 / 32, 8 / 32, 16 / 32]
    thinned = thinned_cells(found)
    counts = np.bincount(thinned[:, :4].ravel())
    joint = [n / 32 for n in counts if n] + [16 / 32]
    together = sum(p * p for p in joint)
    assert v_rand(found, truth).split == pytest.approx(together / (0.25 + 0.25))
    assert v_rand(found, truth).merge == pytest.approx(1)


def test_polarity_matters():
    truth = grid()
    assert v_rand(~truth, truth).score < 0.5
    assert pixel_error(~truth, truth) == 1


def test_nothing_found_is_one_segment():
    truth = grid()
    nothing = np.zeros_like(truth)
    assert v_rand(nothing, truth).split == pytest.approx(1)
    assert v_rand(nothing, truth).merge == pytest.approx(1 / 16, rel=0.05)
    assert v_info(nothing, truth).score == 0
