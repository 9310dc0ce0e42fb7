"""Manifests for KubeRay: one run as a `RayJob`, a run every night as a `RayCronJob`.

KubeRay starts a cluster for each job and takes it down again. The head is given no work; groups
of readers and of GPUs grow from nothing as the run asks for them. Field names are those of KubeRay
1.6 and newer. Nothing here talks to a cluster: the text is for `kubectl apply -f -`.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml

from pipeline import __version__
from pipeline.errors import ConfigError

_API = "ray.io/v1"
_MAX_JOB_NAME = 47
"""KubeRay appends 6 characters for the cluster and up to 10 for its services; 63 are allowed."""
_MAX_CRON_NAME = 36
"""Here it appends 11 more, for the job of each night."""
_ON_RAY = frozenset({"evaluate", "nightly", "segment", "shadow", "train"})
"""Commands that compute on a cluster, and take its address."""
_CRON_FIELD = re.compile(r"[\dA-Za-z*/,\-?]+")
_SECRET_OPTION = re.compile(r"(?i)(password|passwd|secret|token|credential|access_?key)")
_USER = 1000
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShape:
    """How large a run's cluster may grow, and what each of its pods gets.

    service_account: one that may read the source and write the results (on AWS by IRSA); it must
    exist. token_secret: a Secret with the key `auth_token`; empty: KubeRay makes a token for each
    cluster. node_selector, tolerations: where GPU pods may run, for instance on spot nodes.
    """

    max_readers: int = 8
    reader_cpus: int = 8
    reader_memory_gib: int = 32
    gpu_cpus: int = 14
    gpu_memory_gib: int = 56
    head_cpus: int = 4
    head_memory_gib: int = 16
    object_store_share: float = 0.3
    spill_gib: int = 200
    idle_timeout_s: int = 300
    active_deadline_s: int = 20 * 3600
    keep_finished_s: int = 600
    retries: int = 2
    service_account: str = "reseg"
    token_secret: str = ""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, str]] = (
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    )

    def __post_init__(self) -> None:
        for name in ("reader_cpus", "reader_memory_gib", "gpu_cpus", "gpu_memory_gib"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.object_store_share < 0.8:
            raise ConfigError(
                f"object_store_share {self.object_store_share} leaves the workers no memory; "
                "it is a share between 0 and 0.8"
            )


def render(
    argv: Sequence[str],
    *,
    run_id: str | None,
    image: str,
    num_gpus: int,
    ray_version: str | None = None,
    schedule: str | None = None,
    time_zone: str = "Etc/UTC",
    namespace: str | None = None,
    shape: ClusterShape | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """The YAML of one run, or with a schedule of one run every time that comes round.

    argv: the words after `reseg`, the command first, without `--run-id` and `--address`. run_id:
    the id of the run, None: reseg chooses one. With a schedule each night is a run of its own, so
    the id is left out, and the same command has the same name. image: holds Ray and this version of reseg. num_gpus: the
    most GPUs at a time, one a pod; 0: actors run on the readers. ray_version: of the image, None:
    the one installed here. schedule: five cron fields. environment: variables of the job, none of them
    secret. Raises ConfigError.
    """
    _check(argv, image, num_gpus)
    shape = shape or ClusterShape()
    entrypoint = _entrypoint(argv, run_id if schedule is None else None)
    spec = _job_spec(entrypoint, image, num_gpus, ray_version or version("ray"), shape)
    if environment:
        spec["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": dict(environment)})
    if schedule is None:
        kind, name = "RayJob", _dns_name(run_id or argv[0], _MAX_JOB_NAME)
    else:
        kind, name = (
            "RayCronJob",
            _dns_name(f"{argv[0]}-{_digest(shlex.join(argv))}", _MAX_CRON_NAME),
        )
        spec = {
            "schedule": _checked_schedule(schedule),
            "timeZone": _checked_time_zone(time_zone),
            "jobTemplate": spec,
        }
    labels = {"app.kubernetes.io/name": "reseg", "app.kubernetes.io/version": __version__}
    metadata: dict[str, Any] = {"name": name, "labels": labels}
    if run_id is not None and schedule is None:
        metadata["annotations"] = {"reseg/run-id": run_id}
    if namespace is not None:
        metadata["namespace"] = namespace
    manifest = {"apiVersion": _API, "kind": kind, "metadata": metadata, "spec": spec}
    text: str = yaml.safe_dump(manifest, sort_keys=False, width=100, allow_unicode=True)
    return _notes(kind, shape) + text


# What is refused


def _check(argv: Sequence[str], image: str, num_gpus: int) -> None:
    if not argv or not argv[0].isidentifier():
        raise ConfigError(f"{argv[0] if argv else ''!r} is not a command of reseg")
    for word in argv:
        name = word.partition("=")[0]
        if name in ("--run-id", "--address"):
            raise ConfigError(
                f"{name} is set by what is printed; give it to `reseg submit`, not to {argv[0]}"
            )
        if name.startswith("--") and _SECRET_OPTION.search(name):
            raise ConfigError(
                f"{name} looks like a secret, and a manifest is read by many; pods get theirs from "
                "the service account"
            )
    if not image or image.endswith(":latest") or not re.search(r":[\w.-]+$|@sha256:", image):
        raise ConfigError(
            f"--image {image!r} names no fixed version; give a tag such as "
            f"registry/reseg:{__version__}, or a digest"
        )
    if num_gpus < 0:
        raise ConfigError(f"--gpus cannot be negative, it is {num_gpus}")


def _checked_schedule(schedule: str) -> str:
    fields = schedule.split()
    if schedule.startswith("@"):
        return schedule
    fits = len(fields) == 5 and all(_CRON_FIELD.fullmatch(item) for item in fields)
    if not fits or not all(map(_in_range, fields, _CRON_RANGES)):
        raise ConfigError(
            f"--schedule {schedule!r} is not five cron fields (minute hour day month weekday), as "
            '"0 2 * * *" for each night at two'
        )
    return " ".join(fields)


_CRON_RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def _in_range(field_: str, limits: tuple[int, int]) -> bool:
    """Whether the numbers of a cron field are possible; a step (after a slash) only has a size."""
    numbers = [
        int(n) for part in field_.split(",") for n in re.findall(r"\d+", part.partition("/")[0])
    ]
    return all(limits[0] <= number <= limits[1] for number in numbers)


def _checked_time_zone(time_zone: str) -> str:
    try:
        ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(f"{time_zone!r} is not a time zone, as Europe/Berlin is") from None
    return time_zone


def _dns_name(stem: str, limit: int) -> str:
    """A DNS label that begins with a letter; ids that become alike stay apart by a digest."""
    label = f"reseg-{re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')}".rstrip("-")
    if label == f"reseg-{stem}" and len(label) <= limit:
        return label
    return f"{label[: limit - 9].rstrip('-')}-{_digest(stem)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# The parts of a manifest


def _entrypoint(argv: Sequence[str], run_id: str | None) -> str:
    """What the head's shell runs; Ray tells it the address, which nobody knows before."""
    words = ["python", "-m", f"jobs.{argv[0]}", *argv[1:]]
    if run_id is not None:
        words += ["--run-id", run_id]
    address = ' --address "$RAY_ADDRESS"' if argv[0] in _ON_RAY else ""
    return shlex.join(words) + address


