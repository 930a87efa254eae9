"""Pods that meet Pod Security *restricted* by construction. A job chooses among settings and writes no pod itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sonoforge_operator.api import PodSettings, PretrainRuntimeSpec
from sonoforge_trainer.contract import ENV_CONFIG, ENV_HASH_KEY_FILE, ENV_TERMINATION_LOG

Manifest = dict[str, Any]

CONFIG_FOLDER = "/etc/sonoforge/config"
"""Where a pod finds the job's ConfigMap."""
_CREDENTIALS, _CA, _HASH_KEY, _IDENTITY = (
    "/etc/sonoforge/credentials",
    "/etc/sonoforge/ca",
    "/etc/sonoforge/hash-key",
    "/etc/sonoforge/identity",
)
_REQUEST = "/etc/sonoforge/request"
REQUEST_FILE = f"{_REQUEST}/request.json"
"""Where a pod finds what it was asked."""
_TERMINATION_LOG = "/dev/termination-log"
_TOKEN_SECONDS = 3600


@dataclass(frozen=True)
class PodPlan:
    """What tells one kind of pod from another."""

    part: str
    """Name of the container."""
    command: tuple[str, ...]
    """What it runs."""
    settings: PodSettings
    """Where it runs."""
    grace_seconds: int = 30
    """Time to end after SIGTERM."""
    unreachable_seconds: int = 20
    """How long it stays on a node that the cluster holds for lost."""
    restart: str = "Never"
    """restartPolicy."""
    gpus: int = 0
    """GPUs."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Further environment: a text, or a `valueFrom`."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """Ports by name."""
    ready_path: str = ""
    """HTTP path, on the port `http`, that answers once the pod is of use."""
    storage: bool = True
    """Whether it gets the credentials of the storage."""
    request_annotation: str = ""
    """Annotation that becomes the file of the request."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Further labels that a node must have."""
    avoid_nodes: tuple[str, ...] = ()
    """Nodes to stay away from where that is possible."""
    apart: Mapping[str, str] = field(default_factory=dict)
    """Labels of pods whose nodes are avoided where that is possible."""
    subdomain: str = ""
    """Headless Service that gives the pod its name."""


