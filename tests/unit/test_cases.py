import io

import numpy as np
import pytest
from PIL import Image

from pipeline.cases import (
    PredictedCase,
    decode_case,
    finish_case,
    pack_predicted,
    unpack_predicted,
)
from pipeline.config import SourceConfig
from pipeline.errors import ErrorClass
from pipeline.records import EncodedCase, EncodedSlice, Problem, sha256_hex
from pipeline.sandbox import Sandbox
from pipeline.synthetic import encode_png, make_phantom
from pipeline.transforms import READY_RECIPES, recipe_from_plain

PHANTOM = make_phantom(1, num_slices=5, side=40)
RECIPE = recipe_from_plain(
    {"preprocess": [], "postprocess": [{"step": "sigmoid"}, {"step": "threshold"}]}
)


def encoded_case(change=lambda slices: None, **slices_of):
    slices = []
    for z in range(5):
        image, mask = encode_png(PHANTOM.volume_ZHW[z]), encode_png(PHANTOM.mask_ZHW[z] * 255)
        slices.append(
            EncodedSlice(
                name=str(z + 1),
                source_uri="x",
                image=image,
                mask=mask,
                image_sha256=sha256_hex(image),
                mask_sha256=sha256_hex(mask),
            )
        )
    change(slices)
    return EncodedCase(case_id="c", slices=slices, spacing_mm=(3.0, 2.0, 0.5))


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as opened:
        yield opened


def decode(case, sandbox, labels=1, max_pixels=1 << 30, **config):
    return decode_case(case, sandbox, SourceConfig(**config), labels, max_pixels=max_pixels)


def predicted_as_reference(decoded):
    """A prediction that equals the reference, except for a pixel."""
    labels = np.stack([PHANTOM.mask_ZHW[int(r.name) - 1] for r in decoded.usable]).copy()
    return PredictedCase(
        decoded=decoded,
        labels_ZHW=labels,
        confidence_ZHW=np.where(labels > 0, 204, 255).astype(np.uint8),
    )


def test_good_cases_decode_whole(sandbox):
    decoded = decode(encoded_case(), sandbox)
    assert np.array_equal(decoded.volume_ZHWC[..., 0], PHANTOM.volume_ZHW)
    assert np.array_equal(np.stack(decoded.references), PHANTOM.mask_ZHW)
    assert all(record.problem is None for record in decoded.slices)


def break_slice(index, **changes):
    def change(slices):
        for key, value in changes.items():
            setattr(slices[index], key, value)

    return change


@pytest.mark.parametrize(
    ("changes", "expected", "keeps_mask"),
    [
        ({"image": b""}, ErrorClass.EMPTY_FILE, False),
        ({"image": b"text"}, ErrorClass.NOT_AN_IMAGE, False),
        ({"image": encode_png(np.zeros((9, 9), np.uint8))}, ErrorClass.SLICE_SHAPE_MISMATCH, False),
        (
            {"image": encode_png(np.zeros((40, 40, 3), np.uint8))},
            ErrorClass.SLICE_SHAPE_MISMATCH,
            False,
        ),
        ({"mask": encode_png(np.zeros((9, 9), np.uint8))}, ErrorClass.MASK_SIZE_MISMATCH, True),
        ({"mask": encode_png(np.full((40, 40), 7, np.uint8))}, ErrorClass.CLASS_OUT_OF_RANGE, True),
        ({"mask": b"junk"}, ErrorClass.BAD_MASK, True),
        (
            {"image": None, "problem": Problem(error_class=ErrorClass.UNSAFE_PATH, message="m")},
            ErrorClass.UNSAFE_PATH,
            False,
        ),
        (
            {"mask": None, "problem": Problem(error_class=ErrorClass.MISSING_MASK, message="m")},
            ErrorClass.MISSING_MASK,
            True,
        ),
    ],
)
def test_a_bad_slice_is_a_row_and_its_neighbours_are_untouched(
    sandbox, changes, expected, keeps_mask
):
    good = finish_case(predicted_as_reference(decode(encoded_case(), sandbox)), RECIPE, ["lesion"])
    decoded = decode(encoded_case(break_slice(2, **changes)), sandbox)
    rows = finish_case(predicted_as_reference(decoded), RECIPE, ["lesion"])
    assert [row["image_id"] for row in rows.masks] == [f"c/{z}" for z in range(1, 6)]
    bad = rows.masks[2]
    assert bad["error_class"] == expected
    assert bad["error"]
    assert (bad["mask"] is not None) == keeps_mask
    assert bad["status"] == ("bad_reference" if keeps_mask else "bad")
    for index in (0, 1, 3, 4):
        for key in ("status", "mask", "mask_sha256", "labels", "height", "slice_index"):
            assert rows.masks[index][key] == good.masks[index][key]
        ours = [row for row in rows.metrics if row["image_id"] == f"c/{index + 1}"]
        assert ours == [row for row in good.metrics if row["image_id"] == f"c/{index + 1}"]
    assert rows.cases[0]["num_bad"] == 1
    assert rows.cases[0]["num_images"] == 5


