"""Which site or scanner a case is of."""

import csv
import io
import re
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.policy import GroupsConfig


def make_group_of(config: GroupsConfig) -> Callable[[str], str]:
    """A function from case id to group; cases that no pattern or row fits are of the group "".

    Raises ConfigError if the table cannot be read, or lacks a column.
    """
    if config.pattern:
        regex = re.compile(
            "(.+?)".join(
                ".*".join(re.escape(piece) for piece in side.split("*"))
                for side in config.pattern.split("{group}")
            ),
            re.DOTALL,
        )

        def matched(case_id: str) -> str:
            found = regex.fullmatch(case_id)
            return found.group(1) if found else ""

        return matched
    if config.table:
        known = _read_table(config)
        return lambda case_id: known.get(case_id, "")
    return lambda case_id: ""


def _read_table(config: GroupsConfig) -> Mapping[str, str]:
    uri = storage.resolve(config.table)
    wanted = (config.case_column, config.group_column)
    try:
        data = storage.read(uri)
    except OSError as error:
        raise ConfigError(f"groups.table {uri} cannot be read: {error.strerror or error}") from None
    try:
        if uri.lower().endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
            columns = [[row.get(name) for row in rows] for name in wanted]
            present = {name for name in (rows[0] if rows else wanted) if name is not None}
        else:
            table = pq.read_table(io.BytesIO(data))
            present = set(table.column_names)
            columns = [table.column(n).to_pylist() if n in present else [] for n in wanted]
    except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"groups.table {uri} is neither CSV nor Parquet: {str(error).splitlines()[0][:200]}"
        ) from None
    for name in wanted:
        if name not in present:
            raise ConfigError(
                f"groups.table {uri} has no column {name!r}; it has {', '.join(sorted(present))}"
            )
    if not columns[0]:
        raise ConfigError(f"groups.table {uri} has no row")
    return {
        str(case_id): str(group)
        for case_id, group in zip(*columns, strict=True)
        if group is not None and group != ""
    }
