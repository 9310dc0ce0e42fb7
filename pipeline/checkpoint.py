"""Checkpoints of a training: tensors and plain values, no pickle, verified before they are used.

A checkpoint is three files in `checkpoints/`: `NAME.safetensors` (tensors), `NAME.json` (everything
else, and the digest of the tensors) and, written last, `NAME.digest` (of the JSON). Each is
written under a temporary name. Without all three in agreement the checkpoint does not exist.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline import storage
from pipeline.records import sha256_hex

_TENSORS, _VALUES, _DIGEST = ".safetensors", ".json", ".digest"
_DAMAGED = ".damaged"
FOLDER = "checkpoints"

Warn = Callable[[str], None]
State = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""(plain values, tensors)"""


class DamagedCheckpoint(Exception):
    """A checkpoint whose files do not agree; never used, and said aloud."""


def step_name(step: int) -> str:
    """Name of the checkpoint after `step` updates; names sort by step."""
    return f"step-{step:010d}"


def best_name(step: int) -> str:
    """Name of the weights that were the best after `step` updates."""
    return f"best-{step:010d}"


def save(
    out: str, name: str, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a checkpoint and read it back. Raises DamagedCheckpoint if the store lost a bit.

    An older checkpoint of the same name is first made invalid, then replaced.
    """
    uri = storage.join(out, FOLDER, name)
    data = save_tensors({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    text = json.dumps({**values, "tensors_sha256": sha256_hex(data)}, sort_keys=True).encode()
    storage.remove(uri + _DIGEST)
    storage.write(uri + _TENSORS, data)
    storage.write(uri + _VALUES, text)
    _check(uri, text, sha256_hex(text))
    storage.write(uri + _DIGEST, sha256_hex(text).encode())


def load(out: str, name: str) -> State:
    """A verified checkpoint. Raises DamagedCheckpoint."""
    uri = storage.join(out, FOLDER, name)
    try:
        text = storage.read(uri + _VALUES)
        digest = storage.read(uri + _DIGEST).decode(errors="replace")
        data = _check(uri, text, digest)
        values: dict[str, Any] = json.loads(text)
        return values, load_tensors(data)
    except (OSError, ValueError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DamagedCheckpoint(f"checkpoint {name} cannot be read ({reason})") from None


def _check(uri: str, text: bytes, digest: str) -> bytes:
    """The bytes of the tensors, if all files agree."""
    name = uri.rpartition("/")[2]
    if sha256_hex(text) != digest:
        raise DamagedCheckpoint(
            f"checkpoint {name} is damaged: its {_VALUES} is not what was written"
        )
    data = storage.read(uri + _TENSORS)
    if sha256_hex(data) != json.loads(text)["tensors_sha256"]:
        raise DamagedCheckpoint(
            f"checkpoint {name} is damaged: its {_TENSORS} is not what was written"
        )
    return data


def load_latest(out: str, warn: Warn) -> State | None:
    """The newest checkpoint that holds, or None; each damaged newer one is warned about."""
    found = names(out, "step-")
    while found:
        try:
            return load(out, found.pop())
        except DamagedCheckpoint as error:
            what = "the one before it is used" if found else "training starts from the beginning"
            warn(f"{error}; {what}")
    return None


def set_aside_after(out: str, step: int) -> None:
    """Stop counting the checkpoints of later updates, which were found damaged; delete nothing.

    Else they would be taken for the newest ones when old ones are pruned.
    """
    for name in names(out, "step-"):
        if name > step_name(step):
            uri = storage.join(out, FOLDER, name)
            storage.write(uri + _DAMAGED, storage.read(uri + _DIGEST))
            storage.remove(uri + _DIGEST)


def names(out: str, prefix: str) -> list[str]:
    """Names of the finished checkpoints that start with `prefix`, oldest first."""
    uri = storage.join(out, FOLDER)
    if storage.is_empty(uri):
        return []
    found = [
        info.path.removesuffix(_DIGEST)
        for info in storage.list_files(uri)
        if info.path.endswith(_DIGEST)
    ]
    return sorted(name for name in found if name.startswith(prefix))


def prune(out: str, keep: int = 2) -> None:
    """Remove all but the newest `keep` checkpoints, and best weights that none of them names."""
    steps = names(out, "step-")
    kept = steps[-keep:]
    wanted = set(kept)
    for name in kept:
        try:
            best = load_values(out, name).get("best")
        except (OSError, ValueError):
            return
        if best:
            wanted.add(best["name"])
    for name in (*steps, *names(out, "best-")):
        if name not in wanted:
            for file in (_DIGEST, _TENSORS, _VALUES):  # the digest first: it is what makes it valid
                storage.remove(storage.join(out, FOLDER, name + file))


def load_values(out: str, name: str) -> dict[str, Any]:
    """The plain values alone, unverified. Raises OSError or ValueError."""
    values: dict[str, Any] = json.loads(storage.read(storage.join(out, FOLDER, name + _VALUES)))
    return values
