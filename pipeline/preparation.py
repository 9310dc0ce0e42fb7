"""From a request to a training job: whatever is wrong with it is said here, before Ray starts.

A training's folder holds `config.json` (the request, frozen), `index.parquet` (the data, frozen),
`checkpoints/`, pictures, `bundle/`, and, written last, `result.json`.
"""

import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.bundle import Bundle, build_model, load_bundle, ready_recipe
from pipeline.config import (
    Activation,
    RecipeConfig,
    SourceList,
    TrainConfig,
    decode,
    digest_json,
    load_config,
    loss_terms,
    training_differences,
)
from pipeline.dataset import (
    IndexCounts,
    IndexJob,
    count_index,
    index_cases,
    indexed_cases,
    make_pool,
    open_sandbox,
    parts_of_cases,
    split_cases,
    steps_per_epoch,
)
from pipeline.errors import (
    BadImage,
    BundleError,
    ConfigError,
    ResegError,
    SourceError,
    TooManyBadImages,
)
from pipeline.formats import FORMATS, Source, open_source
from pipeline.lock import LOCK_FILE
from pipeline.planning import check_apart
from pipeline.records import CaseRef, Shard
from pipeline.transforms import Recipe, recipe_from_plain, with_decision
from pipeline.transforms.postprocess import Sigmoid

CONFIG_FILE, INDEX_FILE, RESULT_FILE = "config.json", "index.parquet", "result.json"
BUNDLE_FOLDER = "bundle"
_PROBED_CASES = 8

