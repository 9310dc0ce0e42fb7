import subprocess
import sys

import pytest

from pipeline.config import SegmentConfig, load_config, output_digest
from pipeline.errors import ConfigError
from pipeline.policy import NightlyConfig


def test_precedence_is_file_then_set_then_options(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("max_bad_share = 0.1\n[inference]\nwindow = 64\nbatch_size = 2\n")
    config = load_config(
        SegmentConfig,
        path,
        ["inference.batch_size=3", "inference.dtype=bf16"],
        {"inference.window": 128},
    )
    assert config.max_bad_share == 0.1
    assert config.inference.batch_size == 3
    assert config.inference.dtype == "bf16"
    assert config.inference.window == 128


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("inference.batchsize=3", "batchsize.*known are.*batch_size"),
        ("inference.batch_size='3'", "inference.batch_size = '3' is of type str, not int"),
        ("inference.batch_size=true", "is of type bool, not int"),
        ("inference.dtype=fp16", "not one of 'fp32', 'bf16'"),
        ("inference.batch_size=0", "at least 1, not 0"),
        ("inference=3", "inference is a table, not 3"),
        ("max_bad_share=1.5", "between 0 and 1, not 1.5"),
        ("nonsense", "not of the form"),
        ("source.spacing_mm=[1.0, 'a']", r"spacing_mm\[1\] = 'a'"),
        ("limits.max_pixels=-1", "above 0"),
        ("source.mask_values='255:1'", "not of the form 0=0,255=1"),
        ("source.spacing_mm=[1.0]", "in mm, not"),
        ("resources.nodes_like={'bad key!' = 'v'}", "is no label of a node"),
        ("resources.nodes_like={key = '!spot'}", "is no label of a node"),
    ],
)
def test_wrong_values_are_named(assignment, words):
    with pytest.raises(ConfigError, match=words):
        load_config(SegmentConfig, None, [assignment])


def test_broken_file_is_named(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("a = [")
    with pytest.raises(ConfigError, match="c.toml is not valid TOML"):
        load_config(SegmentConfig, path)
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(SegmentConfig, tmp_path / "none.toml")


def test_only_what_reaches_a_mask_is_in_the_digest():
    def digest(*assignments):
        return output_digest(load_config(SegmentConfig, None, assignments))

    same = [
        "inference.batch_size=1",
        "resources.actors=3",
        "max_bad_share=1.0",
        "inference.threads=2",
    ]
    assert {digest(a) for a in same} == {digest()}
    other = ["inference.dtype=bf16", "source.mask_values='0=1,255=0'", "inference.tta=true"]
    assert len({digest(), *(digest(a) for a in other)}) == 4


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import pipeline; "
        "assert time.perf_counter() - t < 0.3; "
        "assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_planning_needs_neither_torch_nor_ray():
    code = (
        "import sys, pipeline.planning, pipeline.lookup, pipeline.sharding; "
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_documented_defaults_are_the_defaults():
    from pathlib import Path

    import pipeline

    folder = Path(pipeline.__file__).parent / "defaults"
    assert load_config(SegmentConfig, folder / "segment.toml") == SegmentConfig()
    assert load_config(NightlyConfig, folder / "nightly.toml") == NightlyConfig()