def test_lossy_masks_are_refused(sandbox):
    buffer = io.BytesIO()
    noisy = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    Image.fromarray(noisy).save(buffer, "JPEG")
    decoded = decode(encoded_case(break_slice(0, mask=buffer.getvalue())), sandbox)
    assert decoded.slices[0].problem.error_class == ErrorClass.MASK_NOT_CATEGORICAL


def test_pages_become_slices_with_names_of_their_own(sandbox):
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(item) for item in PHANTOM.volume_ZHW]
    first.save(buffer, "TIFF", save_all=True, append_images=rest)
    case = EncodedCase(
        case_id="stack.tif",
        slices=[EncodedSlice(name="0", source_uri="x", image=buffer.getvalue(), image_sha256="s")],
    )
    decoded = decode(case, sandbox)
    assert [record.name for record in decoded.slices] == list("01234")
    assert np.array_equal(decoded.volume_ZHWC[..., 0], PHANTOM.volume_ZHW)


def test_a_case_of_too_many_pixels_keeps_a_row_for_each_slice(sandbox):
    def change(slices):
        slices[-1].problem = Problem(error_class=ErrorClass.EMPTY_FILE, message="no bytes")

    case = encoded_case(change)
    area = PHANTOM.mask_ZHW[0].size
    decoded = decode(case, sandbox, max_pixels=2 * area)
    reasons = [record.problem.error_class for record in decoded.slices]
    assert reasons == [ErrorClass.CASE_TOO_LARGE] * (len(reasons) - 1) + [ErrorClass.EMPTY_FILE]
    assert (decoded.volume_ZHWC, decoded.references) == (None, [])
    whole = decode(case, sandbox, max_pixels=area * (len(reasons) - 1))
    assert len(whole.usable) == len(reasons) - 1


def test_measures_of_a_case(sandbox):
    rows = finish_case(predicted_as_reference(decode(encoded_case(), sandbox)), RECIPE, ["lesion"])
    (case,) = rows.cases
    voxels = int(PHANTOM.mask_ZHW.sum())
    assert case["volume_px"] == voxels > 0
    assert case["volume_ml"] == pytest.approx(voxels * 3.0 * 2.0 * 0.5 / 1000)
    assert case["dice"] == 1
    assert case["hd95"] == 0
    assert case["confidence"] == pytest.approx(0.8)
    assert case["entropy"] == pytest.approx(0.7219, abs=1e-4)
    for row, mask in zip(rows.metrics, PHANTOM.mask_ZHW, strict=True):
        assert row["area_px"] == mask.sum()
        assert row["area_mm2"] == mask.sum() * 2.0 * 0.5
        assert row["both_empty"] == (not mask.any())
        assert (row["confidence"] is None) == (not mask.any())
    stored = rows.masks[2]
    array = np.frombuffer(stored["mask"], np.uint8).reshape(stored["height"], stored["width"])
    assert np.array_equal(array, PHANTOM.mask_ZHW[2])


def test_a_case_without_a_usable_slice_keeps_its_rows(sandbox):
    def change(slices):
        for item in slices:
            item.image = b""

    decoded = decode(encoded_case(change), sandbox)
    rows = finish_case(PredictedCase(decoded=decoded), RECIPE, ["lesion"])
    assert {row["error_class"] for row in rows.masks} == {ErrorClass.EMPTY_FILE}
    assert len(rows.masks) == 5
    assert rows.metrics == []
    assert rows.cases[0]["num_bad"] == 5


def test_nonfinite_slices_have_no_mask(sandbox):
    decoded = decode(encoded_case(), sandbox)
    case = predicted_as_reference(decoded)
    case.nonfinite_Z = np.array([False, False, True, False, False])
    rows = finish_case(case, RECIPE, ["lesion"])
    assert rows.masks[2]["error_class"] == ErrorClass.NON_FINITE_LOGITS
    assert rows.masks[2]["mask"] is None
    assert [row["slice_index"] for row in rows.metrics] == [0, 1, 3, 4]


def test_packing_between_processes_loses_nothing(sandbox):
    cases = [
        predicted_as_reference(decode(encoded_case(), sandbox)),
        predicted_as_reference(decode(encoded_case(break_slice(1, image=b"")), sandbox)),
        PredictedCase(decoded=decode(encoded_case(break_slice(0, mask=None)), sandbox)),
    ]
    recipe = recipe_from_plain(READY_RECIPES["unit-range"])
    unpacked = list(unpack_predicted(pack_predicted(cases)))
    for before, after in zip(cases, unpacked, strict=True):
        if before.labels_ZHW is not None:
            assert finish_case(before, recipe, ["x"]) == finish_case(after, recipe, ["x"])
        assert [r.name for r in before.decoded.slices] == [r.name for r in after.decoded.slices]
