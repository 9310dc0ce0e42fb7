"""Pictures: the right size, the right colours in the right places, and no trust in names."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.report import draw_curves, draw_dice_bars, draw_overlay, draw_sheet


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def close_to(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(picture.astype(int) - colour) < 30).all(-1)


def test_curves_show_loss_and_score_from_the_first_epoch_on():
    records = [{"epoch": 1, "step": 10, "loss": 1.0, "score": 0.4}]
    one = opened(draw_curves([1.0] * 10, [0.1] * 10, records))
    assert close_to(one, (200, 85, 61)).sum() > 20
    none = opened(draw_curves([1.0, 0.5], [0.1, 0.1], [{"epoch": 1, "step": 2, "score": None}]))
    assert not close_to(none, (200, 85, 61)).any()


def test_bars_are_as_long_as_their_scores():
    def widest(score: float) -> int:
        rows = [{"case_id": "a", "label_name": "x", "dice": score}]
        picture = opened(draw_dice_bars(rows, score, score, score, score))
        return int(close_to(picture, (235, 64, 52)).any(0).sum())

    assert widest(0.9) == pytest.approx(3 * widest(0.3), rel=0.1)


@pytest.mark.parametrize("count", [1, 51, 400])
def test_any_number_of_cases_and_any_name_can_be_drawn(count):
    names = ["$\\frac{", "<b>&", "x" * 300, "\u202eabc\n"]
    rows = [
        {"case_id": names[n % 4] + str(n), "label_name": f"l{n % 3}", "dice": n / count}
        for n in range(count)
    ]
    assert opened(draw_dice_bars(rows, 0.5, 0.5, 0.4, 0.6)).shape[0] < 2000


def test_a_sheet_holds_all_pictures_in_order():
    pictures = [Image.new("RGB", (20, 10), (40 * n, 0, 0)) for n in range(1, 6)]
    sheet = opened(draw_sheet(pictures, columns=2))
    assert sheet.shape[0] >= 30
    assert [sheet[2, 2, 0], sheet[2, 26, 0], sheet[16, 2, 0]] == [40, 80, 120]


def test_each_label_has_a_colour_and_its_reference_a_tint_of_it():
    image = np.zeros((64, 64, 1), np.uint8)
    mask, reference = np.zeros((2, 64, 64), np.uint8)
    mask[5:25, 5:25], mask[5:25, 35:60] = 1, 2
    reference[35:60, 5:25], reference[35:60, 35:60] = 2, 1
    picture = np.asarray(draw_overlay(image, mask, reference, "c", 360))[:384]
    corner = {"mask 1": picture[:192, :192], "mask 2": picture[:192, 192:]}
    assert close_to(corner["mask 1"], (235, 64, 52)).any()
    assert close_to(corner["mask 2"], (66, 135, 245)).any()
    assert close_to(picture[192:, :192], (192, 215, 251)).any()
    assert close_to(picture[192:, 192:], (248, 191, 187)).any()
    assert not close_to(picture, (76, 217, 100)).any()


def test_overlays_of_worst_cases_outline_both():
    image = np.zeros((64, 64, 1), np.uint8)
    mask, reference = np.zeros((2, 64, 64), np.uint8)
    mask[10:30, 10:30], reference[34:54, 34:54] = 1, 1
    picture = np.asarray(draw_overlay(image, mask, reference, "c", 360))
    assert close_to(picture[:200, :200], (235, 64, 52)).any()
    assert close_to(picture[200:, 200:384], (76, 217, 100)).any()
