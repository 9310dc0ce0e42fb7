import json
import tempfile
from pathlib import Path

import pytest
import torch

from pipeline.bundle import import_weights, load_bundle, load_model, save_bundle, verify_bundle
from pipeline.errors import BundleError
from pipeline.models.unet import UNet, UNetOptions, to_published
from pipeline.transforms import READY_RECIPES


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """A small random checkpoint in each published layout."""
    folder = tmp_path_factory.mktemp("weights")
    options = {
        "buda": UNetOptions(width=4),
        "milesial": UNetOptions(width=4, out_channels=2, concat="skip_first"),
        "article": UNetOptions(width=4, depth=5, up="nearest", bias=True),
    }
    for layout, chosen in options.items():
        torch.manual_seed(1)
        state = to_published(UNet(chosen).state_dict(), layout, chosen.depth)
        extra = {"mask_values": [0, 1]} if layout == "milesial" else {}
        torch.save({**state, **extra}, folder / f"{layout}.pth")
    return {layout: folder / f"{layout}.pth" for layout in options}


@pytest.mark.parametrize("layout", ["buda", "milesial", "article"])
def test_published_weights_become_a_bundle(published, tmp_path, layout):
    bundle = import_weights(layout, str(published[layout]), str(tmp_path / "b"))
    assert verify_bundle(bundle) > 1000
    assert load_bundle(str(tmp_path / "b")).digest == bundle.digest
    assert bundle.provenance["imported_from"] == layout
    with pytest.raises(BundleError, match="never overwritten"):
        import_weights(layout, str(published[layout]), str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("evil_legacy.pt", "UnsafePickle"),
        ("evil_plain.pkl", "UnsafePickle"),
        ("nan_weights.pt", "NonFiniteWeights"),
        ("wrong_shape.pt", "ArchitectureMismatch"),
    ],
)
def test_hostile_checkpoints_are_refused(nasty, tmp_path, name, expected):
    marker = Path(tempfile.gettempdir(), "NASTY_PT_EXECUTED")
    marker.unlink(missing_ok=True)
    with pytest.raises(BundleError) as caught:
        import_weights("buda", str(nasty / "checkpoints" / name), str(tmp_path / "b"))
    assert caught.value.error_class == expected
    assert not marker.exists()
    assert not (tmp_path / "b").exists()


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path(tempfile.gettempdir(), "RESEG_PT_EXECUTED"),))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    marker = Path(tempfile.gettempdir(), "RESEG_PT_EXECUTED")
    marker.unlink(missing_ok=True)
    torch.save({"encoder1.enc1conv1.weight": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(BundleError) as caught:
        import_weights("buda", str(tmp_path / "evil.pt"), str(tmp_path / "b"))
    assert caught.value.error_class == "UnsafePickle"
    assert not marker.exists()


def test_the_wrong_layout_names_key_and_shapes(published, tmp_path):
    state = torch.load(published["buda"], weights_only=True)
    state["decoder2.dec2conv1.weight"] = torch.zeros(7, 3, 3, 3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(BundleError, match=r"\[7, 3, 3, 3\], wanted \[8, 16, 3, 3\]"):
        import_weights("buda", str(tmp_path / "w.pt"), str(tmp_path / "b"))
    with pytest.raises(BundleError, match="not of the milesial layout"):
        import_weights("milesial", str(published["buda"]), str(tmp_path / "b"))
    with pytest.raises(BundleError, match="not a plain file of weights"):
        import_weights("buda", __file__, str(tmp_path / "b"))
    with pytest.raises(BundleError, match="is not a file"):
        import_weights("buda", str(tmp_path / "none.pt"), str(tmp_path / "b"))


def test_damage_to_a_bundle_is_found(published, tmp_path):
    folder = tmp_path / "b"
    bundle = import_weights("buda", str(published["buda"]), str(folder))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for position in (10, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        weights.write_bytes(bytes(damaged))
        with pytest.raises(BundleError, match="damaged or exchanged"):
            load_bundle(str(folder))
        with pytest.raises(BundleError, match="changed while"):
            load_model(bundle)
    weights.write_bytes(whole)
    description = json.loads((folder / "bundle.json").read_text())
    for change, words in (
        ({"labels": ["a", "b"]}, "1 output channels, but 2 labels"),
        ({"version": 9}, "not a bundle of version 1"),
        ({"architecture": {"name": "vnet", "options": {}}}, "unknown architecture 'vnet'"),
        ({"architecture": {"name": "unet", "options": {"with": 3}}}, "unknown key 'with'"),
        ({"recipe": {"postprocess": []}}, "the recipe cannot be used"),
        ({"labels": 3}, "damaged"),
    ):
        (folder / "bundle.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(BundleError, match=words):
            load_model(load_bundle(str(folder)))
    (folder / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        load_bundle(str(folder))
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(str(tmp_path / "none"))


def test_every_part_of_a_bundle_is_in_its_digest(published, tmp_path):
    bundle = import_weights("buda", str(published["buda"]), str(tmp_path / "b"))
    weights = (tmp_path / "b" / "model.safetensors").read_bytes()

    def digest(name, **changes):
        values = {
            "name": "n",
            "architecture": "unet",
            "options": dict(bundle.options),
            "labels": ["tumour"],
            "recipe": READY_RECIPES["buda-lgg"],
            "weights": weights,
            "provenance": {},
        }
        return save_bundle(str(tmp_path / name), **{**values, **changes}).digest

    digests = {
        digest("1"),
        digest("2", labels=["lesion"]),
        digest("3", recipe=READY_RECIPES["unit-range"]),
        digest("4", weights=weights[:-1] + bytes([weights[-1] ^ 1])),
        digest("5", scores={"dice": 1.0}),
    }
    assert len(digests) == 5


def test_the_shipped_bundle_is_small_and_whole(demo_bundle):
    assert verify_bundle(load_bundle(demo_bundle)) < 250_000
    assert sum(p.stat().st_size for p in Path(demo_bundle).iterdir()) < 1 << 20
