"""File-name patterns: which file is which slice of which case, image or mask.

`{case}` and `{slice}` match within one folder level, `{case:path}` across levels, `*` anything
within a level. A field that occurs twice must read the same both times. Slices order by the
numbers in their names, not by text.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.errors import ConfigError, ErrorClass
from pipeline.records import CaseRef, Locator, Problem, SliceRef, printable

_TOKEN = re.compile(r"\{(case|slice)(:path)?\}|\*|[^{*]+|\{")

MISSING_MASK = Problem(
    error_class=ErrorClass.MISSING_MASK, message="the source has reference masks, but none for it"
)
_MISSING_IMAGE = Problem(
    error_class=ErrorClass.MISSING_IMAGE, message="there is a mask, but no image that it belongs to"
)
_SPECIAL = Problem(
    error_class=ErrorClass.UNSAFE_PATH, message="a link, pipe or device, which is never opened"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file or archive member, ready to be grouped into cases."""

    path: str
    locator: Locator
    problem: Problem | None = None


Key = tuple[str, str]
"""(case id, slice name)"""

Keys = tuple[Key | None, Key | None]
"""What a path would be as an image, and as a mask; None: it cannot be one."""


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """The regular expression of a pattern. Raises ConfigError, naming the option."""
    seen: set[str] = set()
    parts = []
    for match in _TOKEN.finditer(pattern):
        token, field, spans = match.group(0), match.group(1), match.group(2)
        if token == "{":
            raise ConfigError(
                f"{option} {pattern!r}: only the fields {{case}}, {{case:path}}, {{slice}} and * "
                "are known"
            )
        if field in seen:
            parts.append(f"(?P={field})")
        elif field:
            seen.add(field)
            parts.append(f"(?P<{field}>{'.+?' if spans else '[^/]+?'})")
        else:
            parts.append("[^/]*" if token == "*" else re.escape(token))
    if "case" not in seen:
        raise ConfigError(f"{option} {pattern!r} has no {{case}}: it cannot tell cases apart")
    return re.compile("".join(parts), re.DOTALL)


def pattern_keys(images: str, masks: str) -> Callable[[str], Keys]:
    """A function from a path to its keys by the configured patterns. Raises ConfigError."""
    image_regex = compile_pattern(images, "--images") if images else None
    mask_regex = compile_pattern(masks, "--masks") if masks else None
    if mask_regex and not image_regex:
        raise ConfigError(f"--masks {masks!r} needs --images too: the two must share their fields")

    def match(regex: re.Pattern[str] | None, path: str) -> Key | None:
        found = regex.fullmatch(path) if regex else None
        if not found:
            return None
        fields = found.groupdict()
        return printable(fields["case"]), printable(fields.get("slice") or "0")

    return lambda path: (match(image_regex, path), match(mask_regex, path))


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which `slice_9` comes before `slice_10`."""
    return tuple(
        (0, int(part), part) if part.isascii() and part.isdigit() else (1, 0, part)
        for part in re.split(r"([0-9]+)", name)
        if part
    )


def group_cases(
    entries: Iterable[Entry],
    keys_of: Callable[[str], Keys],
    *,
    masks_expected: bool | None,
) -> tuple[list[CaseRef], list[str]]:
    """Put entries together into cases; also the paths that are not ours.

    A path that fits both patterns is a mask, whose name is usually an image's plus a word, unless
    it has a mask of its own. masks_expected: whether an image without a mask is reported; None: if
    any entry is a mask. A second entry under a taken key stays visible, as DuplicateKey under the
    name `NAME~2`.
    """
    images: dict[str, dict[str, Entry]] = {}
    masks: dict[str, dict[str, Entry]] = {}
    ignored: list[str] = []
    ordered = sorted(entries, key=lambda item: (item.locator.offset, item.path))
    keyed = [(entry, *keys_of(entry.path)) for entry in ordered]
    mask_keys = {as_mask for _, _, as_mask in keyed if as_mask is not None}
    for entry, as_image, as_mask in keyed:
        is_mask = as_mask is not None and (as_image is None or as_image not in mask_keys)
        key = as_mask if is_mask else as_image
        if key is None:
            ignored.append(entry.path)
            continue
        case_id, slice_name = key
        table = (masks if is_mask else images).setdefault(case_id, {})
        table[_free_name(table, slice_name)] = (
            entry if slice_name not in table else _duplicate(entry)
        )
    expected = bool(masks) if masks_expected is None else masks_expected
    cases = [
        _case(case_id, images.get(case_id, {}), masks.get(case_id, {}), expected)
        for case_id in sorted(images.keys() | masks.keys())
    ]
    return cases, ignored


def _free_name(table: dict[str, Entry], name: str) -> str:
    number, free = 1, name
    while free in table:
        number += 1
        free = f"{name}~{number}"
    return free


def _duplicate(entry: Entry) -> Entry:
    message = "an earlier image of the source has the same case and slice"
    problem = Problem(error_class=ErrorClass.DUPLICATE_KEY, message=message)
    return Entry(path=entry.path, locator=entry.locator, problem=problem)


def _case(
    case_id: str, images: dict[str, Entry], masks: dict[str, Entry], masks_expected: bool
) -> CaseRef:
    slices = []
    for name in sorted(images.keys() | masks.keys(), key=natural_key):
        image, mask = images.get(name), masks.get(name)
        problem = image.problem if image else (mask and mask.problem) or _MISSING_IMAGE
        if problem is None and mask is not None and mask.problem is not None:
            message = f"the reference mask: {mask.problem.error_class}: {mask.problem.message}"
            problem, mask = Problem(error_class=ErrorClass.BAD_MASK, message=message), None
        if problem is None and mask is None and masks_expected:
            problem = MISSING_MASK
        slices.append(
            SliceRef(
                name=name,
                image=image.locator if image else None,
                mask=mask.locator if mask else None,
                problem=problem,
            )
        )
    return CaseRef(case_id=case_id, slices=tuple(slices))


def special_file_problem() -> Problem:
    """The problem of a FIFO, device, socket or archive link."""
    return _SPECIAL
