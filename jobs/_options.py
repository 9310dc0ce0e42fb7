"""What the commands share: options of one meaning, errors as one sentence, `--json`."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.errors import ConfigError, ResegError

F = TypeVar("F", bound=Callable[..., Any])

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong request, 3 too many bad images, "
    "4 refused by the gate, 130 interrupted, 143 terminated."
)

config_option = click.option(
    "--config", "config_path", type=click.Path(), help="TOML file; see README, Configuration."
)
set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Set one configuration key.",
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object to standard output, nothing else.",
)
address_option = click.option(
    "--address", help="Address of a Ray cluster; default: RAY_ADDRESS, else a local one is started."
)
run_id_option = click.option("--run-id", help="Name of the run; a run of that name is resumed.")
limit_option = click.option("--limit", type=click.IntRange(1), help="Stop after so many cases.")
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where the network runs."
)
night_option = click.option(
    "--night", type=click.IntRange(0), help="Number of a night; default: the published one."
)
bundle_option = click.option(
    "--bundle", required=True, metavar="FOLDER", help="The trained network; see `reseg bundle`."
)


because_option = click.option(
    "--because", required=True, metavar="REASON", help="Why; it goes on the record."
)


def check_out_file(out: str, *, force: bool) -> str:
    """Where a file that a command writes goes, as a path or URI.

    Refuses to overwrite one unasked, and a place where none can be. Raises ConfigError.
    """
    from pipeline import storage

    uri = storage.resolve(out)
    if not storage.is_remote(uri) and (Path(uri).is_dir() or not Path(uri).parent.is_dir()):
        raise ConfigError(f"{out} is not a file in a folder that exists")
    if not force and storage.file_info(uri) is not None:
        raise ConfigError(f"{out} exists; --force overwrites it")
    return uri


def source_options(command: F) -> F:
    """The options that say how files become cases."""
    for option in (
        click.option("--format", type=click.Choice(["auto", "folder", "tar", "parquet"])),
        click.option("--images", help="Pattern of image files, as '{case}/{case}_{slice}.tif'."),
        click.option("--masks", help="Pattern of reference masks, with the same fields."),
        click.option(
            "--references",
            type=click.Choice(["auto", "optional", "ignore"]),
            help="Whether an image without a reference is reported (auto), fine, or not looked for.",
        ),
        click.option("--mask-values", metavar="GREY=LABEL,...", help="Meaning of a mask's values."),
    ):
        command = option(command)
    return command


_SOURCE_KEYS = ("format", "images", "masks", "references", "mask_values")


def source_values(options: dict[str, Any]) -> dict[str, Any]:
    """Take the source options out of a command's arguments, as dotted configuration keys."""
    return {f"source.{key}": options.pop(key) for key in _SOURCE_KEYS if key in options}


def print_json(value: Any) -> None:
    """One object on standard output."""
    click.echo(json.dumps(value, indent=1, default=str))


class _Terminated(KeyboardInterrupt):
    """SIGTERM: the scheduler wants the machine back; stop as on Ctrl-C."""


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the stopping
    raise _Terminated


def _check_version() -> None:
    """In a submitted job: refuse to be another version than the one that sent it."""
    if "RESEG_VERSION" in os.environ:
        from pipeline.flows.submission import check_version

        check_version()


def run(command: click.Command) -> None:
    """Run a command as a program: errors of ours become a sentence and their exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _check_version()
        command.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        click.echo("interrupted; the same command takes up where it stopped", err=True)
        terminated = isinstance(stop, _Terminated) or isinstance(stop.__cause__, _Terminated)
        sys.exit(143 if terminated else 130)
    except ResegError as error:
        click.echo(f"reseg: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"reseg: {where}{error.strerror or error}", err=True)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("RESEG_TRACEBACK"):
            raise
        brief = (str(error).splitlines() or [""])[0][:200]
        click.echo(
            f"reseg: an error that nobody foresaw: {type(error).__name__}: {brief}; please report it, "
            "with what RESEG_TRACEBACK=1 adds",
            err=True,
        )
        sys.exit(1)
