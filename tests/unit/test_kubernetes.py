"""Manifests hold only fields that KubeRay's CRDs and core/v1 define, and give nothing away."""

import re
import subprocess
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.kubernetes import ClusterShape, render

IMAGE = "registry.example/reseg:0.1.0"
ARGV = ["segment", "s3://archive/in", "s3://archive/out", "--bundle", "s3://archive/bundle"]

# Fields of ray.io/v1 as in KubeRay 1.6 (docs/reference/api.md of ray-project/kuberay; timeZone as
# in the CRD reference of 1.6.2). A dict: the fields of the object below; None: any value.
AMOUNTS = None
SECURITY = dict.fromkeys(["allowPrivilegeEscalation", "readOnlyRootFilesystem", "runAsUser"]) | {
    "capabilities": dict.fromkeys(["add", "drop"])
}
POD_TEMPLATE: dict[str, Any] = {  # core/v1, as far as it is used
    "metadata": None,
    "spec": {
        "serviceAccountName": None,
        "automountServiceAccountToken": None,
        "restartPolicy": None,
        "nodeSelector": None,
        "tolerations": dict.fromkeys(["key", "operator", "value", "effect", "tolerationSeconds"]),
        "securityContext": dict.fromkeys(
            ["runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "supplementalGroups"]
        )
        | {"seccompProfile": dict.fromkeys(["type", "localhostProfile"])},
        "containers": {
            "name": None,
            "image": None,
            "resources": {"requests": AMOUNTS, "limits": AMOUNTS},
            "securityContext": SECURITY,
            "ports": dict.fromkeys(["name", "containerPort", "protocol"]),
            "volumeMounts": dict.fromkeys(["name", "mountPath", "readOnly", "subPath"]),
        },
        "volumes": {"name": None, "emptyDir": dict.fromkeys(["medium", "sizeLimit"])},
    },
}
WORKER_GROUP = dict.fromkeys(
    [
        *("suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds"),
        *("resources", "labels", "rayStartParams", "numOfHosts"),
    ]
) | {"template": POD_TEMPLATE, "scaleStrategy": {"workersToDelete": None}}
HEAD_GROUP = dict.fromkeys(
    ["headService", "enableIngress", "resources", "labels", "rayStartParams", "serviceType"]
) | {"template": POD_TEMPLATE}
AUTOSCALER = dict.fromkeys(
    [
        *("resources", "image", "imagePullPolicy", "idleTimeoutSeconds", "upscalingMode"),
        *("version", "env", "envFrom", "volumeMounts", "command", "args"),
    ]
) | {"securityContext": SECURITY}
RAY_CLUSTER = dict.fromkeys(
    [
        *("upgradeStrategy", "suspend", "managedBy", "headServiceAnnotations"),
        *("enableInTreeAutoscaling", "gcsFaultToleranceOptions", "rayVersion"),
    ]
) | {
    "authOptions": dict.fromkeys(["enableK8sTokenAuth", "secretName", "mode"]),
    "autoscalerOptions": AUTOSCALER,
    "headGroupSpec": HEAD_GROUP,
    "workerGroupSpecs": WORKER_GROUP,
}
RAY_JOB = dict.fromkeys(
    [
        *("activeDeadlineSeconds", "backoffLimit", "metadata", "clusterSelector", "managedBy"),
        *("deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode"),
        *("entrypointResources", "entrypointNumCpus", "entrypointNumGpus"),
        *("ttlSecondsAfterFinished", "preRunningDeadlineSeconds", "shutdownAfterJobFinishes"),
        "suspend",
    ]
) | {
    "rayClusterSpec": RAY_CLUSTER,
    "submitterPodTemplate": POD_TEMPLATE,
    "submitterConfig": {"backoffLimit": None},
}
RAY_CRON_JOB = {"schedule": None, "timeZone": None, "suspend": None, "jobTemplate": RAY_JOB}
SPECS = {"RayJob": RAY_JOB, "RayCronJob": RAY_CRON_JOB}
TOP = {
    "apiVersion": None,
    "kind": None,
    "metadata": {"name": None, "namespace": None, "labels": None, "annotations": None},
}


def unknown_fields(value: Any, known: Mapping[str, Any] | None, path: str = "") -> list[str]:
    if known is None:
        return []
    if isinstance(value, list):
        return [found for item in value for found in unknown_fields(item, known, path)]
    wrong = [f"{path}.{name}" for name in value if name not in known]
    for name in value.keys() & known.keys():
        wrong += unknown_fields(value[name], known[name], f"{path}.{name}")
    return wrong


def manifest(**options: Any) -> dict[str, Any]:
    defaults = {"run_id": "night-1", "image": IMAGE, "num_gpus": 4, "ray_version": "2.60.0"}
    return dict(yaml.safe_load(render(ARGV, **(defaults | options))))


def cluster_of(found: dict[str, Any]) -> dict[str, Any]:
    job = found["spec"].get("jobTemplate", found["spec"])
    return dict(job["rayClusterSpec"])


def pods_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    job = found["spec"].get("jobTemplate", found["spec"])
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("schedule", [None, "0 2 * * *"])
@pytest.mark.parametrize(
    "shape",
    [
        ClusterShape(),
        ClusterShape(
            token_secret="ray-token", node_selector={"karpenter.sh/capacity-type": "spot"}
        ),
    ],
)
def test_only_fields_that_the_crds_define(schedule: str | None, shape: ClusterShape) -> None:
    found = manifest(schedule=schedule, shape=shape, namespace="imaging")
    assert found["apiVersion"] == "ray.io/v1"
    assert found["kind"] == ("RayJob" if schedule is None else "RayCronJob")
    assert unknown_fields(found, {**TOP, "spec": SPECS[found["kind"]]}) == []


def test_the_table_would_see_a_slip() -> None:
    found = manifest()
    group = cluster_of(found)["workerGroupSpecs"][0]
    group["minReplica"] = group.pop("minReplicas")
    group["template"]["spec"]["volumes"][0]["emptydir"] = {}
    assert unknown_fields(found, {**TOP, "spec": RAY_JOB}) == [
        ".spec.rayClusterSpec.workerGroupSpecs.minReplica",
        ".spec.rayClusterSpec.workerGroupSpecs.template.spec.volumes.emptydir",
    ]


def test_command_comes_back_word_for_word() -> None:
    odd = ["segment", "s3://a/it's $HOME; rm -rf x", "out: #1", "--images", "{case}/`x` \n\t&& *"]
    text = render(odd, run_id="r", image=IMAGE, num_gpus=1)
    spec = yaml.safe_load(text)["spec"]
    assert spec["submissionMode"] == "HTTPMode", "one shell, not two"
    command = spec["entrypoint"].replace("python -m", "printf '%s\\0'", 1)
    shell = ["/bin/bash", "-c", command]
    told = subprocess.run(
        shell, env={"RAY_ADDRESS": "10.0.0.1:6379"}, capture_output=True, check=True
    )
    *words, end = told.stdout.decode().split("\0")
    assert end == ""
    assert words == ["jobs.segment", *odd[1:], "--run-id", "r", "--address", "10.0.0.1:6379"]


def test_commands_that_compute_are_told_the_address() -> None:
    from jobs.cli import COMMANDS

    for name in COMMANDS:
        command = import_module(f"jobs.{name}").command
        text = render([name, "x"], run_id=None, image=IMAGE, num_gpus=1)
        told = '--address "$RAY_ADDRESS"' in yaml.safe_load(text)["spec"]["entrypoint"]
        takes = any(parameter.name == "address" for parameter in command.params)
        assert told == takes or name in ("doctor", "submit", "jobs"), name


def test_each_night_is_a_run_of_its_own() -> None:
    found = manifest(schedule="0  2 * * *", time_zone="Europe/Berlin")
    assert found["spec"]["schedule"] == "0 2 * * *"
    assert found["spec"]["timeZone"] == "Europe/Berlin"
    assert "--run-id" not in found["spec"]["jobTemplate"]["entrypoint"]
    assert "jobId" not in found["spec"]["jobTemplate"]
    assert "night-1" not in str(found)
    assert found["spec"]["jobTemplate"]["activeDeadlineSeconds"] < 24 * 3600


def test_a_schedule_applied_again_is_the_same_object() -> None:
    first, again = (manifest(run_id=f"run-{n}", schedule="0 2 * * *") for n in range(2))
    assert first == again
    other = yaml.safe_load(
        render([*ARGV, "--limit", "3"], run_id=None, image=IMAGE, num_gpus=4, schedule="0 2 * * *")
    )
    assert re.fullmatch("reseg-segment-[0-9a-f]{8}", first["metadata"]["name"])
    assert other["metadata"]["name"] != first["metadata"]["name"]


@pytest.mark.parametrize(("schedule", "limit"), [(None, 47), ("0 2 * * *", 36)])
@pytest.mark.parametrize(
    "run_id", ["2026-11-23T02:00:00+01:00", "Nacht_7", "a" * 128, "...", "-x-", "ÄÖ", "7"]
)
def test_names_are_dns_labels(run_id: str, schedule: str | None, limit: int) -> None:
    name = manifest(run_id=run_id, schedule=schedule)["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= limit


def test_ids_that_become_alike_have_names_of_their_own() -> None:
    ids = ["night-1", "Night-1", "night_1", "night.1", "x" * 60, "x" * 61]
    names = [manifest(run_id=run_id)["metadata"]["name"] for run_id in ids]
    assert len(set(names)) == len(names)
    assert names[0] == "reseg-night-1"
    assert manifest(run_id="Night-1")["metadata"]["annotations"] == {"reseg/run-id": "Night-1"}


def test_no_run_id_and_no_gpus() -> None:
    found = manifest(run_id=None, num_gpus=0)
    assert "--run-id" not in found["spec"]["entrypoint"]
    assert [g["groupName"] for g in cluster_of(found)["workerGroupSpecs"]] == ["readers"]


def test_head_is_given_no_work_and_workers_come_and_go() -> None:
    cluster = cluster_of(manifest(num_gpus=7))
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["enableInTreeAutoscaling"] is True
    readers, gpus = cluster["workerGroupSpecs"]
    assert (gpus["minReplicas"], gpus["replicas"], gpus["maxReplicas"]) == (0, 0, 7)
    assert readers["minReplicas"] == 0 < readers["maxReplicas"]
    (container,) = gpus["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in str(readers)


def test_a_finished_job_leaves_no_cluster_and_a_failed_one_is_tried_again() -> None:
    spec = manifest()["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["backoffLimit"] == 2


def test_token_is_asked_for_and_never_written() -> None:
    made = cluster_of(manifest())
    assert made["authOptions"] == {"mode": "token"}
    assert tuple(map(int, made["rayVersion"].split("."))) >= (2, 52, 0), "KubeRay asks for it"
    named = cluster_of(manifest(shape=ClusterShape(token_secret="ray-token")))
    assert named["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    text = render(ARGV, run_id="r", image=IMAGE, num_gpus=1)
    assert not re.search(r"AWS_|ACCESS_KEY|RAY_AUTH_TOKEN|env:", text)


def test_pods_are_closed() -> None:
    head, *workers = pods_of(manifest())
    for pod in (head, *workers):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["restartPolicy"] == "Never", "the autoscaler allows nothing else"
        for container in pod["containers"]:
            assert container["image"] == IMAGE
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["serviceAccountName"] == "reseg"
    for pod in workers:
        assert pod["automountServiceAccountToken"] is False
    assert "automountServiceAccountToken" not in head, "the autoscaler beside it asks Kubernetes"


def test_object_store_fits_shared_memory() -> None:
    cluster = cluster_of(manifest())
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        shared = volumes[mounts["/dev/shm"]]
        store_bytes = int(group["rayStartParams"]["object-store-memory"])
        memory_gib = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
        assert shared["medium"] == "Memory"
        assert store_bytes < int(shared["sizeLimit"].removesuffix("Gi")) * 2**30
        assert int(shared["sizeLimit"].removesuffix("Gi")) < memory_gib / 2
        assert mounts["/tmp/ray"] == "ray-logs", "the autoscaler's container mounts that name"


def test_spot_nodes_are_chosen_for_gpus_only() -> None:
    selector = {"karpenter.sh/capacity-type": "spot"}
    head, readers, gpus = pods_of(manifest(shape=ClusterShape(node_selector=selector)))
    assert gpus["nodeSelector"] == selector
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpus[
        "tolerations"
    ]
    assert "nodeSelector" not in head
    assert "nodeSelector" not in readers


@pytest.mark.parametrize(
    ("argv", "options", "message"),
    [
        ([], {}, "not a command"),
        (["se gment"], {}, "not a command"),
        ([*ARGV, "--run-id=x"], {}, "--run-id is set by"),
        ([*ARGV, "--address", "auto"], {}, "--address is set by"),
        ([*ARGV, "--secret-access-key", "x"], {}, "looks like a secret"),
        (ARGV, {"image": "reseg"}, "no fixed version"),
        (ARGV, {"image": "host:5000/reseg"}, "no fixed version"),
        (ARGV, {"image": "reseg:latest"}, "no fixed version"),
        (ARGV, {"num_gpus": -1}, "negative"),
        (ARGV, {"schedule": "2am"}, "five cron fields"),
        (ARGV, {"schedule": "CRON_TZ=UTC 0 2 * * *"}, "five cron fields"),
        (ARGV, {"schedule": "0 2 * * *", "time_zone": "Mars/Olympus"}, "not a time zone"),
        (ARGV, {"num_gpus": 0, "shape": ClusterShape(max_readers=0)}, "nothing could run"),
    ],
)
def test_wrong_requests_are_refused(argv: list[str], options: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"run_id": "r", "image": IMAGE, "num_gpus": 1}
    with pytest.raises(ConfigError, match=re.escape(message)):
        render(argv, **(defaults | options))


def test_the_job_gets_its_variables():
    told = yaml.safe_load(
        render(
            ARGV,
            run_id="r",
            image=IMAGE,
            num_gpus=1,
            environment={"AWS_ENDPOINT_URL": "https://store: 'x'"},
        )
    )
    variables = yaml.safe_load(told["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables == {"AWS_ENDPOINT_URL": "https://store: 'x'"}


@pytest.mark.parametrize(
    "schedule", ["99 2 * * *", "0 24 * * *", "0 2 32 * *", "0 2 * 13 *", "0 2 * * 8", "* * * *"]
)
def test_a_time_that_never_comes_is_refused(schedule):
    with pytest.raises(ConfigError, match="five cron fields"):
        render(ARGV, run_id=None, image=IMAGE, num_gpus=1, schedule=schedule)


@pytest.mark.parametrize("schedule", ["0 2 * * *", "*/90 0-23/2 1,31 1-12 7", "@daily"])
def test_a_time_that_comes_is_taken(schedule):
    text = render(ARGV, run_id=None, image=IMAGE, num_gpus=1, schedule=schedule)
    assert yaml.safe_load(text)["spec"]["schedule"] == schedule
