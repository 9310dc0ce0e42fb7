"""What a run tells while it runs: a line of progress for people, JSON lines for machines.

Log records hold run, shard, the number of a case in it, counts and seconds; never a case id, a file
name of a patient, or the text of a decoder's exception.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TextIO

from pipeline import storage


class Report(Protocol):
    """Whoever wants to know how far something is: `Progress`, or nobody."""

    def __call__(self, done: int, total: int, what: str, note: str = "") -> None:
        """`done` of `total`, and what is being done."""


def silent(done: int, total: int, what: str, note: str = "") -> None:
    """Nobody wants to know."""


class Progress:
    """One line on a terminal, rewritten at most ten times a second.

    Elsewhere silent, or a line of its own every RESEG_PROGRESS_S seconds, as in a job's log.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty()
        self._every_s = 0.1 if self._on_terminal else _seconds_between_lines()
        self._quiet = quiet or not self._every_s
        self._started = time.monotonic()
        self._written = 0.0
        self._width = 0

    def __call__(self, done: int, total: int, what: str, note: str = "") -> None:
        """Show `done` of `total`, and what is being done. total 0: nobody knows."""
        now = time.monotonic()
        if self._quiet or (now - self._written < self._every_s and (done < total or not total)):
            return
        self._written = now
        line = self._line(done, total, what, now - self._started)
        line += f", {note}" if note else ""
        if self._on_terminal:
            self._stream.write(f"\r{line:<{self._width}}")
            self._width = len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    @staticmethod
    def _line(done: int, total: int, what: str, seconds: float) -> str:
        if not total:  # nobody knows how many there will be
            return f"{done:,} {what}"
        share = done / total
        bar = "#" * int(24 * share)
        left = ""
        if 0 < share < 1 and seconds > 3:
            left = f", {_duration(seconds * (1 - share) / share)} left"
        return f"{what} [{bar:<24}] {done:,}/{total:,}{left}"

    def close(self) -> None:
        """End the line."""
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def _seconds_between_lines() -> float:
    """What RESEG_PROGRESS_S says; 0, for no lines at all, where it is no number."""
    try:
        return max(0.0, float(os.environ.get("RESEG_PROGRESS_S", "0")))
    except ValueError:
        return 0.0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class RunLog:
    """The structured log of one run: JSON lines, kept in its staging folder.

    Fields are counts, seconds, run and shard ids; a case is its `case_index` in its shard, which
    finds it in `masks` and names nobody. Written whole at the end of the run, however it ends, since
    object storage cannot append; with RESEG_LOG=json each line also goes to standard error at once,
    for whoever collects the logs of a cluster.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lines: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        """Add one record."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        self._lines.append(json.dumps(record, sort_keys=True))
        if os.environ.get("RESEG_LOG") == "json":
            print(self._lines[-1], file=sys.stderr, flush=True)  # noqa: T201

    def save(self) -> None:
        """Write what was told, after what an earlier attempt told."""
        try:
            before = storage.read(self._uri)
        except FileNotFoundError:
            before = b""
        storage.write(self._uri, before + "".join(f"{line}\n" for line in self._lines).encode())
        self._lines.clear()


def format_table(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """Rows as aligned text: numbers to the right, None as a dash."""
    names = list(columns)
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells), 0) for i, name in enumerate(names)]
    lines = ["  ".join(name.ljust(width) for name, width in zip(names, widths, strict=True))]
    right = [
        all(line[i][:1].isdigit() or line[i] in ("-", "") for line in cells)
        for i in range(len(names))
    ]
    for line in cells:
        lines.append(
            "  ".join(
                cell.rjust(width) if to_the_right else cell.ljust(width)
                for cell, width, to_the_right in zip(line, widths, right, strict=True)
            )
        )
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def no_formula(value: Any) -> Any:
    """A cell of a CSV file: a name that a spreadsheet would run as a formula becomes text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
