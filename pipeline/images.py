"""One encoded picture to an array: PNG, JPEG, TIFF, BMP, WebP, told by content, never by name.

Runs in the sandbox (`pipeline.sandbox`), because what it reads is hostile. Rules: pixels, pages
and bytes are checked before anything is decoded; alpha is dropped; a palette image becomes RGB,
a palette mask its raw indices; CMYK becomes RGB; EXIF orientation is applied; 16-bit stays
16-bit, 32-bit integers become float32; a file that ends early is refused, never padded.
"""

import io
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pipeline.errors import BadImage, ErrorClass

ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = None  # the limit below is ours, and is checked before decoding

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
REFUSED_SUFFIXES = (".gif", ".dcm", ".nii", ".nii.gz", ".nrrd", ".mha", ".npy", ".jp2", ".svs")
"""Medical and picture containers that are not read yet: listed and refused by name."""

MAX_PAGES = 8192

_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "BigTIFF"),
    (b"MM\x00+", "BigTIFF"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"\x93NUMPY", "NumPy"),
    (b"PAR1", "Parquet"),
    (b"NRRD", "NRRD"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
)
_READABLE = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")


def sniff(data: bytes) -> str:
    """The container's name by its first bytes. Raises BadImage: empty, not an image, unsupported."""
    if not data:
        raise BadImage(ErrorClass.EMPTY_FILE, "the file is empty")
    for magic, name in _MAGICS:
        if data.startswith(magic):
            return _supported(name)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[128:132] == b"DICM":
        return _supported("DICOM")
    if len(data) >= 348 and data[344:347] in (b"n+1", b"ni1"):
        return _supported("NIfTI")
    raise BadImage(ErrorClass.NOT_AN_IMAGE, "the content is not a picture of a known kind")


def _supported(name: str) -> str:
    if name == "BigTIFF":
        return "TIFF"
    if name not in _READABLE:
        raise BadImage(
            ErrorClass.UNSUPPORTED_FORMAT, f"{name} is not read; use PNG, JPEG, TIFF, BMP or WebP"
        )
    return name


def decode_image(data: bytes, max_pixels: int) -> list[npt.NDArray[Any]]:
    """Decode all pages of a picture to arrays HWC, C = 1 or 3, uint8, uint16 or float32.

    max_pixels: cap on the pixels of all pages together. Raises BadImage.
    """
    return _decode(data, max_pixels, as_mask=False)


def decode_mask(data: bytes, max_pixels: int) -> list[npt.NDArray[Any]]:
    """Decode all pages of a label map to raw values HW; colour that is grey is taken as grey.

    Raises BadImage, with MaskNotCategorical for colour.
    """
    return [_single_channel(page_HWC) for page_HWC in _decode(data, max_pixels, as_mask=True)]


def _single_channel(page_HWC: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if page_HWC.shape[2] > 1 and (page_HWC != page_HWC[:, :, :1]).any():
        raise BadImage(ErrorClass.MASK_NOT_CATEGORICAL, "the mask is a colour picture")
    return np.ascontiguousarray(page_HWC[:, :, 0])


def _decode(data: bytes, max_pixels: int, *, as_mask: bool) -> list[npt.NDArray[Any]]:
    name = sniff(data)
    try:
        with Image.open(io.BytesIO(data), formats=[name]) as image:
            num_pages = getattr(image, "n_frames", 1) if name in ("TIFF", "WEBP") else 1
            if num_pages > MAX_PAGES:
                raise BadImage(ErrorClass.IMAGE_TOO_LARGE, f"{num_pages} pages (limit {MAX_PAGES})")
            if name == "WEBP" and num_pages > 1:
                raise BadImage(ErrorClass.UNSUPPORTED_FORMAT, "an animated WebP is not an image")
            return list(_pages(image, num_pages, max_pixels, as_mask=as_mask))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data, name) from None
    except MemoryError:
        raise BadImage(
            ErrorClass.IMAGE_TOO_LARGE, "decoding needs more memory than allowed"
        ) from None
    except Exception as error:  # noqa: BLE001  (decoders raise anything on hostile input)
        if _ends_early(data, name):
            raise BadImage(ErrorClass.TRUNCATED_IMAGE, f"the {name} file ends early") from None
        message = f"the {name} decoder refused it ({type(error).__name__})"
        raise BadImage(ErrorClass.CORRUPT_IMAGE, message) from None


def _pages(
    image: Image.Image, num_pages: int, max_pixels: int, *, as_mask: bool
) -> Iterator[npt.NDArray[Any]]:
    """Decode page after page, while the pixels of all together stay within the limit."""
    remaining = max_pixels
    for page in range(num_pages):
        if num_pages > 1:
            image.seek(page)
        width, height = image.size
        remaining -= width * height
        if remaining < 0:
            message = f"page {page} of {width} x {height} goes over {max_pixels} pixels"
            raise BadImage(ErrorClass.IMAGE_TOO_LARGE, message)
        yield _page_array(image, as_mask=as_mask)


def _unidentified(data: bytes, name: str) -> BadImage:
    if _ends_early(data, name):
        return BadImage(ErrorClass.TRUNCATED_IMAGE, f"the {name} file ends early")
    if name == "TIFF":
        return BadImage(
            ErrorClass.UNSUPPORTED_FORMAT, "a kind of TIFF that the decoder cannot read"
        )
    return BadImage(ErrorClass.CORRUPT_IMAGE, f"the {name} header is damaged")


