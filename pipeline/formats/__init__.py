"""Input formats: one file a container. A new one is a file, a `FORMATS.register`, a line here."""

from collections.abc import Iterable

from pipeline import storage
from pipeline.config import LimitsConfig, SourceConfig
from pipeline.errors import SourceError
from pipeline.formats import folder, parquet, patterns, tar
from pipeline.formats.source import FORMATS, Format, Listing, Source

__all__ = ["FORMATS", "Format", "Listing", "Source", "folder", "open_source", "parquet", "tar"]


def open_source(location: str, config: SourceConfig, limits: LimitsConfig) -> Source:
    """Resolve a user's source and detect its format by what lies in it.

    A folder that holds only one kind of archive is read as that; a folder with any picture is
    read as a folder of pictures. Raises SourceError if there is nothing to read, ConfigError for
    a pattern that cannot work.
    """
    patterns.pattern_keys(config.images, config.masks)
    uri = storage.resolve(location)
    name = config.format if config.format != "auto" else _detect(uri)
    return Source(uri=uri, format=name, config=config, limits=limits)


def _detect(uri: str) -> str:
    lowered = uri.lower()
    for name, entry in FORMATS.items():
        if name != "folder" and lowered.endswith(entry.suffixes):
            if storage.file_info(uri) is None:
                raise SourceError(f"{uri} does not exist")
            return name
    return _detect_names(info.path for info in storage.list_files(uri))


def _detect_names(paths: Iterable[str]) -> str:
    found = set()
    for path in paths:
        lowered = path.lower()
        found |= {name for name, entry in FORMATS.items() if lowered.endswith(entry.suffixes)}
        if "folder" in found:
            return "folder"
    archives = sorted(found)
    if len(archives) > 1:
        raise SourceError(f"the source holds {' and '.join(archives)} shards; say which: --format")
    return archives[0] if archives else "folder"
