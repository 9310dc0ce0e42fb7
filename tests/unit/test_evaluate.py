"""Evaluation: statistics, table, chart, and what cannot be scored."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError, SourceError
from pipeline.flows import evaluate
from pipeline.flows.evaluate import dice_statistics, run_evaluate
from pipeline.telemetry import no_formula


def rows_of(*scores: float) -> list[dict]:
    return [
        {"case_id": f"c{n}", "dice": score, "tp": 10, "fp": 2, "fn": 3}
        for n, score in enumerate(scores)
    ]


def test_statistics_by_hand():
    found = dice_statistics(rows_of(0.2, 0.9, 0.7))
    assert found["mean_dice"] == pytest.approx(0.6)
    assert found["median_dice"] == pytest.approx(0.7)
    assert found["pooled_dice"] == pytest.approx(60 / 75)
    assert found["num_cases"] == 3


def test_the_interval_covers_the_mean_and_narrows_with_cases():
    rng = np.random.default_rng(1)
    few, many = rng.normal(0.8, 0.05, 20), rng.normal(0.8, 0.05, 500)
    narrow, wide = dice_statistics(rows_of(*many)), dice_statistics(rows_of(*few))
    for found, scores in ((narrow, many), (wide, few)):
        expected = 1.96 * scores.std() / np.sqrt(len(scores))
        assert found["mean_dice_high"] - found["mean_dice"] == pytest.approx(expected, rel=0.15)
        assert found["mean_dice"] - found["mean_dice_low"] == pytest.approx(expected, rel=0.15)
    assert dice_statistics(rows_of(0.5)) == dice_statistics(rows_of(0.5))


def test_labels_of_one_case_are_drawn_together():
    alone = rows_of(*([0.2] * 10 + [0.8] * 10))
    twice = [{**row} for row in alone for _ in range(2)]
    assert dice_statistics(twice)["mean_dice_low"] == dice_statistics(alone)["mean_dice_low"]


@pytest.fixture
def evaluated(segment_here, monkeypatch):
    monkeypatch.setattr(
        evaluate, "run_segment", lambda *a, address=None, report=None, **k: segment_here(*a, **k)
    )
    return run_evaluate


def test_an_evaluation_is_a_table_a_chart_and_the_same_scores_as_the_results(
    evaluated, own_phantoms, tmp_path, demo_bundle, config, read_rows
):
    empty = own_phantoms / "phantom_0003"
    for path in empty.glob("*_mask.png"):
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    for path in empty.glob("phantom_0003_?.png"):
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    (own_phantoms / "phantom_0004" / "phantom_0004_2_mask.png").unlink()
    out = tmp_path / "evaluation"
    found = evaluated(str(own_phantoms), demo_bundle, str(out), config(max_bad_share=1.0))
    plain = json.loads((out / "evaluation.json").read_text())
    assert plain == json.loads(json.dumps(found.to_plain()))
    assert plain["both_empty"] == 1
    assert plain["without_reference"] == 1
    stored = {r["case_id"]: r["dice"] for r in read_rows(out / "results", "cases") if r["dice"]}
    assert {row["case_id"]: row["dice"] for row in plain["cases"]} == stored
    assert len(stored) == 6
    scores = [row["dice"] for row in plain["cases"]]
    assert scores == sorted(scores)
    assert plain["mean_dice"] == pytest.approx(np.mean(scores))
    table = list(csv.DictReader((out / "cases.csv").open()))
    assert [row["case_id"] for row in table] == [row["case_id"] for row in plain["cases"]]
    assert min(Image.open(out / "dice.png").size) > 100


def test_a_folder_of_something_else_is_left_alone(
    evaluated, phantoms, tmp_path, demo_bundle, config
):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is no evaluation"):
        evaluated(str(phantoms), demo_bundle, str(tmp_path), config())


def test_without_references_there_is_nothing_to_score(
    evaluated, phantoms, tmp_path, demo_bundle, config
):
    with pytest.raises(SourceError, match="no reference masks to compare with"):
        evaluated(
            str(phantoms), demo_bundle, str(tmp_path / "e"), config(source__references="ignore")
        )


def test_names_are_no_formulas_in_a_spreadsheet():
    assert no_formula("=cmd|x") == "'=cmd|x"
    assert no_formula("case") == "case"
    assert no_formula(-1.5) == -1.5