def _page_array(image: Image.Image, *, as_mask: bool) -> npt.NDArray[Any]:
    """The current page as HWC; the rules are those of the module's docstring."""
    mode = image.mode
    if as_mask and mode in ("P", "PA"):
        array = np.asarray(image if mode == "P" else image.getchannel(0))
        return _with_channels(array)
    if as_mask and mode == "1":
        return _with_channels(np.asarray(image).astype(np.uint8))
    image = ImageOps.exif_transpose(image)
    if mode in ("1", "L"):
        array = np.asarray(image.convert("L"))
    elif mode in ("LA", "La"):
        array = np.asarray(image.convert("LA").getchannel(0))
    elif mode.startswith("I;16"):
        array = np.asarray(image).astype(np.uint16)
    elif mode in ("I", "F"):
        array = np.asarray(image).astype(np.float32)
    elif mode in ("RGBA", "RGBX"):
        array = np.asarray(image)[:, :, :3]
    elif mode in ("RGB", "P", "PA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"):
        array = np.asarray(image.convert("RGB"))
    else:
        raise BadImage(ErrorClass.UNSUPPORTED_FORMAT, f"pixels of mode {mode!r} are not read")
    if array.dtype == np.float32 and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise BadImage(ErrorClass.NON_FINITE_PIXELS, f"{bad} pixels are NaN or infinite")
    return _with_channels(array)


def _with_channels(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array[:, :, None] if array.ndim == 2 else array


def _ends_early(data: bytes, name: str) -> bool:
    """Whether the container's own structure says that bytes are missing at its end."""
    if name == "PNG":
        return b"IEND" not in data[-64:] and not _has_png_end(data)
    if name == "JPEG":
        return b"\xff\xd9" not in data[-1024:]
    if name == "WEBP":
        return len(data) < 12 or struct.unpack("<I", data[4:8])[0] + 8 > len(data)
    if name == "BMP":
        return len(data) < 26 or struct.unpack("<I", data[2:6])[0] > len(data)
    return _tiff_ends_early(data)


def _has_png_end(data: bytes) -> bool:
    position = 8
    while position + 8 <= len(data):
        length = struct.unpack(">I", data[position : position + 4])[0]
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position += length + 12
    return False


_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_STRIP_TAGS = {273: 279, 324: 325}


def _tiff_ends_early(data: bytes) -> bool:
    """Whether the first directory, or a strip or tile that it names, lies past the end."""
    if len(data) < 8:
        return True
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] in (b"+\x00", b"\x00+"):
        return False
    (start,) = struct.unpack(order + "I", data[4:8])
    if start + 2 > len(data):
        return True
    (count,) = struct.unpack(order + "H", data[start : start + 2])
    if start + 2 + 12 * count > len(data):
        return True
    tags: dict[int, list[int]] = {}
    for index in range(count):
        entry = start + 2 + 12 * index
        tag, kind, num = struct.unpack(order + "HHI", data[entry : entry + 8])
        if tag in (273, 279, 324, 325) and kind in (3, 4):
            size = _TIFF_SIZES[kind] * num
            at = entry + 8
            if size > 4:
                (at,) = struct.unpack(order + "I", data[entry + 8 : entry + 12])
            if at + size > len(data):
                return True
            code = {3: "H", 4: "I"}[kind]
            tags[tag] = list(struct.unpack(f"{order}{num}{code}", data[at : at + size]))
    return any(
        offset + length > len(data)
        for starts, lengths in _STRIP_TAGS.items()
        for offset, length in zip(tags.get(starts, []), tags.get(lengths, []), strict=False)
    )


def reference_labels(
    values_HW: npt.NDArray[Any], num_labels: int, mapping: Mapping[int, int]
) -> npt.NDArray[np.uint8]:
    """The label map (uint8, HW) that a reference mask's grey values mean.

    mapping: grey value to label; where empty, the rule is: with one label, {0, 1} and {0, 255}
    (also one of them alone) mean background and label 1; otherwise the values are the labels.
    Raises BadImage: ClassOutOfRange for a value without a meaning, MaskNotCategorical where there
    are more distinct values than a label map has (a lossy copy, a photograph).
    """
    values = np.unique(values_HW)
    if len(values) > max(32, num_labels + 1):
        message = f"{len(values)} distinct values, where {num_labels + 1} labels are possible"
        raise BadImage(ErrorClass.MASK_NOT_CATEGORICAL, message)
    if not mapping:
        top_is_label = num_labels == 1 and set(values.tolist()) <= {0, 255}
        mapping = {0: 0, 255: 1} if top_is_label else {v: v for v in range(num_labels + 1)}
    labels_HW = np.zeros(values_HW.shape, np.uint8)
    for value in values.tolist():
        label = mapping.get(value)
        if label is None or not 0 <= label <= num_labels:
            message = f"the mask holds the value {value}, which is none of the labels"
            raise BadImage(ErrorClass.CLASS_OUT_OF_RANGE, message)
        if label:
            labels_HW[values_HW == value] = label
    return labels_HW
