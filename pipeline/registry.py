"""One small registry: a name, what it builds, and an error that lists the known names."""

from collections.abc import Callable, ItemsView, Iterator, ValuesView
from typing import Generic, TypeVar

from pipeline.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to entries of one kind; filled by decorators at import, read-only afterwards.

    >>> METRICS = Registry[Callable]("metric")
    >>> @METRICS.register("overlap")
    ... def overlap(...): ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under `name`; a name is taken once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")

        def add(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(sorted(self._entries))
            raise ConfigError(f"unknown {self.kind} {name!r}; known are: {known}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def items(self) -> ItemsView[str, T]:
        """Names and entries in the order in which they were registered."""
        return self._entries.items()

    def values(self) -> ValuesView[T]:
        """Entries in the order in which they were registered."""
        return self._entries.values()
