"""What the gate lets through, and whom it sends to review."""

import pyarrow as pa
import pytest

from pipeline.compare import CASES_SCHEMA, COUNTS, IMAGES_SCHEMA, Comparison
from pipeline.drift import Drift
from pipeline.gate import judge, pair_scores, verdict_from_plain
from pipeline.policy import GateConfig
from pipeline.review import make_review, review_csv

NOTHING = pa.table(
    {
        "label_name": pa.array([], pa.string()),
        "confidence": pa.array([], pa.float64()),
    }
)


def case(name, **changes):
    row = {
        "case_id": name,
        "shard_id": "s",
        "group": "",
        "label": 1,
        "label_name": "x",
        "state": "recomputed",
        "volume_px_before": 100,
        "volume_px_after": 100,
        "confidence_before": 0.95,
        "confidence_after": 0.95,
        "dice": 1.0,
        "volume_change": 0.0,
        "appeared": 0,
        "vanished": 0,
    }
    return row | changes


def comparison(rows, *, num_before=None, images=()):
    return Comparison(
        before=0,
        after=1,
        num_cases_before=len(rows) if num_before is None else num_before,
        num_cases_after=len(rows),
        counts=dict.fromkeys(COUNTS, 0),
        images=pa.Table.from_pylist(list(images), IMAGES_SCHEMA),
        cases=pa.Table.from_pylist(rows, CASES_SCHEMA),
    )


def judged(rows, config=None, drift=(), scores=None, num_bad=0, **options):
    verdict = judge(
        config or GateConfig(),
        comparison(rows, **options),
        drift,
        num_images=100,
        num_bad=num_bad,
        scores=scores,
        why_no_scores="none",
    )
    assert verdict_from_plain(verdict.to_plain()) == verdict
    return verdict, {limit.name: limit for limit in verdict.limits}


def test_a_quiet_night_passes():
    verdict, limits = judged([case(f"c{i}") for i in range(30)])
    assert verdict.passed
    assert verdict.sentence == "all 4 limits that could be judged are kept"
    assert limits["max_volume_change"].value == 0


@pytest.mark.parametrize(("num_bad", "passed"), [(5, True), (6, False)])
def test_bad_images(num_bad, passed):
    verdict, limits = judged([case("a")], num_bad=num_bad)
    assert limits["max_bad_share"].passed is passed
    assert verdict.passed is passed


@pytest.mark.parametrize(("low", "passed"), [(3, True), (4, False)])
def test_cases_that_changed_too_much(low, passed):
    rows = [case(f"c{i}", dice=0.4 if i < low else 0.9) for i in range(30)]
    _, limits = judged(rows)
    assert limits["max_low_dice_share"].passed is passed
    assert limits["max_low_dice_share"].value == low / 30


@pytest.mark.parametrize(
    ("again", "in_all", "judged_at_all"), [(3, 1000, False), (3, 6, True), (20, 1000, True)]
)
def test_too_few_cases_are_not_judged_unless_they_are_half(again, in_all, judged_at_all):
    rows = [case(f"c{i}", dice=0.1, volume_px_after=10) for i in range(again)]
    verdict, limits = judged(rows, num_before=in_all)
    assert verdict.passed is not judged_at_all
    assert (limits["max_low_dice_share"].passed is not None) == judged_at_all
    if not judged_at_all:
        assert "too few to judge" in limits["max_low_dice_share"].note


def test_what_cannot_be_compared_is_not_alike_unless_it_was_all_bad():
    resized = [case(f"r{i}", dice=None) for i in range(4)]
    healed = [case(f"h{i}", dice=None, volume_px_before=None) for i in range(20)]
    spoilt = [case("s", dice=None, volume_px_after=None)]
    empty = [case("e", dice=None, volume_px_before=0, volume_px_after=0)]
    _, limits = judged([*resized, *healed, *spoilt, *empty, *(case(f"c{i}") for i in range(24))])
    low = limits["max_low_dice_share"]
    assert (low.value, low.passed) == (5 / 30, False)
    assert "4 of them of another size" in low.note


def test_volumes_of_each_label():
    rows = [
        case(f"c{i}", label_name=n, volume_px_after=a)
        for i in range(20)
        for n, a in (("x", 80), ("y", 70))
    ]
    verdict, _ = judged(rows)
    (failed,) = verdict.failed
    assert failed.what == "the relative change of the mean volume of y"
    assert failed.value == pytest.approx(0.3)


def test_a_limit_can_be_turned_off():
    config = GateConfig(max_low_dice_share=-1)
    verdict, limits = judged([case(f"c{i}", dice=0.0) for i in range(30)], config)
    assert verdict.passed
    assert limits["max_low_dice_share"].note == "turned off"


@pytest.mark.parametrize(("p_value", "passed"), [(1e-6, False), (0.4, None)])
def test_drift_counts_only_where_it_is_not_chance(p_value, passed):
    drift = Drift(
        population="recomputed",
        group="south",
        label_name="x",
        quantity="volume",
        num_before=40,
        num_after=40,
        mean_before=1.0,
        mean_after=2.0,
        ks=0.5,
        p_value=p_value,
        psi=0.9,
    )
    _, limits = judged([case(f"c{i}") for i in range(30)], drift=[drift])
    assert limits["max_drift_psi"].passed is passed
    assert "south" in limits["max_drift_psi"].what


