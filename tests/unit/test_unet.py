import json

import pytest
import torch
from torch.nn import functional

from pipeline.models import MODELS
from pipeline.models.unet import (
    LAYOUTS,
    UNet,
    UNetOptions,
    from_published,
    published_options,
    swap_decoder_halves,
    to_published,
    valid_output,
)

BUDA = UNetOptions(width=32)
MILESIAL = UNetOptions(width=64, out_channels=2, concat="skip_first")
BILINEAR = UNetOptions(
    width=64, out_channels=2, concat="skip_first", up="bilinear", hidden="half_input"
)
ARTICLE = UNetOptions(width=64, depth=5, up="nearest", bias=True)
RONNEBERGER = UNetOptions(
    in_channels=1, out_channels=2, width=64, norm=False, bias=True, valid=True
)


def with_(options, **changes):
    import dataclasses

    return dataclasses.replace(options, **changes)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (BUDA, 7_763_041),
        (MILESIAL, 31_037_698),
        (with_(MILESIAL, out_channels=1), 31_037_633),
        (BILINEAR, 17_263_042),
        (with_(BILINEAR, out_channels=1), 17_262_977),
        (ARTICLE, 53_515_649),
        (with_(ARTICLE, out_channels=2), 53_515_714),
        (with_(ARTICLE, in_channels=1, out_channels=2), 53_514_562),
        (RONNEBERGER, 31_030_658),
    ],
)
def test_parameter_counts_are_the_published_ones(options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(options).parameters()) == count


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("buda_3_1_32", "buda", BUDA),
        ("milesial_3_2_transposed", "milesial", MILESIAL),
        ("milesial_3_2_bilinear", "milesial", BILINEAR),
        ("article_fixed_3_1", "article", ARTICLE),
    ],
)
def test_state_dicts_are_the_published_ones(shared, name, layout, options):
    golden = json.loads(shared("reference", "goldens.json").read_text())[name]["state_dict"]
    with torch.device("meta"):
        state = to_published(UNet(options).state_dict(), layout, options.depth)
    assert {k: list(v.shape) for k, v in state.items()} == golden
    assert published_options(state, layout) == options
    assert set(from_published(state, layout, options.depth)) == set(
        UNet(with_(options, width=2)).state_dict()
    )


def plain_article(state, images):
    """The article's forward pass, written down operation by operation."""

    def block(name, x):
        for conv, norm in ((0, 1), (3, 4)):
            x = functional.conv2d(
                x, state[f"{name}.{conv}.weight"], state[f"{name}.{conv}.bias"], padding=1
            )
            n = f"{name}.{norm}."
            x = functional.batch_norm(
                x,
                state[n + "running_mean"],
                state[n + "running_var"],
                state[n + "weight"],
                state[n + "bias"],
            )
            x = functional.relu(x)
        return x

    features = [block("incoming", images)]
    for level in range(1, 6):
        features.append(block(f"down{level}.conv", functional.max_pool2d(features[-1], 2)))
    x = features.pop()
    for step in range(1, 6):
        up = functional.interpolate(x, scale_factor=2, mode="nearest")
        x = block(f"up{step}.conv", torch.cat([up, features.pop()], 1))
    return functional.conv2d(x, state["outcoming.weight"], state["outcoming.bias"])


def randomised(options, seed=0):
    torch.manual_seed(seed)
    model = UNet(options).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    for name, buffer in model.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
        elif "running_mean" in name:
            buffer.uniform_(-0.5, 0.5)
    return model


def test_article_network_computes_what_the_article_says():
    options = with_(ARTICLE, width=4)
    model = randomised(options)
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        expected = plain_article(to_published(model.state_dict(), "article", 5), images)
        assert torch.allclose(
            model(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )


def test_buda_weights_in_the_milesial_layout_need_the_swap():
    buda = randomised(with_(BUDA, width=8))
    milesial = UNet(with_(BUDA, width=8, concat="skip_first")).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = buda(images)
        milesial.load_state_dict(buda.state_dict())
        assert not torch.allclose(milesial(images), expected, atol=1e-2)
        milesial.load_state_dict(swap_decoder_halves(buda.state_dict()))
        swapped = milesial(images)
    assert torch.allclose(swapped, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(swapped > 0, expected > 0)


def test_the_2015_network_turns_572_into_388():
    assert valid_output(RONNEBERGER, 572) == 388
    model = UNet(with_(RONNEBERGER, width=2)).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_sizes_come_back_at_their_size(layout):
    options = {"buda": BUDA, "milesial": BILINEAR, "article": ARTICLE}[layout]
    model = UNet(with_(options, width=4)).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 65, 67)).shape[-2:] == (65, 67)


@pytest.mark.parametrize("name", list(MODELS))
def test_contract_of_every_architecture(name):
    entry = MODELS[name]
    options = entry.options()
    model = entry.build(options)
    inputs, outputs = entry.channels(options)
    logits = model(torch.rand(2, inputs, 48, 32))
    assert logits.shape == (2, outputs, 48, 32)
    logits.square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1
    )
    copy = entry.build(options)
    copy.load_state_dict(model.state_dict())
    images = torch.rand(1, inputs, 32, 32)
    with torch.inference_mode():
        assert torch.equal(copy.eval()(images), model.eval()(images))
