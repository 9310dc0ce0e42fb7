"""What `reseg submit` sends: a command that means on the cluster what it means here.

Nothing is packed by accident. Of files only a configuration and its table of groups travel; other
paths become absolute and must be shared. Of the environment only the names listed by `storage`
and here travel, because whoever may ask Ray reads a job's environment.
Nothing here talks to a cluster; `jobserver` does.
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipeline
from pipeline import storage
from pipeline.config import SegmentConfig, TrainConfig, load_config
from pipeline.errors import ConfigError
from pipeline.formats.patterns import pattern_keys
from pipeline.policy import NightlyConfig

_MAX_FILES_BYTES = 1 << 20
_STOP_WAIT_S = 150
"""A training that is stopped writes a checkpoint first; Ray by itself would kill it after 3 s."""
_OUR_VARIABLES = ("RESEG_LOG", "RESEG_PROGRESS_S", "RESEG_TRACEBACK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What must be known of a command to run it elsewhere.

    places: its parameters that are paths or URIs. config: what its configuration is decoded as.
    """

    places: tuple[str, ...] = ()
    config: type[Any] | None = None


KINDS: Mapping[str, Kind] = {
    "segment": Kind(places=("source", "results", "bundle"), config=SegmentConfig),
    "nightly": Kind(config=NightlyConfig),
    "train": Kind(places=("source", "out", "init", "also"), config=TrainConfig),
    "evaluate": Kind(places=("source", "bundle", "out"), config=SegmentConfig),
    "shadow": Kind(places=("source", "results", "bundle"), config=NightlyConfig),
    "verify": Kind(places=("results", "bundle")),
    "diff": Kind(places=("results", "out"), config=NightlyConfig),
    "vacuum": Kind(places=("results",)),
    "publish": Kind(places=("results",)),
    "rollback": Kind(places=("results",)),
    "plan": Kind(places=("source", "results", "bundle"), config=SegmentConfig),
    "inspect": Kind(places=("source",), config=SegmentConfig),
    "shard": Kind(places=("source", "destination"), config=SegmentConfig),
    "review": Kind(places=("results", "out")),
    "report": Kind(places=("results", "out")),
}
"""The commands that can be submitted."""

