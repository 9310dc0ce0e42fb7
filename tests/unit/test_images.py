import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import parse_mask_values
from pipeline.errors import BadImage, ErrorClass
from pipeline.images import decode_image, decode_mask, reference_labels

LIMIT = 1 << 26
RNG = np.random.default_rng(3)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def encode(array, kind, mode=None, **options):
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def error_of(data, decode=decode_image, limit=LIMIT):
    with pytest.raises(BadImage) as caught:
        decode(data, limit)
    return caught.value.error_class


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("array", [GREY, RGB], ids=["grey", "rgb"])
def test_lossless_pictures_come_back_exactly(kind, array):
    (page,) = decode_image(encode(array, kind), LIMIT)
    assert page.dtype == np.uint8
    assert np.array_equal(page, array if array.ndim == 3 else array[:, :, None])


def test_16_bit_and_float_keep_their_values():
    deep = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        (page,) = decode_image(encode(deep, kind), LIMIT)
        assert page.dtype == np.uint16
        assert np.array_equal(page[:, :, 0], deep)
    floats = RNG.normal(size=(20, 30)).astype(np.float32)
    (page,) = decode_image(encode(floats, "TIFF"), LIMIT)
    assert page.dtype == np.float32
    assert np.array_equal(page[:, :, 0], floats)


def test_alpha_is_dropped_and_palettes_are_colours_in_images_and_indices_in_masks():
    rgba = np.dstack([RGB, RNG.integers(0, 256, (20, 30), np.uint8)])
    assert np.array_equal(decode_image(encode(rgba, "PNG"), LIMIT)[0], RGB)
    assert np.array_equal(
        decode_image(encode(rgba, "WEBP", lossless=True, exact=True), LIMIT)[0], RGB
    )
    indices = RNG.integers(0, 3, (20, 30), np.uint8)
    image = Image.fromarray(indices, "L").convert("P")
    image = Image.frombytes("P", (30, 20), indices.tobytes())
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 99, 0] + [0] * 759)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    (page,) = decode_image(buffer.getvalue(), LIMIT)
    assert page.shape == (20, 30, 3)
    assert np.array_equal(page[:, :, 0], np.where(indices == 1, 200, 0))
    assert np.array_equal(decode_mask(buffer.getvalue(), LIMIT)[0], indices)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6
    (page,) = decode_image(encode(GREY, "TIFF", exif=exif), LIMIT)
    assert np.array_equal(page[:, :, 0], np.rot90(GREY, -1))


def test_cmyk_becomes_rgb_and_bilevel_grey():
    (page,) = decode_image(encode(RGB, "TIFF", "CMYK"), LIMIT)
    assert page.shape == (20, 30, 3)
    bits = (GREY > 128).astype(np.uint8) * 255
    assert set(np.unique(decode_image(encode(bits, "PNG", "1"), LIMIT)[0])) == {0, 255}
    assert set(np.unique(decode_mask(encode(bits, "PNG", "1"), LIMIT)[0])) == {0, 1}


def test_all_pages_of_a_tiff_are_read():
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(GREY + i) for i in range(4)]
    first.save(buffer, "TIFF", save_all=True, append_images=rest)
    pages = decode_image(buffer.getvalue(), LIMIT)
    assert [int(page[0, 0, 0]) for page in pages] == [int((GREY + i)[0, 0]) for i in range(4)]
    assert error_of(buffer.getvalue(), limit=4 * GREY.size - 1) == ErrorClass.IMAGE_TOO_LARGE


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_files_that_end_early_are_refused(kind, share):
    data = encode(RNG.integers(0, 256, (64, 64, 3), np.uint8), kind)
    assert error_of(data[: int(len(data) * share)]) == ErrorClass.TRUNCATED_IMAGE


def test_what_is_no_picture_is_told():
    assert error_of(b"") == ErrorClass.EMPTY_FILE
    assert error_of(b"<html>404</html>") == ErrorClass.NOT_AN_IMAGE
    assert error_of(bytes(128) + b"DICM" + bytes(200)) == ErrorClass.UNSUPPORTED_FORMAT
    assert error_of(encode(GREY, "GIF")) == ErrorClass.UNSUPPORTED_FORMAT
    nan = np.full((4, 4), np.nan, np.float32)
    assert error_of(encode(nan, "TIFF")) == ErrorClass.NON_FINITE_PIXELS


def test_bombs_are_refused_by_their_header():
    header = struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)
    import zlib

    chunk = b"IHDR" + header
    data = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    idat = b"IDAT" + zlib.compress(bytes(100))
    data += struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))
    assert error_of(data) == ErrorClass.IMAGE_TOO_LARGE


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP", "WEBP"]),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_give_pixels_or_a_bad_image_and_nothing_else(kind, flips):
    data = bytearray(encode(RGB, kind))
    for position, value in flips:
        data[position % len(data)] = value
    try:
        pages = decode_image(bytes(data), 1 << 20)
    except BadImage:
        return
    assert all(page.ndim == 3 and page.shape[2] in (1, 3) for page in pages)


def test_reference_values_follow_the_stated_rule():
    binary = np.array([[0, 255]], np.uint8)
    assert reference_labels(binary, 1, {}).tolist() == [[0, 1]]
    assert reference_labels(np.array([[0, 1]], np.uint8), 1, {}).tolist() == [[0, 1]]
    assert reference_labels(np.array([[0, 2]], np.uint8), 2, {}).tolist() == [[0, 2]]
    assert reference_labels(binary, 1, parse_mask_values("0=1,255=0")).tolist() == [[1, 0]]
    for values, labels, expected in (
        ([[0, 7]], 2, ErrorClass.CLASS_OUT_OF_RANGE),
        ([[0, 255]], 2, ErrorClass.CLASS_OUT_OF_RANGE),
        ([list(range(100))], 1, ErrorClass.MASK_NOT_CATEGORICAL),
    ):
        with pytest.raises(BadImage) as caught:
            reference_labels(np.array(values, np.uint8), labels, {})
        assert caught.value.error_class == expected


def test_colour_masks_are_not_categorical():
    assert error_of(encode(RGB, "PNG"), decode_mask) == ErrorClass.MASK_NOT_CATEGORICAL
    grey_in_colour = np.repeat((GREY > 9)[:, :, None].astype(np.uint8), 3, axis=2)
    assert np.array_equal(
        decode_mask(encode(grey_in_colour, "PNG"), LIMIT)[0], grey_in_colour[:, :, 0]
    )