def _job_spec(
    entrypoint: str, image: str, num_gpus: int, ray_version: str, shape: ClusterShape
) -> dict[str, Any]:
    """The spec of a RayJob, which is also the template of a RayCronJob."""
    auth = {"mode": "token"}
    if shape.token_secret:
        auth["secretName"] = shape.token_secret
    return {
        "entrypoint": entrypoint,
        "submissionMode": "HTTPMode",  # the other modes pass the words through a second shell
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": shape.keep_finished_s,
        "activeDeadlineSeconds": shape.active_deadline_s,
        "backoffLimit": shape.retries,
        "rayClusterSpec": {
            "rayVersion": ray_version,
            "authOptions": auth,
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "idleTimeoutSeconds": shape.idle_timeout_s,
                "upscalingMode": "Default",
                "securityContext": _container_security(),
            },
            "headGroupSpec": _head(image, shape),
            "workerGroupSpecs": _worker_groups(image, num_gpus, shape),
        },
    }


def _head(image: str, shape: ClusterShape) -> dict[str, Any]:
    memory = shape.head_memory_gib
    ports = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
    ]
    container = _ray_container("ray-head", image, shape.head_cpus, memory, ports=ports)
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": {"num-cpus": "0", **_object_store(memory, shape)},
        "template": _pod(container, shape, memory),
    }


