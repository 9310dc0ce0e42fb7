import numpy as np
from scipy import ndimage

from pipeline.transforms.postprocess import FillHoles, LargestComponent, MinimumSize

RNG = np.random.default_rng(2)


def test_largest_component_in_2d_and_3d():
    labels = np.zeros((2, 8, 8), np.uint8)
    labels[0, 0:3, 0:3] = 1
    labels[0, 5:8, 5:8] = 1
    labels[1, 5:8, 5:8] = 1
    kept = LargestComponent(dimensions=3).apply(labels)
    assert kept[0, 0, 0] == 0
    assert kept.sum() == 18
    each = LargestComponent(dimensions=2).apply(labels)
    assert each[0].sum() == 9
    assert each[0, 0, 0] == 1
    assert each[1].sum() == 9


def test_connectivity_decides_about_corners():
    labels = np.zeros((1, 4, 4), np.uint8)
    labels[0, [0, 1, 2], [0, 1, 2]] = 1
    assert LargestComponent(dimensions=2, connectivity="face").apply(labels).sum() == 1
    assert LargestComponent(dimensions=2, connectivity="full").apply(labels).sum() == 3


def test_labels_do_not_mix_and_empty_stays_empty():
    labels = np.zeros((1, 6, 6), np.uint8)
    assert not LargestComponent().apply(labels).any()
    labels[0, :2] = 1
    labels[0, 2:] = 2
    assert np.array_equal(LargestComponent().apply(labels), labels)


def test_minimum_size_against_a_plain_loop():
    labels = (RNG.random((3, 30, 30)) > 0.7).astype(np.uint8)
    expected = labels.copy()
    for z in range(3):
        numbers, count = ndimage.label(labels[z])
        for number in range(1, count + 1):
            if (numbers == number).sum() < 4:
                expected[z][numbers == number] = 0
    assert np.array_equal(MinimumSize(pixels=4, dimensions=2).apply(labels), expected)


def test_holes_are_filled_and_other_labels_in_them_stay():
    labels = np.zeros((1, 7, 7), np.uint8)
    labels[0, 1:6, 1:6] = 1
    labels[0, 2:5, 2:5] = 0
    labels[0, 3, 3] = 2
    filled = FillHoles(dimensions=2).apply(labels)
    assert filled[0, 3, 3] == 2
    assert (filled[0, 1:6, 1:6] == 1).sum() == 24
    assert not FillHoles(dimensions=2).apply(np.zeros((1, 5, 5), np.uint8)).any()
