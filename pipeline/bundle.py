"""Bundles: a trained network with everything needed to use it, under one digest.

A folder with `bundle.json` (architecture, labels, recipe, provenance, scores, SHA-256 of the
weights) and `model.safetensors`. Nothing in it can run code; digests are checked before anything
is parsed. `.pt` files of others come in through `import_weights`, in a child process.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config import decode, digest_json
from pipeline.errors import BundleError, ConfigError
from pipeline.records import sha256_hex
from pipeline.transforms import READY_RECIPES, Recipe, recipe_from_plain, with_decision
from pipeline.transforms.postprocess import Sigmoid

if TYPE_CHECKING:
    from torch import nn

WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "bundle.json"
FORMAT_VERSION = 1
_MAX_DESCRIPTION_BYTES = 16 << 20
_IMPORT_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle's description, checked; the weights are read by `load_model`.

    labels: names of the labels 1, 2, …; 0 is background. digest: hash over all of it, weights
    included.
    """

    uri: str
    name: str
    architecture: str
    options: Mapping[str, Any]
    labels: tuple[str, ...]
    recipe: Recipe
    weights_sha256: str
    digest: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)


def load_bundle(location: str) -> Bundle:
    """Read and check a bundle's description and the digest of its weights.

    Imports no torch, so that a wrong bundle costs no start. Raises BundleError.
    """
    uri = storage.resolve(location)
    description = _read(uri, DESCRIPTION_FILE)
    if len(description) > _MAX_DESCRIPTION_BYTES:
        raise BundleError(
            f"{uri}: {DESCRIPTION_FILE} has {len(description)} bytes, which is no bundle"
        )
    try:
        values = json.loads(description)
        bundle = _from_values(uri, values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{uri}: {DESCRIPTION_FILE} is damaged ({type(error).__name__}: {error})"
        raise BundleError(message) from None
    if sha256_hex(_read(uri, WEIGHTS_FILE)) != bundle.weights_sha256:
        raise BundleError(
            f"{uri}: {WEIGHTS_FILE} does not have the SHA-256 that {DESCRIPTION_FILE} says; it was "
            "damaged or exchanged, copy the bundle again",
            error_class="ChecksumMismatch",
        )
    return bundle


def _from_values(uri: str, values: Mapping[str, Any]) -> Bundle:
    if values.get("format") != "reseg-bundle" or values.get("version") != FORMAT_VERSION:
        raise BundleError(
            f"{uri} is not a bundle of version {FORMAT_VERSION}: format {values.get('format')!r}, "
            f"version {values.get('version')!r}"
        )
    labels = tuple(str(label) for label in values["labels"])
    if not 1 <= len(labels) <= 255:
        raise BundleError(f"{uri}: {len(labels)} labels; 1 to 255 are possible")
    return Bundle(
        uri=uri,
        name=str(values["name"]),
        architecture=str(values["architecture"]["name"]),
        options=dict(values["architecture"]["options"]),
        labels=labels,
        recipe=recipe_from_plain(values["recipe"]),
        weights_sha256=str(values["weights_sha256"]),
        digest=digest_json(values),
        provenance=dict(values.get("provenance", {})),
        scores=dict(values.get("scores", {})),
    )


def _read(uri: str, name: str) -> bytes:
    try:
        return storage.read(storage.join(uri, name))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{uri} is not a bundle: it has no {name}") from None
    except OSError as error:
        raise BundleError(f"{uri}: {name} cannot be read: {error.strerror}") from None


def load_model(bundle: Bundle) -> "nn.Module":
    """The bundle's network in evaluation mode, on the CPU, with its weights.

    Raises BundleError if architecture, options, labels and weights do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _read(bundle.uri, WEIGHTS_FILE)
    if sha256_hex(data) != bundle.weights_sha256:
        raise BundleError(f"{bundle.uri}: the weights changed while they were loaded")
    try:
        state = load(data)
    except SafetensorError as error:
        raise BundleError(f"{bundle.uri}: {WEIGHTS_FILE} is damaged: {error}") from None
    model = build_model(bundle)
    _load_state(model, state, bundle.uri)
    return model.eval()


def build_model(bundle: Bundle) -> "nn.Module":
    """The bundle's network without its weights; checks channels against the labels."""
    from pipeline.models import MODELS

    try:
        architecture = MODELS[bundle.architecture]
        options: Any = decode(architecture.options, bundle.options, bundle.architecture)
    except ConfigError as error:
        raise BundleError(f"{bundle.uri}: {error}") from None
    _, outputs = architecture.channels(options)
    has_sigmoid = any(isinstance(step, Sigmoid) for step in bundle.recipe.postprocess)
    wanted = len(bundle.labels) + (0 if has_sigmoid else 1)
    if outputs != wanted:
        raise BundleError(
            f"{bundle.uri}: the network has {outputs} output channels, but {len(bundle.labels)} "
            f"labels with {'sigmoid' if has_sigmoid else 'softmax'} need {wanted}"
        )
    return architecture.build(options)


def _load_state(model: "nn.Module", state: Mapping[str, Any], where: str) -> None:
    check_state({name: tuple(value.shape) for name, value in state.items()}, model, where)
    model.load_state_dict(dict(state))


def check_state(shapes: Mapping[str, tuple[int, ...]], model: "nn.Module", where: str) -> None:
    """Raise BundleError, naming tensors and both shapes, unless they are exactly the model's."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    differing = [
        f"{name} is {list(shapes[name]) if name in shapes else 'missing'}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if shapes.get(name) != shape
    ] + [
        f"{name} {list(shape)} is not of this network"
        for name, shape in shapes.items()
        if name not in wanted
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise BundleError(
            f"{where}: the weights are of another architecture: {'; '.join(differing[:3])}{more}",
            error_class="ArchitectureMismatch",
        )


def save_bundle(
    location: str,
    *,
    name: str,
    architecture: str,
    options: Mapping[str, Any],
    labels: Sequence[str],
    recipe: Mapping[str, Any],
    weights: bytes,
    provenance: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write a bundle and read it back. weights: a safetensors file's bytes.

    Raises BundleError if something is there already.
    """
    uri = storage.resolve(location)
    if not storage.is_empty(uri):
        raise BundleError(f"{uri} exists and is not empty; a bundle is never overwritten")
    storage.check_writable(uri)
    values = {
        "format": "reseg-bundle",
        "version": FORMAT_VERSION,
        "name": name,
        "architecture": {"name": architecture, "options": dict(options)},
        "labels": list(labels),
        "recipe": recipe_from_plain(recipe).to_plain(),
        "provenance": dict(provenance),
        "scores": dict(scores or {}),
        "weights_sha256": sha256_hex(weights),
    }
    storage.write(storage.join(uri, WEIGHTS_FILE), weights)
    storage.write(
        storage.join(uri, DESCRIPTION_FILE), (json.dumps(values, indent=1) + "\n").encode()
    )
    return load_bundle(uri)


def verify_bundle(bundle: Bundle) -> int:
    """Load everything, check that the weights are finite; the number of parameters.

    Raises BundleError.
    """
    model = load_model(bundle)
    _check_finite(model.state_dict(), bundle.uri)
    return sum(parameter.numel() for parameter in model.parameters())


def _check_finite(state: Mapping[str, Any], where: str) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise BundleError(
                f"{where}: the tensor {name} holds NaN or infinite values",
                error_class="NonFiniteWeights",
            )


def import_weights(
    layout: str,
    weights: str,
    out: str,
    *,
    recipe: str | None = None,
    labels: Sequence[str] = (),
    name: str | None = None,
) -> Bundle:
    """Make a bundle of a published `.pt` or `.pth` state dict.

    layout: "buda", "milesial" or "article". The file is opened in a child process with
    `weights_only=True`; names, shapes and finiteness are checked there. Raises BundleError.
    """
    path = storage.resolve(weights)
    if not storage.is_remote(path) and not Path(path).is_file():
        raise BundleError(f"{path} is not a file")
    if not storage.is_empty(storage.resolve(out)):
        raise BundleError(
            f"{storage.resolve(out)} exists and is not empty; a bundle is never overwritten"
        )
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "weights.pt")
        local.write_bytes(storage.read(path))
        answer = _run_import_child(layout, local, Path(folder, WEIGHTS_FILE), shown=path)
        return save_bundle(
            out,
            name=name or Path(path).stem,
            architecture="unet",
            options=answer["options"],
            labels=labels or _default_labels(layout, answer["options"]["out_channels"]),
            recipe=ready_recipe(recipe or _DEFAULT_RECIPES[layout], **_channels(answer["options"])),
            weights=Path(folder, WEIGHTS_FILE).read_bytes(),
            provenance={
                "imported_from": layout,
                "file": Path(path).name,
                "file_sha256": sha256_hex(local.read_bytes()),
            },
        )