def _worker_groups(image: str, num_gpus: int, shape: ClusterShape) -> list[dict[str, Any]]:
    groups = []
    if shape.max_readers:
        memory = shape.reader_memory_gib
        reader = _ray_container("ray-worker", image, shape.reader_cpus, memory)
        groups.append(_worker_group("readers", reader, shape.max_readers, memory, shape))
    if num_gpus:
        memory = shape.gpu_memory_gib
        worker = _ray_container("ray-worker", image, shape.gpu_cpus, memory, num_gpus=1)
        group = _worker_group("gpus", worker, num_gpus, memory, shape)
        pod = group["template"]["spec"]
        pod["tolerations"] = [dict(item) for item in shape.tolerations]
        if shape.node_selector:
            pod["nodeSelector"] = dict(shape.node_selector)
        groups.append(group)
    if not groups:
        raise ConfigError("no GPUs and no readers: nothing could run; set --gpus")
    return groups


def _worker_group(
    name: str, container: dict[str, Any], most: int, memory_gib: int, shape: ClusterShape
) -> dict[str, Any]:
    template = _pod(container, shape, memory_gib)
    template["spec"]["automountServiceAccountToken"] = False
    return {
        "groupName": name,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": most,
        "rayStartParams": _object_store(memory_gib, shape),
        "template": template,
    }


def _object_store(memory_gib: int, shape: ClusterShape) -> dict[str, str]:
    return {"object-store-memory": str(int(memory_gib * _GIB * shape.object_store_share))}


def _ray_container(
    name: str,
    image: str,
    cpus: int,
    memory_gib: int,
    *,
    num_gpus: int = 0,
    ports: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    if num_gpus:
        amounts["nvidia.com/gpu"] = str(num_gpus)
    container: dict[str, Any] = {
        "name": name,
        "image": image,
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "shared-mem", "mountPath": "/dev/shm"},
            {"name": "ray-logs", "mountPath": "/tmp/ray"},
        ],
    }
    if ports:
        container["ports"] = [dict(port) for port in ports]
    return container


def _pod(container: dict[str, Any], shape: ClusterShape, memory_gib: int) -> dict[str, Any]:
    """A pod with Ray's objects in /dev/shm, which counts as its memory; the rest in /tmp/ray."""
    shared_gib = int(memory_gib * shape.object_store_share) + 1
    return {
        "spec": {
            "serviceAccountName": shape.service_account,
            "securityContext": _pod_security(),
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": [
                {
                    "name": "shared-mem",
                    "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_gib}Gi"},
                },
                {"name": "ray-logs", "emptyDir": {"sizeLimit": f"{shape.spill_gib}Gi"}},
            ],
        }
    }


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "fsGroup": _USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _notes(kind: str, shape: ClusterShape) -> str:
    """What the person who applies the manifest must have ready."""
    token = (
        f"The Secret {shape.token_secret} holds Ray's token under the key auth_token."
        if shape.token_secret
        else "KubeRay makes a token for each cluster and hands it to its pods."
    )
    notes = [
        f"reseg {__version__}, for KubeRay 1.6 or newer.",
        f"The service account {shape.service_account} must exist, and may read the source and",
        "write the results (on AWS by IRSA). No keys are needed.",
        token,
        "It does not encrypt: a NetworkPolicy should keep other pods off ports 6379 and 8265.",
    ]
    if kind == "RayCronJob":
        notes += [
            "RayCronJob is alpha: the operator needs its feature gate, RayCronJob=true.",
            "It starts a night although the last one still runs; activeDeadlineSeconds, less than",
            "a day, keeps daily nights apart. A new one takes up what a killed one has done.",
        ]
    return "".join(f"# {line}\n" for line in notes)
