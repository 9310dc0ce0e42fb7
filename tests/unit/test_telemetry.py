"""Progress on a terminal, in a job's log, and nowhere else."""

import io

import pytest

from pipeline.telemetry import Progress, format_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "lines"), [(None, 0), ("rubbish", 0), ("3600", 2)])
def test_where_there_is_no_terminal_lines_are_rare_or_none(monkeypatch, seconds, lines):
    if seconds is not None:
        monkeypatch.setenv("RESEG_PROGRESS_S", seconds)
    stream = io.StringIO()
    progress = Progress(stream)
    for number in range(1, 101):
        progress(number, 100, "shards", "3.0 images/s")
    progress.close()
    told = stream.getvalue().splitlines()
    assert len(told) == lines
    if lines:
        assert told[-1] == f"shards [{'#' * 24}] 100/100, 3.0 images/s"


def test_a_terminal_has_one_line_that_is_rewritten():
    stream = Terminal()
    progress = Progress(stream)
    progress(12_000, 0, "files listed")
    progress(1, 1, "shards")
    progress.close()
    assert stream.getvalue().split("\r")[1].startswith("12,000 files listed")
    assert stream.getvalue().endswith(f"shards [{'#' * 24}] 1/1\n")


def test_a_column_is_aligned_as_a_whole():
    rows = [{"id": "7-night", "n": 1}, {"id": "evening-2", "n": None}, {"id": "x", "n": 10}]
    assert format_table(rows, ["id", "n"]).splitlines()[1:] == [
        "7-night     1",
        "evening-2   -",
        "x          10",
    ]
