"""cluster.yaml is what Ray's own launcher accepts, and gives nothing away."""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pipeline

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster.yaml"
WORKERS = ("reader", "gpu")
SECRETS = [
    r"AKIA[0-9A-Z]{16}",
    r"aws_(secret_)?access_key",
    r"-----BEGIN",
    r"RAY_AUTH_TOKEN=",
    r"\b[0-9a-f]{32,}\b",
    r"(?i)password",
]


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text()))


@pytest.fixture(scope="module")
def prepared(written: dict[str, Any]) -> dict[str, Any]:
    """The file as the launcher fills it with its defaults, which would bind 0.0.0.0."""
    from ray.autoscaler._private.util import prepare_config

    return dict(prepare_config(copy.deepcopy(written)))


def start_commands(config: dict[str, Any], role: str) -> list[str]:
    commands = config[f"{role}_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def all_commands(config: dict[str, Any]) -> list[str]:
    return [
        command for key, value in config.items() if key.endswith("_commands") for command in value
    ]


def test_ray_accepts_the_file(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)


@pytest.mark.parametrize(
    "broken",
    [
        {"cluster_nam": "reseg"},
        {"head_node_type": "haed"},
        {"max_workers": "24"},
        {"available_node_types": {"head": {"resources": {"CPU": 0}, "node_confg": {}}}},
    ],
)
def test_the_check_would_see_a_slip(prepared: dict[str, Any], broken: dict[str, Any]) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    with pytest.raises((ValidationError, ValueError)):
        validate_config({**prepared, **broken})


def test_every_start_asks_for_the_token(prepared: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        (command,) = start_commands(prepared, role)
        assert re.search(r"RAY_AUTH_MODE=token\b.*\bray start", command)
        assert "RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in command


def test_dashboard_is_on_loopback(prepared: dict[str, Any]) -> None:
    (command,) = start_commands(prepared, "head")
    assert re.findall(r"--dashboard-host[= ](\S+)", command) == ["127.0.0.1"]
    assert not any("0.0.0.0" in item for item in all_commands(prepared))
    assert not any("--ray-client-server-port" in item for item in all_commands(prepared))


def test_token_travels_as_a_file_that_only_its_owner_reads(prepared: dict[str, Any]) -> None:
    mounts = prepared["file_mounts"]
    assert mounts["~/.ray/auth_token"].startswith("~/")
    assert prepared["head_setup_commands"][0] == prepared["worker_setup_commands"][0]
    assert "chmod 600 ~/.ray/auth_token" in prepared["head_setup_commands"][0]
    for command in all_commands(prepared):
        assert not re.search(r"(cat|echo|printf|base64)\b[^|;&]*auth_token", command)
        assert "get-auth-token" not in command
    for node_type in prepared["available_node_types"].values():
        assert "UserData" not in node_type["node_config"]


def test_no_secret_is_in_the_file() -> None:
    for pattern in SECRETS:
        assert not re.search(pattern, FILE.read_text()), pattern


def test_head_is_given_no_work(prepared: dict[str, Any]) -> None:
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    (command,) = start_commands(prepared, "head")
    assert "--num-cpus=0" in command
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in command


def test_workers_come_and_go(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    assert set(types) == {"head", *WORKERS}
    for name in WORKERS:
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
        assert types[name]["resources"]["CPU"] > 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "GPU" not in types["reader"]["resources"]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert 0 < prepared["idle_timeout_minutes"] <= 15
    assert prepared["max_workers"] >= sum(types[name]["max_workers"] for name in WORKERS)


def test_nodes_are_closed_and_leave_nothing(prepared: dict[str, Any]) -> None:
    assert prepared["provider"]["use_internal_ips"] is True
    assert prepared["provider"]["cache_stopped_nodes"] is False
    for node_type in prepared["available_node_types"].values():
        node = node_type["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert node["SecurityGroupIds"], "Ray's own group opens port 22 to everybody"
        assert node["IamInstanceProfile"]["Name"]
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"] is disk["Ebs"]["DeleteOnTermination"] is True
    profiles = {
        name: item["node_config"]["IamInstanceProfile"]["Name"]
        for name, item in prepared["available_node_types"].items()
    }
    assert profiles["head"] not in {profiles[name] for name in WORKERS}


def test_object_store_fits_shared_memory_and_disk(prepared: dict[str, Any]) -> None:
    (command,) = start_commands(prepared, "worker")
    (store_bytes,) = map(int, re.findall(r"--object-store-memory=(\d+)", command))
    for name in WORKERS:
        node = prepared["available_node_types"][name]["node_config"]
        assert node["InstanceType"].endswith(".4xlarge"), "64 GiB, half of it /dev/shm"
        assert store_bytes < 32 * 2**30 * 0.9
        assert node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] * 2**30 > 5 * store_bytes


def test_versions_are_pinned(prepared: dict[str, Any]) -> None:
    wheel = f"reseg-{pipeline.__version__}-py3-none-any.whl"
    assert prepared["file_mounts"][f"~/{wheel}"] == f"dist/{wheel}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = (
        requirement
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == "ray"
    )
    for role in ("head", "worker"):
        commands = " ".join(prepared[f"{role}_setup_commands"])
        assert f"~/{wheel}" in commands
        (extras, version) = re.findall(r"ray\[([\w,]+)\]==([\d.]+)", commands)[0]
        assert set(extras.split(",")) == ray.extras
        assert ray.specifier.contains(version)
        installs = re.findall(r"uv pip install[^;&]*", commands)
        assert installs
        assert commands.count("--exclude-newer ") == len(re.findall("uv pip install", commands))
    assert SpecifierSet(project["requires-python"]).contains("3.12")
    assert "python3.12 -m venv" in " ".join(prepared["setup_commands"])