Groups = list[tuple[str, list[CaseRef], int]]
"""(path of a shard, its cases, number of its source)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What every worker of a training knows."""

    out: str
    config: TrainConfig
    source: Source
    architecture: str
    options: Mapping[str, Any]
    recipe: Recipe
    index_digest: str
    also: tuple[Source, ...] = ()

    @property
    def activation(self) -> Activation:
        """What the recipe makes of logits."""
        steps = self.recipe.postprocess
        return "sigmoid" if any(isinstance(step, Sigmoid) for step in steps) else "softmax"

    @property
    def index_job(self) -> IndexJob:
        """How a case gets to the network's grid."""
        return IndexJob(
            source=self.source,
            recipe=self.recipe,
            num_labels=len(self.config.labels),
            channels=self.options["in_channels"],
            also=self.also,
        )

    @property
    def description(self) -> Bundle:
        """The bundle in the making, without weights."""
        return Bundle(
            uri=self.out,
            name=self.config.name or self.out.rstrip("/").rpartition("/")[2],
            architecture=self.architecture,
            options=self.options,
            labels=self.config.labels,
            recipe=self.recipe,
            weights_sha256="",
            digest="",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A checked request, before its data were looked at."""

    out: str
    config: TrainConfig
    source: Source
    shards: tuple[Shard, ...]
    init: Bundle | None
    also: tuple["Corrected", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """A list of more labelled cases: their source, its shards, and which cases count; empty: all."""

    source: Source
    shards: tuple[Shard, ...]
    cases: frozenset[str]


def open_source_list(path: str, config: TrainConfig) -> Corrected:
    """Read a file for `--also` and list its source. Raises ConfigError."""
    listed = load_config(SourceList, path)
    folder = os.path.dirname(os.path.abspath(path))
    remote = "://" in listed.uri
    uri = listed.uri if remote else os.path.join(folder, os.path.expanduser(listed.uri))
    source = open_source(uri, listed.source, config.limits)
    listing = FORMATS[source.format].list_shards(source)
    source = replace(source, num_buckets=listing.num_buckets)
    found = Corrected(source=source, shards=listing.shards, cases=frozenset(listed.cases))
    present = {case.case_id for _, cases in _cases_of(found) for case in cases}
    if not present:
        raise SourceError(f"{path}: {source.uri} holds none of its cases")
    missing = sorted(found.cases - present)
    if missing:
        raise SourceError(f"{path}: {source.uri} has no case {missing[0]!r}")
    return found


def _cases_of(also: Corrected) -> list[tuple[str, list[CaseRef]]]:
    reader = FORMATS[also.source.format]
    groups = []
    for shard in also.shards:
        cases = reader.list_cases(also.source, shard)
        if also.cases:
            cases = [case for case in cases if case.case_id in also.cases]
        if cases:
            groups.append((shard.path, cases))
    return groups


def finished_result(out: str) -> dict[str, Any] | None:
    """The result of a training that has ended, or None."""
    try:
        result: dict[str, Any] = json.loads(storage.read(storage.join(out, RESULT_FILE)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise ConfigError(f"{out}/{RESULT_FILE} is damaged; delete it to export again") from None
    return result


def check_request(location: str, out_location: str, config: TrainConfig) -> Request:
    """Everything that can be told without opening an image. Raises ConfigError."""
    out = storage.resolve(out_location)
    storage.check_writable(out)
    if config.model.init:  # workers run in folders of their own
        model = replace(config.model, init=storage.resolve(config.model.init))
        config = replace(config, model=model)
    config = replace(config, also=tuple(os.path.abspath(path) for path in config.also))
    source = open_source(location, config.source, config.limits)
    check_apart(source.uri, out)
    _check_frozen(out, source, config)
    if config.source.references == "ignore":
        raise ConfigError("source.references is ignore, but training needs reference masks")
    if config.source.images and not config.source.masks and source.format == "folder":
        raise ConfigError(
            "there is a pattern for images but none for masks, and training needs them: --masks"
        )
    _check_tensorboard(out, config)
    init = load_bundle(config.model.init) if config.model.init else None
    listing = FORMATS[source.format].list_shards(source)
    known = [case for shard in listing.shards for case in shard.cases or ()]
    if not any(shard.cases is None or shard.cases for shard in listing.shards):
        raise SourceError(f"{source.uri} holds no image; `reseg inspect` shows what is there")
    all_known = all(shard.cases is not None for shard in listing.shards)
    if all_known and not any(item.mask for case in known for item in case.slices):
        masks = config.source.masks
        hint = f"no file fits --masks {masks!r}" if masks else "say which files are masks: --masks"
        raise SourceError(f"{source.uri} has no reference masks; {hint}")
    if all_known:
        parts_of_cases([case.case_id for case in known], config.split, config.seed)
    source = replace(source, num_buckets=listing.num_buckets)
    also = tuple(open_source_list(path, config) for path in config.also)
    return Request(
        out=out, config=config, source=source, shards=listing.shards, init=init, also=also
    )


def _check_frozen(out: str, source: Source, config: TrainConfig) -> None:
    """Refuse another training's folder, and another configuration in the same one."""
    if storage.is_empty(out):
        return
    try:
        frozen = json.loads(storage.read(storage.join(out, CONFIG_FILE)))
        before = {"also": [], **frozen["config"], "source_uri": frozen["source"]}
    except FileNotFoundError:
        if [info.path for info in storage.list_files(out)] == [LOCK_FILE]:
            return
        raise ConfigError(f"{out} exists and is no training; choose another folder") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{out}/{CONFIG_FILE} is damaged; choose another folder") from None
    now = json.loads(json.dumps({**asdict(config), "source_uri": source.uri}))
    differing = training_differences(before, now)
    if differing:
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ConfigError(
            f"{out} is a training with another configuration: {'; '.join(differing[:4])}{more}. "
            "Use another folder, or the old configuration, which is in its config.json"
        )


def _check_tensorboard(out: str, config: TrainConfig) -> None:
    if not config.tensorboard:
        return
    import importlib.util

    if storage.is_remote(out):
        raise ConfigError("tensorboard = true needs OUT on a disk, not in object storage")
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard = true needs the package: pip install 'reseg[tensorboard]'")


def freeze(request: Request) -> None:
    """Store the request, so that nobody goes on with another one in this folder."""
    values = {"config": asdict(request.config), "source": request.source.uri}
    uri = storage.join(request.out, CONFIG_FILE)
    if not storage.create(uri, json.dumps(values, indent=1).encode()):
        _check_frozen(request.out, request.source, request.config)


def make_job(request: Request) -> TrainJob:
    """Network, recipe and channels of a request; decodes an image where nothing else tells them.

    Raises ConfigError where recipe, labels, loss, network and initial weights do not fit.
    """
    config = request.config
    options = dict(config.model.options)
    architecture = config.model.architecture
    if request.init is not None:
        architecture = architecture or request.init.architecture
        options = {**request.init.options, **options}
    in_channels = _in_channels(request, options)
    recipe = _recipe(config, request.init, in_channels)
    softmax = not any(isinstance(step, Sigmoid) for step in recipe.postprocess)
    out_channels = len(config.labels) + softmax
    if config.model.options.get("out_channels", out_channels) != out_channels:
        raise ConfigError(
            f"model.options.out_channels is {config.model.options['out_channels']!r}, but "
            f"{len(config.labels)} labels need {out_channels}: leave it out"
        )
    options |= {"in_channels": in_channels, "out_channels": out_channels}
    loss_terms(config.loss, "softmax" if softmax else "sigmoid")
    job = TrainJob(
        out=request.out,
        config=config,
        source=request.source,
        architecture=architecture or "unet",
        options=_all_options(architecture or "unet", options),
        recipe=recipe,
        index_digest="",
        also=tuple(item.source for item in request.also),
    )
    model = _outline(job)
    if request.init is not None:
        _check_init(request.init, model, in_channels)
    return job


def _outline(job: TrainJob) -> Any:
    """The network without memory for its weights. Raises ConfigError if there is no such one."""
    import torch

    try:
        with torch.device("meta"):
            return build_model(job.description)
    except BundleError as error:
        raise ConfigError(f"[model] {str(error).partition(': ')[2]}") from None
    except (RuntimeError, ValueError, TypeError) as error:
        brief = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(f"[model] this network cannot be built: {brief}") from None


def _all_options(architecture: str, options: Mapping[str, Any]) -> dict[str, Any]:
    from pipeline.models import MODELS

    entry = MODELS[architecture]
    return asdict(decode(entry.options, options, f"model.options of {architecture}"))


def _in_channels(request: Request, options: Mapping[str, Any]) -> int:
    """Of the configuration, the initial bundle, the recipe's steps, or the images themselves."""
    given = request.config.model.options.get("in_channels")
    if isinstance(given, int) and given > 0:
        return given
    if request.init is not None:
        return int(request.init.options["in_channels"])
    for step in request.config.recipe.preprocess:
        if step.get("step") == "to_channels" and isinstance(step.get("count"), int):
            return int(step["count"])
    return _probe_channels(request)


def _probe_channels(request: Request) -> int:
    """Channels of the first image that can be decoded."""
    reader = FORMATS[request.source.format]
    problem = "there is none"
    cases = (
        (shard.path, case)
        for shard in request.shards
        for case in reader.list_cases(request.source, shard)
    )
    with open_sandbox(request.config.limits) as sandbox:
        for path, case in islice(cases, _PROBED_CASES):
            (encoded,) = reader.read_cases(request.source, path, [case])
            data = next((item.image for item in encoded.slices if item.image), None)
            if data is None:
                continue
            try:
                return int(sandbox.decode(data, "image")[0].shape[2])
            except BadImage as error:
                problem = f"{error.error_class}: {error.message}"
    raise SourceError(
        f"none of the first {_PROBED_CASES} cases of {request.source.uri} has an image that can be "
        f"decoded ({problem}); if others have, say model.options.in_channels"
    )


def _recipe(config: TrainConfig, init: Bundle | None, in_channels: int) -> Recipe:
    """The configured steps, else the ready recipe, else that of the initial bundle."""
    wanted = config.recipe
    out_channels = 1 if len(config.labels) == 1 else len(config.labels) + 1
    if init is not None and not wanted.ready:
        values = init.recipe.to_plain()
        if len(config.labels) != len(init.labels):
            values["postprocess"] = with_decision(values["postprocess"], out_channels)
    else:
        values = ready_recipe(wanted.ready or "zscore", in_channels, out_channels)
    if wanted.preprocess:
        values["preprocess"] = [dict(step) for step in wanted.preprocess]
    if wanted.postprocess:
        values["postprocess"] = [dict(step) for step in wanted.postprocess]
    try:
        return recipe_from_plain(_with_side(values, wanted))
    except BundleError as error:
        raise ConfigError(f"[recipe] {error}") from None


def _with_side(values: dict[str, Any], wanted: RecipeConfig) -> dict[str, Any]:
    if not wanted.side:
        return values
    if not any(step.get("step") == "resize" for step in values["preprocess"]):
        raise ConfigError("recipe.side is given, but the recipe has no resize step")
    sides = {"height": wanted.side, "width": wanted.side}
    steps = [
        {**step, **sides} if step.get("step") == "resize" else step for step in values["preprocess"]
    ]
    return {**values, "preprocess": steps}


def _check_init(init: Bundle, model: Any, in_channels: int) -> None:
    """Initial weights must fit everywhere but in the head."""
    from pipeline.bundle import load_model

    if init.options.get("in_channels") != in_channels:
        raise ConfigError(
            f"--init {init.uri} takes {init.options.get('in_channels')} channels, this training "
            f"{in_channels}; leave model.options.in_channels out, or start without --init"
        )
    known = {name: tuple(value.shape) for name, value in load_model(init).state_dict().items()}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in wanted.items():
        if known.get(name) != shape and not name.startswith("head."):
            found = list(known[name]) if name in known else "missing"
            raise ConfigError(
                f"--init {init.uri} is of another architecture: {name} is {found} there, "
                f"{list(shape)} here; leave [model] options out to take the bundle's"
            )


# The index


def shard_groups(request: Request) -> Groups:
    """All cases to index, by shard; a case of a list given by `also` replaces earlier ones of its id."""
    reader = FORMATS[request.source.format]
    found = [(shard.path, reader.list_cases(request.source, shard), 0) for shard in request.shards]
    for number, also in enumerate(request.also, start=1):
        groups = _cases_of(also)
        replaced = {case.case_id for _, cases in groups for case in cases}
        found = [
            (path, [case for case in cases if case.case_id not in replaced], source)
            for path, cases, source in found
        ]
        found += [(path, cases, number) for path, cases in groups]
    return [group for group in found if group[1]] or found


def index_here(
    job: IndexJob, groups: Groups, report: Callable[[int, int, str], None] = lambda *_: None
) -> pa.Table:
    """Index all cases in this process, one shard after the other."""
    tables = []
    for number, group in enumerate(groups, start=1):
        tables.append(index_cases(job, *group))
        report(number, len(groups), "indexing")
    return pa.concat_tables(tables)


def write_index(out: str, index: pa.Table) -> str:
    """Store the index of a training; its digest."""
    buffer = io.BytesIO()
    pq.write_table(index, buffer, compression="zstd", write_page_checksum=True)
    storage.write(storage.join(out, INDEX_FILE), buffer.getvalue())
    return index_digest(index)


def read_index(out: str) -> pa.Table | None:
    """The stored index, or None. Raises ResegError if it is damaged."""
    try:
        data = storage.read(storage.join(out, INDEX_FILE))
        return pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        message = f"{out}/{INDEX_FILE} is damaged ({type(error).__name__}); delete it, and it is made again"
        raise ResegError(message) from None


def index_digest(index: pa.Table) -> str:
    """The fingerprint of the data: content of every case, and what was wrong with it."""
    columns = index.select(["case_id", "digest", "foreground", "problems"]).to_pylist()
    return digest_json(sorted(columns, key=lambda row: str(row["case_id"])))


def check_index(job: TrainJob, index: pa.Table) -> IndexCounts:
    """Whether there is something to learn from, and to judge by. Raises ConfigError.

    Raises TooManyBadImages if more images than allowed cannot be used.
    """
    config = job.config
    counts = count_index(index, len(config.labels))
    in_words = ", ".join(f"{n} {kind}" for kind, n in counts.bad_by_class.items())
    if not counts.num_labelled:
        raise SourceError(
            f"none of {counts.num_images} images has a reference mask that can be used"
            + (f": {in_words}, as {_first_bad(counts)}" if in_words else "; are there any?")
        )
    if counts.bad and len(counts.bad) > config.max_bad_share * counts.num_images:
        raise TooManyBadImages(
            f"{len(counts.bad)} of {counts.num_images} images are bad (allowed are "
            f"{config.max_bad_share:.1%}): {in_words}, as {_first_bad(counts)}; mend them, or raise "
            "max_bad_share to train without them"
        )
    absent = [name for name, n in zip(config.labels, counts.label_pixels, strict=True) if not n]
    if absent:
        raise SourceError(
            f"no reference mask has a pixel of {', '.join(map(repr, absent))}: there is nothing "
            "to learn; check labels and source.mask_values"
        )
    split = split_cases(indexed_cases(index), config.split, config.seed)
    steps_per_epoch(make_pool(split["train"]), config.sampling, config.batch_size)
    _check_sizes(job, {case.shape_HWC[:2] for case in split["train"]})
    return counts


def _first_bad(counts: IndexCounts) -> str:
    case_id, name, kind, message = counts.bad[0]
    return f"{case_id}/{name}: {kind}: {message}"


def _check_sizes(job: TrainJob, sizes: set[tuple[int, ...]]) -> None:
    patch = job.config.sampling.patch
    if patch:
        sizes = {(patch, patch)}
    if len(sizes) > 1:
        listed = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:4])
        raise ConfigError(
            f"slices come in {len(sizes)} sizes after the recipe ({listed}, …), and a batch needs "
            "one: set sampling.patch, or a recipe with a resize step"
        )
    (height, width) = next(iter(sizes))
    _try_network(job, height, width)


def _try_network(job: TrainJob, height: int, width: int) -> None:
    """Run the network without data, to see whether it takes the size at all."""
    import torch

    config = job.config
    share = config.batch_size // max(1, config.resources.workers)
    at_once = max(1, share // config.optimizer.accumulate)
    model = _outline(job).train()
    with torch.device("meta"):
        try:
            model(torch.zeros(at_once, job.options["in_channels"], height, width))
        except (RuntimeError, ValueError) as error:
            brief = str(error).splitlines()[0][:160]
            raise ConfigError(
                f"the network cannot be trained on {at_once} slices of {height} x {width} at once "
                f"({brief}); set sampling.patch, recipe.side or batch_size higher, or accumulate lower"
            ) from None


def with_index(job: TrainJob, index: pa.Table) -> TrainJob:
    """The job on exactly these data."""
    return replace(job, index_digest=index_digest(index))