def scored(values):
    return [
        {"case_id": f"c{i}", "label_name": "x", "dice": value, "both_empty": value is None}
        for i, value in enumerate(values)
    ]


def test_scores_are_paired_by_case():
    before, after = [0.9] * 12, [0.8] * 6 + [0.9] * 6
    extra = {**scored([1.0])[0], "case_id": "other"}
    scores = pair_scores(scored(before), [*scored(after), extra])
    assert scores.num_cases == 12
    assert scores.drop == pytest.approx(0.05)
    assert scores.low < 0.05 < scores.high
    assert scores.p_value < 0.05
    assert scores.worst[0] == ("c0", 0.9, 0.8)
    assert pair_scores(scored([0.5]), []) is None
    lost = pair_scores(scored([0.9] * 3), scored([0.9]))
    assert (lost.num_cases, lost.drop) == (3, pytest.approx(0.6))


def test_finding_something_where_nothing_is_costs_a_whole_dice():
    scores = pair_scores(scored([None, 0.9]), scored([0.0, 0.9]))
    assert scores.drop == pytest.approx(0.5)
    assert pair_scores(scored([None]), scored([None])) is None


@pytest.mark.parametrize(
    ("before", "after", "passed"),
    [
        ([0.9] * 20, [0.89] * 20, True),
        ([0.9] * 20, [0.8] * 20, False),
        ([0.9] * 3, [0.8] * 3, False),
        ([0.9] * 12, [0.2] + [0.93] * 11, None),
    ],
    ids=["within", "over", "over, few cases", "over, by chance"],
)
def test_a_drop_on_the_labelled_set(before, after, passed):
    scores = pair_scores(scored(before), scored(after))
    _, limits = judged([case("a")], scores=scores)
    assert limits["max_dice_drop"].passed is passed


def test_the_review_ranks_and_says_why():
    rows = [case(f"ok{i}") for i in range(30)]
    rows += [
        case("vanished", volume_px_after=0, dice=0.0, volume_change=-1.0, confidence_after=None),
        case("new lesion", volume_px_before=0, volume_change=None, dice=0.0),
        case("shrunk", volume_px_after=30, dice=0.4, volume_change=-0.7, vanished=2),
        case("unsure", confidence_after=0.6),
        case("gone", state="removed"),
    ]
    found = make_review(comparison(rows), [], NOTHING, most=10)
    assert [item.case_id for item in found] == ["vanished", "new lesion", "shrunk", "unsure"]
    reasons = {item.case_id: "; ".join(item.reasons) for item in found}
    assert reasons["vanished"] == "vanished: 100 voxels before, nothing now"
    assert reasons["shrunk"] == (
        "Dice 0.40 to last night; volume -70% (100 voxels to 30 voxels); 2 components vanished"
    )
    assert "confidence 0.60, lower than" in reasons["unsure"]
    assert "confidence fell from 0.95 to 0.60" in reasons["unsure"]


def test_images_that_became_bad_are_reviewed():
    image = {
        "image_id": "a/1",
        "case_id": "a",
        "slice_index": 1,
        "label": 1,
        "status_before": "ok",
        "status_after": "bad",
    }
    (item,) = make_review(comparison([case("a")], images=[image]), [], NOTHING, most=5)
    assert item.reasons == ("1 images that were good are bad now",)
    assert item.image_id == "a/1"


def test_the_list_is_safe_in_a_spreadsheet():
    rows = [case("=cmd()", volume_px_after=0, dice=0.0)]
    text = review_csv(make_review(comparison(rows), [], NOTHING, most=5)).decode()
    assert "'=cmd()" in text
    assert ",=cmd()" not in text


def test_no_scores_fail_where_there_must_be_some():
    _, limits = judged([case("a")])
    assert limits["max_dice_drop"].passed is None
    verdict = judge(
        GateConfig(),
        comparison([case("a")]),
        (),
        num_images=1,
        num_bad=0,
        scores=None,
        why_no_scores="no labelled case has a score from both bundles",
        must_score=True,
    )
    (failed,) = verdict.failed
    assert (failed.name, failed.value) == ("max_dice_drop", None)
    assert verdict.sentence == (
        "the drop of the mean Dice on the labelled set cannot be judged: "
        "no labelled case has a score from both bundles"
    )


def test_one_label_cannot_hide_behind_another():
    def rows(x, y):
        return [
            {"case_id": f"c{i}", "label_name": name, "dice": value, "both_empty": False}
            for i in range(20)
            for name, value in (("x", x), ("y", y))
        ]

    scores = pair_scores(rows(0.8, 0.8), rows(0.95, 0.7))
    assert scores.drop == pytest.approx(-0.025)
    assert scores.by_label == {"x": pytest.approx(-0.15), "y": pytest.approx(0.1)}
    verdict, _ = judged([case("a")], scores=scores)
    (failed,) = verdict.failed
    assert failed.what.endswith("of y")


def test_new_cases_without_a_good_image_are_reviewed():
    row = case("a", state="new", volume_px_before=None, volume_px_after=None, dice=None)
    row |= {"num_bad_after": 6, "num_images_after": 6, "confidence_after": None}
    (item,) = make_review(comparison([row]), [], NOTHING, most=5)
    assert item.reasons == ("none of its 6 images is good",)
