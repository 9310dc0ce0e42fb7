"""`reseg diff`: two nights opened, compared, and described."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import results, storage
from pipeline.compare import Comparison, compare_nights
from pipeline.drift import Drift, find_drift, reference_cases
from pipeline.errors import ConfigError, ResultsError
from pipeline.groups import make_group_of
from pipeline.policy import GroupsConfig

_LISTED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """What differs between two nights."""

    comparison: Comparison
    drift: Sequence[Drift]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of cases that moved, the lowest Dice first; new and removed ones last."""
        rows: list[dict[str, Any]] = self.comparison.cases.to_pylist()
        return sorted(
            rows,
            key=lambda row: (
                row["state"] in ("new", "removed"),
                1.0 if row["dice"] is None else row["dice"],
                row["case_id"],
                row["label"],
            ),
        )

    def to_plain(self) -> dict[str, Any]:
        """For `--json`; of more than 1,000 rows the first, `save` writes all."""
        return {
            "from": self.comparison.before,
            "to": self.comparison.after,
            "images": dict(self.comparison.counts),
            "cases": self.comparison.case_states,
            "rows": self.rows[:_LISTED],
            "num_rows": self.comparison.cases.num_rows,
            "drift": [asdict(item) for item in self.drift],
        }

    def save(self, folder: str, *, force: bool = False) -> None:
        """Write `cases.parquet` and `images.parquet`. Raises ConfigError if they are there."""
        files: Mapping[str, pa.Table] = {
            "cases": self.comparison.cases,
            "images": self.comparison.images,
        }
        uris = {name: storage.join(storage.resolve(folder), f"{name}.parquet") for name in files}
        for uri in uris.values():
            if not force and storage.file_info(uri) is not None:
                raise ConfigError(f"{uri} exists; --force overwrites it")
        for name, table in files.items():
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
            storage.write(uris[name], buffer.getvalue())


def diff_nights(
    location: str,
    before: int | None,
    after: int | None,
    groups: GroupsConfig,
    *,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Diff:
    """Compare two nights of one results folder. Raises ResultsError where they do not exist."""
    group_of = make_group_of(groups)
    uri = storage.resolve(location)
    now = results.open_night(uri, after)
    if now is None:
        raise ResultsError(f"{location} holds no published night")
    number = now.number - 1 if before is None else before
    if number < 0:
        raise ResultsError(
            f"night {now.number} of {location} is the first: there is none before it"
        )
    then = results.open_night(uri, number)
    comparison = compare_nights(then, now, group_of, progress=progress)
    reference = reference_cases(then, group_of)
    return Diff(comparison=comparison, drift=find_drift(comparison.cases, reference))
