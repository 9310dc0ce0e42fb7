"""The options that say which part of a cluster a command may use."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from pipeline.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


def placement_options(command: F) -> F:
    """`--max-gpus` and `--nodes-like`."""
    for option in (
        click.option(
            "--nodes-like",
            multiple=True,
            metavar="KEY=VALUE",
            help="Only nodes of a cluster with this label hold the network, as market-type=spot.",
        ),
        click.option(
            "--max-gpus",
            type=click.IntRange(1),
            help="At most so many GPUs; an autoscaling cluster is asked for them.",
        ),
    ):
        command = option(command)
    return command


def placement_values(options: dict[str, Any], table: str) -> dict[str, Any]:
    """Take these options out of a command's arguments, as dotted keys under `table`."""
    labels = {}
    for text in options.pop("nodes_like"):
        key, separator, value = text.partition("=")
        if not (separator and key and value):
            raise ConfigError(f"--nodes-like {text!r} is not of the form KEY=VALUE")
        labels[key] = value
    return {f"{table}.max_gpus": options.pop("max_gpus"), f"{table}.nodes_like": labels or None}