_DEFAULT_RECIPES = {"buda": "buda-lgg", "milesial": "milesial", "article": "unit-range"}


def _default_labels(layout: str, out_channels: int) -> list[str]:
    if layout == "buda" and out_channels == 1:
        return ["tumour"]
    count = max(1, out_channels - 1)
    return ["foreground"] if count == 1 else [f"label_{i}" for i in range(1, count + 1)]


def _channels(options: Mapping[str, Any]) -> dict[str, int]:
    return {key: options[key] for key in ("in_channels", "out_channels")}


def ready_recipe(name: str, in_channels: int, out_channels: int) -> dict[str, Any]:
    """A ready recipe with the network's channels, and the activation that its outputs need.

    Raises BundleError for an unknown name.
    """
    if name not in READY_RECIPES:
        raise BundleError(f"unknown recipe {name!r}; known are: {', '.join(READY_RECIPES)}")
    ready = READY_RECIPES[name]
    before = [
        {**step, "count": in_channels} if step["step"] == "to_channels" else step
        for step in ready["preprocess"]
    ]
    after = with_decision(ready["postprocess"], out_channels)
    return {"preprocess": before, "postprocess": after}


def _run_import_child(layout: str, weights: Path, out: Path, *, shown: str) -> dict[str, Any]:
    root = str(Path(__file__).resolve().parent.parent)
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; "
        "from pipeline.bundle import convert_weights; convert_weights(*sys.argv[2:])"
    )
    try:
        child = subprocess.run(
            [sys.executable, "-c", code, root, layout, str(weights), str(out)],
            capture_output=True,
            timeout=_IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BundleError(f"{shown}: loading took longer than {_IMPORT_TIMEOUT_S} s") from None
    lines = child.stdout.decode(errors="replace").splitlines()
    if child.returncode != 0 or not lines:
        raise BundleError(
            f"{shown}: loading crashed (exit {child.returncode}); not a weights file?"
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise BundleError(f"{shown}: {answer['error']}", error_class=answer["error_class"])
    return answer


def convert_weights(layout: str, weights: str, out: str) -> None:
    """The import child: load, check, convert, write safetensors; prints one line of JSON."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        print(json.dumps({"options": _convert(layout, weights, out)}))  # noqa: T201
    except BundleError as error:
        print(json.dumps({"error": str(error), "error_class": error.error_class}))  # noqa: T201


def _convert(layout: str, weights: str, out: str) -> dict[str, Any]:
    import dataclasses

    import torch
    from safetensors.torch import save_file

    from pipeline.models.unet import UNet, from_published, published_options

    try:
        loaded = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (torch raises pickle, zip, runtime and value errors alike)
        raise BundleError(
            f"not a plain file of weights ({type(error).__name__}); it was not opened any other way",
            error_class="UnsafePickle",
        ) from None
    state = _state_dict(loaded)
    _check_finite(state, "the file")
    options = published_options(state, layout)
    if options is None:
        found = "; ".join(f"{name} {list(value.shape)}" for name, value in list(state.items())[:3])
        raise BundleError(
            f"not of the {layout} layout; it holds {found}", error_class="ArchitectureMismatch"
        )
    ours = from_published(state, layout, options.depth)
    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    with torch.device("meta"):
        check_state(shapes, UNet(options), "the file")
    save_file({name: value.contiguous() for name, value in ours.items()}, out)
    return dataclasses.asdict(options)


def _state_dict(loaded: Any) -> dict[str, Any]:
    """The tensors of a checkpoint: itself, or under `state_dict` or `model`; `mask_values` dropped."""
    import torch

    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise BundleError(f"holds a {type(loaded).__name__}, not a state dict")
    state = {str(name): value for name, value in loaded.items() if name != "mask_values"}
    wrong = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if wrong or not state:
        what = f"{wrong[0]!r} is not a tensor" if wrong else "it is empty"
        raise BundleError(f"not a state dict: {what}", error_class="ArchitectureMismatch")
    return {name.removeprefix("module."): value for name, value in state.items()}
