"""What a team decides once about its nights: what is let through, compared, kept and shown.

Everything of `reseg nightly --config nightly.toml`, decoded as strictly as the rest.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from pipeline.config import SegmentConfig, SourceConfig
from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """Limits that a night must keep to be published; the value -1 turns one off."""

    max_bad_share: float = 0.05
    """Of all images of the night, bad ones."""
    max_missing_share: float = 0.1
    """Of the cases of last night, those that are no longer in the source."""
    low_dice: float = 0.5
    max_low_dice_share: float = 0.1
    """Of the cases computed again, those whose Dice between the nights is under `low_dice`."""
    max_volume_change: float = 0.25
    """Relative change of the mean volume of a label, over the cases computed again."""
    max_drift_psi: float = 0.5
    """Population stability index of volume or confidence, of each label in each group."""
    max_dice_drop: float = 0.02
    """Mean drop on the labelled set; see `labelled`."""
    alpha: float = 0.05
    """A drop beyond the limit is excused only if the paired test finds it likelier by chance than this."""
    min_cases: int = 20
    """Shares and means over fewer cases are not judged, unless they are half of all cases."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name.startswith("max_") and value != -1 and not 0 <= value < math.inf:
                raise ConfigError(f"gate.{item.name} is a limit of 0 or more, or -1, not {value}")
        for name in ("max_bad_share", "max_missing_share", "max_low_dice_share"):
            if getattr(self, name) > 1:
                raise ConfigError(f"gate.{name} is a share, at most 1, not {getattr(self, name)}")
        if not 0 <= self.low_dice <= 1 or not 0 < self.alpha < 1:
            raise ConfigError("gate.low_dice is in [0, 1], gate.alpha between 0 and 1")
        if self.min_cases < 1:
            raise ConfigError(f"gate.min_cases is at least 1, not {self.min_cases}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupsConfig:
    """Which site or scanner a case is of: a pattern of its id, or a column of a table."""

    pattern: str = ""
    """As `{group}_*`: the shortest text of the case id that fits is the group."""
    table: str = ""
    """A Parquet or CSV file with a row a case."""
    case_column: str = "case_id"
    group_column: str = "group"

    def __post_init__(self) -> None:
        if self.pattern and self.table:
            raise ConfigError("groups.pattern and groups.table exclude each other")
        if self.pattern and self.pattern.count("{group}") != 1:
            raise ConfigError(f"groups.pattern {self.pattern!r} has no {{group}}, or more than one")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledConfig:
    """A set with reference masks, on which a new bundle must not be worse than the published one."""

    uri: str = ""
    """Empty: there is none."""
    source: SourceConfig = field(default_factory=SourceConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepConfig:
    """Which nights stay readable."""

    nights: int = 30
    """The newest so many; 0: all."""
    grace_hours: float = 72.0
    """Parts younger than this are never collected: longer than any run."""

    def __post_init__(self) -> None:
        if self.nights < 0 or not 1 <= self.grace_hours < math.inf:
            raise ConfigError(
                f"keep.nights {self.nights} cannot be negative, keep.grace_hours "
                f"{self.grace_hours} is at least 1: parts of a live run would be collected"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """The page that people look at in the morning."""

    path: str = ""
    """Also write it here, as to a web server's folder; the run keeps its own copy."""
    worst_cases: int = 12
    """So many cases are shown as pictures before and after."""
    review_cases: int = 50
    """So many cases are listed for review."""

    def __post_init__(self) -> None:
        if not 0 <= self.worst_cases <= 200 or not 0 <= self.review_cases <= 10_000:
            raise ConfigError("report.worst_cases is 0 to 200, report.review_cases 0 to 10,000")


@dataclass(frozen=True, slots=True, kw_only=True)
class NightlyConfig:
    """Everything `reseg nightly` can be told."""

    source: str = ""
    """Where the images are."""
    results: str = ""
    bundle: str = ""
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    labelled: LabelledConfig = field(default_factory=LabelledConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        if self.segment.max_bad_share != SegmentConfig().max_bad_share:
            raise ConfigError(
                "segment.max_bad_share has no say in a nightly run: it is gate.max_bad_share"
            )

    def check_places(self) -> None:
        """Raise ConfigError unless source, results and bundle are said."""
        for name in ("source", "results", "bundle"):
            if not getattr(self, name):
                raise ConfigError(f'{name} is not said: add  {name} = "..."  to the configuration')


def labelled_segment_config(config: NightlyConfig) -> SegmentConfig:
    """How the labelled set is segmented: as the archive, but with its own files."""
    source = dataclasses.replace(config.labelled.source, references="optional")
    return dataclasses.replace(config.segment, source=source, max_bad_share=1.0)
