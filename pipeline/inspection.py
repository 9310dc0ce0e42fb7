"""A first look at a source, before anything is decided."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from pipeline.config import SegmentConfig
from pipeline.errors import BadImage, SourceError
from pipeline.formats import FORMATS, Source, open_source
from pipeline.records import CaseRef, Shard
from pipeline.sandbox import Sandbox

_SAMPLED_CASES = 8


def inspect_source(
    location: str, config: SegmentConfig, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Counts of a source by its listing, and the kinds of pixels of its first images.

    Raises SourceError if there is nothing to read.
    """
    source = open_source(location, config.source, config.limits)
    reader = FORMATS[source.format]
    listing = reader.list_shards(source)
    problems: Counter[str] = Counter()
    sizes: list[int] = []
    images = masks = encoded_bytes = 0
    samples: list[tuple[Shard, CaseRef]] = []
    for number, shard in enumerate(listing.shards, start=1):
        for case in reader.list_cases(source, shard):
            sizes.append(len(case.slices))
            images += sum(item.image is not None for item in case.slices)
            masks += sum(item.mask is not None for item in case.slices)
            encoded_bytes += case.size_bytes
            problems.update(str(s.problem.error_class) for s in case.slices if s.problem)
            if len(samples) < _SAMPLED_CASES:
                samples.append((shard, case))
        if progress:
            progress(number, len(listing.shards), "shards")
    if not sizes:
        raise SourceError(
            f"{source.uri} holds no image"
            + (
                f"; {len(listing.ignored)} other files, as {listing.ignored[0]!r}"
                if listing.ignored
                else ""
            )
        )
    return {
        "source": source.uri,
        "format": source.format,
        "shards": len(listing.shards),
        "cases": len(sizes),
        "images": images,
        "masks": masks,
        "slices_per_case": f"{min(sizes)} to {max(sizes)}",
        "encoded_bytes": encoded_bytes or sum(shard.size_bytes for shard in listing.shards),
        "pixels": dict(_kinds(source, samples)),
        "problems": dict(problems),
        "ignored_files": len(listing.ignored),
        "first_cases": [case.case_id for _, case in samples[:3]],
    }


def _kinds(source: Source, samples: list[tuple[Shard, CaseRef]]) -> Counter[str]:
    """Size and type of the first image of each sampled case."""
    kinds: Counter[str] = Counter()
    with Sandbox(max_pixels=source.limits.max_pixels) as sandbox:
        for shard, case in samples:
            first = CaseRef(case_id=case.case_id, slices=case.slices[:1], version=case.version)
            for encoded in FORMATS[source.format].read_cases(source, shard.path, [first]):
                for item in encoded.slices:
                    if item.image is not None:
                        kinds[_kind(sandbox, item.image)] += 1
    return kinds


def _kind(sandbox: Sandbox, image: bytes) -> str:
    try:
        page = sandbox.decode(image, "image")[0]
    except BadImage as error:
        return str(error.error_class)
    return f"{page.shape[0]}x{page.shape[1]}x{page.shape[2]} {page.dtype}"
