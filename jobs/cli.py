"""`reseg`: the commands, imported only when they are called."""

from importlib import import_module
from typing import Any

import click

import pipeline
from jobs._options import EPILOG, run

COMMANDS: dict[str, str] = {
    "demo": "Segment phantoms with the bundled network: the whole product in a minute.",
    "doctor": "What is wrong with this machine or cluster, and what to do about it.",
    "inspect": "What is in a source: cases, images, masks, and what is wrong with its listing.",
    "shard": "Write a source as Parquet or tar shards of cases.",
    "plan": "What a run would compute: new, changed, stale, removed, unchanged.",
    "segment": "Bring results up to date with a source and publish one night.",
    "train": "Train a network on images with reference masks; the result is a bundle.",
    "evaluate": "Score a bundle on a labelled source, case by case, with a chart.",
    "bundle": "Import, show and verify trained networks.",
    "nightly": "A whole night: segment, compare with last night, gate, publish, report.",
    "diff": "What differs between two nights, case by case and by group.",
    "publish": "Publish a staged night that the gate refused, on the record.",
    "rollback": "Publish an old night again, on the record.",
    "shadow": "Try a candidate network on a sample, and advise.",
    "review": "The cases to look at, also as files to correct and train on.",
    "report": "The report of a nightly run, made again.",
    "history": "The published nights: when, by which run, with which network and counts.",
    "paths": "Parquet files of a night, for any engine.",
    "explain": "All lineage of one mask, from the results alone.",
    "verify": "Prove masks by computing them again, and files by their checksums.",
    "vacuum": "Collect what no kept night needs.",
    "submit": "Run one of these commands as a job of a Ray cluster.",
    "jobs": "Jobs on a cluster: list them, read their logs, stop them.",
    "show": "Picture of an image with the outlines of its mask and reference.",
}


class _LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"jobs.{cmd_name}"), "command")  # noqa: B009
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, epilog=EPILOG)
@click.version_option(pipeline.__version__, prog_name="reseg")
def cli(**_: Any) -> None:
    """Re-segment a medical-image archive every night, and trust what is published.

    Start with `reseg demo`; then `reseg inspect SOURCE`, `reseg plan`, `reseg segment`.
    """


def main() -> None:
    """Entry point of the `reseg` program."""
    run(cli)


if __name__ == "__main__":
    main()