_CONFIG_PLACES: Mapping[type[Any], tuple[str, ...]] = {
    TrainConfig: ("model.init", "also"),
    NightlyConfig: ("source", "results", "bundle", "labelled.uri", "report.path"),
}
_CONFIG_FILES: Mapping[type[Any], tuple[str, ...]] = {NightlyConfig: ("groups.table",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A parameter of a command as the user gave it.

    flag: as `--bundle`; empty for one that is told by its position. values: none for a switch.
    """

    name: str
    flag: str = ""
    values: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """As on a command line."""
        if not self.flag:
            return list(self.values)
        return [w for v in self.values for w in (self.flag, v)] if self.values else [self.flag]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A command ready to be sent.

    words: what follows the command, without `--run-id`. run_id: of commands that have runs.
    name: under which the cluster knows it; the run id, or made of the command. files: what travels,
    by name in the job's working folder.
    """

    command: str
    words: tuple[str, ...]
    name: str
    run_id: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    def line(self) -> str:
        """What the cluster's shell runs."""
        run = ["--run-id", self.run_id] if self.run_id is not None else []
        return shlex.join(["python", "-m", f"jobs.{self.command}", *run, *self.words])


def check_command(command: str) -> Kind:
    """What is known of a command. Raises ConfigError unless it can be submitted."""
    if command not in KINDS:
        raise ConfigError(
            f"{command!r} cannot be submitted to a cluster; possible are: {', '.join(KINDS)}"
        )
    return KINDS[command]


def make_submission(
    command: str,
    given: Iterable[Given],
    *,
    parameters: Collection[str],
    values: Mapping[str, Any] | None = None,
    num_gpus: int | None = None,
    inline: bool = False,
) -> Submission:
    """Make a command portable, and find the name under which a cluster will know it.

    given: its parameters; defaults only where they are places. parameters: the names of all that it
    has. values: what they mean as keys of its configuration, to be checked. num_gpus: the most GPUs
    to use. inline: no file can travel, so a configuration becomes `--set` options. Raises ConfigError.
    """
    kind = check_command(command)
    known = {item.name: item for item in given}
    has_runs = command in ("segment", "nightly")
    if "address" in known:
        raise ConfigError(
            f"--address comes before the command: reseg submit --address URL {command} ..."
        )
    for name in kind.places:
        if name in known:
            known[name] = _moved(known[name])
    run_id = _choose_run_id(known.pop("run_id", None)) if has_runs else None
    files: dict[str, bytes] = {}
    config = _read_config(kind, known, values or {})
    if config is not None:
        known = _carry_config(config, known, files, inline=inline)
    if num_gpus is not None:
        known = _limit_gpus(command, config, known, parameters, num_gpus)
    size = sum(len(data) for data in files.values())
    if size > _MAX_FILES_BYTES:
        raise ConfigError(
            f"{' and '.join(files)} are {size:,} bytes, at most {_MAX_FILES_BYTES:,} travel with a "
            "job: put the table on storage that the cluster reaches, and name its URI"
        )
    return Submission(
        command=command,
        words=tuple(_words(known.values())),
        name=run_id or _name(command, known),
        run_id=run_id,
        files=files,
    )


def _words(given: Iterable[Given]) -> list[str]:
    """A command line; what stands by itself comes last if it could be taken for an option."""
    plain = [word for item in given if not item.flag for word in item.words()]
    options = [word for item in given if item.flag for word in item.words()]
    if any(word.startswith("-") for word in plain):
        return [*options, "--", *plain]
    return [*plain, *options]


def _moved(item: Given) -> Given:
    """A place as seen from any folder. Raises ConfigError for a URI that is not served."""
    return dataclasses.replace(item, values=tuple(storage.resolve(v) for v in item.values))


def _choose_run_id(given: Given | None) -> str:
    from pipeline.planning import check_run_id, new_run_id

    return new_run_id() if given is None else check_run_id(given.values[0])


def _name(command: str, known: Mapping[str, Given]) -> str:
    """A training is known by its folder, so that it is not started twice; others by the time."""
    if command == "train":
        out = known["out"].values[0]
        brief = re.sub(r"[^A-Za-z0-9]+", "-", out.rstrip("/").rpartition("/")[2]).strip("-")
        return f"train-{brief[:40] or 'out'}-{hashlib.sha256(out.encode()).hexdigest()[:8]}"
    from pipeline.planning import new_run_id

    return f"{command}-{new_run_id()}"


def _limit_gpus(
    command: str,
    config: Any,
    known: dict[str, Given],
    parameters: Collection[str],
    num_gpus: int,
) -> dict[str, Given]:
    """Pass the limit on as the command's own option, unless a lower one is set already."""
    for name in ("max_gpus", "workers"):
        if name not in parameters:
            continue
        flag = f"--{name.replace('_', '-')}"
        resources = getattr(config, "segment", config).resources
        wanted = int(known[name].values[0]) if name in known else getattr(resources, name, 0)
        if wanted > num_gpus:
            raise ConfigError(f"{flag} is {wanted}, more than the --gpus {num_gpus} of the job")
        if wanted:
            return known
        return {**known, name: Given(name=name, flag=flag, values=(str(num_gpus),))}
    raise ConfigError(f"reseg {command} has no limit of GPUs; leave out --gpus")


# Configuration


def _read_config(kind: Kind, known: Mapping[str, Given], values: Mapping[str, Any]) -> Any:
    """The configuration of the file and `--set`; a mistake in it, or in `values`, is told here and
    now. Raises ConfigError."""
    if kind.config is None:
        return None
    path = known["config_path"].values[0] if "config_path" in known else None
    assignments = known["assignments"].values if "assignments" in known else ()
    config = load_config(kind.config, path, assignments)
    whole = load_config(kind.config, path, assignments, values)
    source = getattr(whole, "segment", whole).source
    pattern_keys(source.images, source.masks)
    if kind is KINDS["nightly"]:
        config.check_places()
    return config


def _carry_config(
    config: Any, known: dict[str, Given], files: dict[str, bytes], *, inline: bool
) -> dict[str, Given]:
    """Let the file travel, with what it names; the last `--set` of a key counts."""
    settings: dict[str, str] = {}
    if "config_path" in known:
        path = Path(known["config_path"].values[0])
        if inline:
            settings = {key: _toml(value) for key, value in _flatten(_plain_toml(path))}
            known = {name: item for name, item in known.items() if name != "config_path"}
        else:
            moved = dataclasses.replace(known["config_path"], values=(_pack(path, files),))
            known = {**known, "config_path": moved}
    given = known["assignments"].values if "assignments" in known else ()
    changed = [(key.strip(), value.strip()) for key, _, value in (s.partition("=") for s in given)]
    changed += _moved_places(config)
    for key in _CONFIG_FILES.get(type(config), ()):
        table = _look_up(config, key)
        if table and not storage.is_remote(storage.resolve(table)):
            changed.append((key, _toml(_carry_table(key, table, files, inline=inline))))
    for key, value in changed:
        settings.pop(key, None)
        settings[key] = value
    if not settings:
        return known
    words = tuple(f"{key}={value}" for key, value in settings.items())
    return {**known, "assignments": Given(name="assignments", flag="--set", values=words)}


def _moved_places(config: Any) -> list[tuple[str, str]]:
    """The keys of a configuration that name a place from this folder, and that place from any."""
    found = []
    for key in _CONFIG_PLACES.get(type(config), ()):
        value = _look_up(config, key)
        if isinstance(value, str):
            moved: str | list[str] = storage.resolve(value) if value else value
        else:
            value = list(value)
            moved = [storage.resolve(place) for place in value]
        if moved != value:
            found.append((key, _toml(moved)))
    return found


def _carry_table(key: str, table: str, files: dict[str, bytes], *, inline: bool) -> str:
    if inline:
        raise ConfigError(f"{key} {table} is a file of this machine; a pod reads it from a URI")
    return _pack(Path(storage.resolve(table)), files)


def _pack(path: Path, files: dict[str, bytes]) -> str:
    """Add a file to those that travel; its name there. Raises ConfigError."""
    name = path.name.lstrip(".")
    if name in files:
        name = f"{len(files)}-{name}"
    try:
        with path.open("rb") as file:
            files[name] = file.read(_MAX_FILES_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    return name


def _plain_toml(path: Path) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))


def _flatten(values: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and their values, tables opened."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flatten(value, f"{where}{key}.")
        else:
            found.append((f"{where}{key}", value))
    return found


def _toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _look_up(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = getattr(config, key)
    return config


# Environment


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job gets: where stores are, how it tells of itself, the version to run.

    Keys and tokens stay where they are: a cluster's machines have a role of their own. Raises
    ConfigError for an address with more in it than a place.
    """
    names = (*storage.PUBLIC_VARIABLES, *_OUR_VARIABLES)
    chosen = {name: environment[name] for name in names if name in environment}
    for name, value in chosen.items():
        if "://" in value and storage.shown(value) != value:
            raise ConfigError(
                f"{name} holds a user name, a password or a query, and a job's environment can be "
                "read by others; give the cluster's machines a role, and the address without them"
            )
    chosen.setdefault("RESEG_PROGRESS_S", "30")
    return chosen | {
        "RESEG_VERSION": pipeline.__version__,
        "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
    }


def check_version(environment: Mapping[str, str] = os.environ) -> None:
    """On the cluster: raise ConfigError unless this is the version that the job was sent by."""
    wanted = environment.get("RESEG_VERSION")
    if wanted and wanted != pipeline.__version__:
        raise ConfigError(
            f"the job was sent by reseg {wanted}, the cluster has reseg {pipeline.__version__}: "
            "install the same version on both"
        )


def free_id(submission: Submission, taken: Mapping[str, tuple[str, str]]) -> str:
    """The id to submit under: the run's, or with .2, .3 and so on after it failed or was stopped.

    taken: of each job on the cluster, by its id: the name of its run, and its status. Raises
    ConfigError if the run is on its way, or done.
    """
    name = submission.name
    attempts = {job_id: status for job_id, (run, status) in taken.items() if name in (run, job_id)}
    for job_id, status in attempts.items():
        if status not in ("FAILED", "STOPPED"):
            raise ConfigError(refusal(submission, job_id, status))
    number = len(attempts) + 1
    while number > 1 and f"{name}.{number}" in taken:
        number += 1
    return name if number == 1 else f"{name}.{number}"


def refusal(submission: Submission, job_id: str, status: str) -> str:
    """Why a run is not submitted a second time, and what to do."""
    as_job = "" if job_id == submission.name else f", as job {job_id}"
    if status == "SUCCEEDED":
        other = "another folder OUT" if submission.command == "train" else "another --run-id"
        return (
            f"{submission.name} was submitted before and has succeeded{as_job}; for other work "
            f"choose {other}"
        )
    return (
        f"{submission.name} is on this cluster already, {status.lower()}{as_job}: "
        f"`reseg jobs logs {job_id} --follow` shows it; submit it again after "
        f"`reseg jobs stop {job_id}`"
    )