def pod_template(
    plan: PodPlan, runtime: PretrainRuntimeSpec, image: str, base: str, labels: Mapping[str, str]
) -> Manifest:
    """A pod template. `base` names the ServiceAccount and the ConfigMap of the job."""
    mounts = _Mounts()
    mounts.empty("tmp", "/tmp")  # noqa: S108 - inside the container
    mounts.config("config", CONFIG_FOLDER, base)
    if plan.settings.shared_memory:
        mounts.empty("shared-memory", "/dev/shm", medium="Memory", sizeLimit=plan.settings.shared_memory)  # noqa: S108
    environment: dict[str, Any] = {
        "HOME": "/tmp",  # noqa: S108 - inside the container
        "PYTHONUNBUFFERED": "1",
        ENV_CONFIG: f"{CONFIG_FOLDER}/config.json",
        ENV_TERMINATION_LOG: _TERMINATION_LOG,
    }
    if plan.storage:
        environment |= _storage(runtime, mounts)
    if runtime.hash_key_secret:
        mounts.secret("hash-key", _HASH_KEY, runtime.hash_key_secret)
        environment[ENV_HASH_KEY_FILE] = f"{_HASH_KEY}/key"
    if plan.request_annotation:
        mounts.annotation("request", _REQUEST, plan.request_annotation, "request.json")
    container: Manifest = {
        "name": plan.part,
        "image": image,
        "imagePullPolicy": runtime.images.pull_policy,
        "command": [*plan.command],
        "env": [_variable(name, value) for name, value in (environment | dict(plan.environment)).items()],
        "resources": _resources(plan, runtime),
        "volumeMounts": mounts.mounts,
        "terminationMessagePath": _TERMINATION_LOG,
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    if plan.ports:
        container["ports"] = [{"name": n, "containerPort": p, "protocol": "TCP"} for n, p in plan.ports.items()]
    if plan.ready_path:
        container["readinessProbe"] = {
            "httpGet": {"path": plan.ready_path, "port": "http"},
            "periodSeconds": 1,  # workers that lost their coordinator find the new one once it is ready
            "timeoutSeconds": 2,
        }
    spec: Manifest = {
        "restartPolicy": plan.restart,
        "serviceAccountName": base,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": plan.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": runtime.user_id,
            "runAsGroup": runtime.group_id,
            "fsGroup": runtime.group_id,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": mounts.volumes,
        "tolerations": _tolerations(plan),
    }
    optional: Manifest = {
        "nodeSelector": {**plan.node_selector, **plan.settings.node_selector},
        "priorityClassName": plan.settings.priority_class_name,
        "runtimeClassName": plan.settings.runtime_class_name,
        "imagePullSecrets": [{"name": name} for name in runtime.images.pull_secrets],
        "affinity": _away_from(plan.avoid_nodes) | _apart_from(plan.apart),
        "subdomain": plan.subdomain,
    }
    spec |= {name: value for name, value in optional.items() if value}
    return {"metadata": {"labels": dict(labels)}, "spec": spec}


class _Mounts:
    """Volumes and where they are mounted."""

    def __init__(self) -> None:
        self.volumes: list[Manifest] = []
        self.mounts: list[Manifest] = []

    def empty(self, name: str, path: str, **settings: str) -> None:
        self._add(name, path, {"emptyDir": settings}, read_only=False)

    def config(self, name: str, path: str, config_map: str) -> None:
        self._add(name, path, {"configMap": {"name": config_map}})

    def secret(self, name: str, path: str, secret: str) -> None:
        self._add(name, path, {"secret": {"secretName": secret, "defaultMode": 0o440}})

    def annotation(self, name: str, path: str, annotation: str, file: str) -> None:
        item = {"path": file, "fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}}
        self._add(name, path, {"downwardAPI": {"items": [item]}})

    def token(self, name: str, path: str, audience: str) -> None:
        source = {"serviceAccountToken": {"path": "token", "audience": audience, "expirationSeconds": _TOKEN_SECONDS}}
        self._add(name, path, {"projected": {"sources": [source], "defaultMode": 0o440}})

    def _add(self, name: str, path: str, source: Manifest, *, read_only: bool = True) -> None:
        self.volumes.append({"name": name, **source})
        self.mounts.append({"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})})


def _variable(name: str, value: Any) -> Manifest:
    return {"name": name, "value": value} if isinstance(value, str) else {"name": name, "valueFrom": value}


def _storage(runtime: PretrainRuntimeSpec, mounts: _Mounts) -> dict[str, str]:
    """The environment that boto3 and our storage read."""
    storage = runtime.storage
    found = {
        "AWS_ENDPOINT_URL_S3": storage.endpoint_url,
        "AWS_REGION": storage.region,
        "SONOFORGE_S3_ADDRESSING": "path" if storage.path_style else "",
    }
    if storage.credentials_secret:
        mounts.secret("credentials", _CREDENTIALS, storage.credentials_secret)
        found["AWS_SHARED_CREDENTIALS_FILE"] = f"{_CREDENTIALS}/credentials"
    if storage.ca_bundle:
        mounts.config("ca", _CA, storage.ca_bundle)
        found["AWS_CA_BUNDLE"] = f"{_CA}/ca.crt"
    if storage.role_arn:
        mounts.token("identity", _IDENTITY, "sts.amazonaws.com")
        found |= {"AWS_ROLE_ARN": storage.role_arn, "AWS_WEB_IDENTITY_TOKEN_FILE": f"{_IDENTITY}/token"}
    return {name: value for name, value in found.items() if value}


def _resources(plan: PodPlan, runtime: PretrainRuntimeSpec) -> Manifest:
    requests, limits = dict(plan.settings.requests), dict(plan.settings.limits)
    if plan.gpus and runtime.accelerator.resource_name:
        limits[runtime.accelerator.resource_name] = str(plan.gpus)
        requests.pop(runtime.accelerator.resource_name, None)  # a GPU's request is its limit
    return {name: values for name, values in (("requests", requests), ("limits", limits)) if values}


def _tolerations(plan: PodPlan) -> list[Manifest]:
    """The settings', and a short patience with a node that cannot be reached: the run goes on elsewhere."""
    given = [
        {name: value for name, value in toleration.document().items() if value not in ("", None)}
        for toleration in plan.settings.tolerations
    ]
    # One for all keys is not meant for lost nodes, and of several the shortest holds.
    named = {t.get("key") for t in given if t.get("effect", "NoExecute") == "NoExecute"}
    return given + [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": plan.unreachable_seconds}
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
        if key not in named
    ]


def _away_from(nodes: tuple[str, ...]) -> Manifest:
    if not nodes:
        return {}
    expression = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": sorted(nodes)}
    preferred = {"weight": 100, "preference": {"matchExpressions": [expression]}}
    return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}}


def _apart_from(labels: Mapping[str, str]) -> Manifest:
    if not labels:
        return {}
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": dict(labels)}}
    preferred = {"weight": 100, "podAffinityTerm": term}
    return {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}}
