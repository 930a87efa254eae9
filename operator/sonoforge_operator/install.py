"""What a cluster needs for the operator to run: the Deployment, its rights, nothing more. `make generate` writes it.

Rights are the smallest set that works: no Secrets, no exec into pods, nothing of nodes, nothing outside the namespaces
that it serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from sonoforge_operator.api import GROUP

Manifest = dict[str, Any]

NAME = "sonoforge-operator"
"""Name of everything the installation makes."""
LABELS = {"app.kubernetes.io/name": NAME, "app.kubernetes.io/part-of": "sonoforge"}
_KEY_FOLDER = "/etc/sonoforge/key"
_USER = 65532
_PORT = 8080
_LOST_NODE_SECONDS = 30
_READ = ["get", "list", "watch"]
_MANAGE = [*_READ, "create", "patch", "delete"]
_KEEP = ["get", "list", "create", "patch"]

RULES: list[Manifest] = [
    {"apiGroups": [GROUP], "resources": ["pretrainjobs"], "verbs": [*_READ, "delete"]},
    {"apiGroups": [GROUP], "resources": ["pretrainjobs/status", "checkpoints/status"], "verbs": ["patch"]},
    {"apiGroups": [GROUP], "resources": ["pretrainruntimes", "evalsuites"], "verbs": _READ},
    {"apiGroups": [GROUP], "resources": ["checkpoints"], "verbs": [*_READ, "create", "patch"]},
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": _MANAGE},
    {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": _MANAGE},
    {"apiGroups": [""], "resources": ["pods"], "verbs": [*_READ, "delete"]},
    {"apiGroups": [""], "resources": ["configmaps", "services", "serviceaccounts"], "verbs": _KEEP},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": _KEEP},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["get", "create", "patch"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": _READ},
]
"""Rights of the operator in a namespace that it serves, and in its own."""
OWN_RULES: list[Manifest] = [
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "resourceNames": [NAME], "verbs": ["update"]},
]
"""Further rights in its own namespace: to hold its Lease, and no other."""


def install(*, cluster_wide: bool) -> Iterator[Manifest]:
    """The objects of an installation, for the namespace that they are applied to or for the whole cluster.

    A cluster-wide one lives in a namespace of its own, because its binding has to name it.
    """
    namespace = {"namespace": "sonoforge-system"} if cluster_wide else {}
    if cluster_wide:
        labels = {**LABELS, "pod-security.kubernetes.io/enforce": "restricted"}
        yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "sonoforge-system", "labels": labels}}
    yield _object("v1", "ServiceAccount", namespace, automountServiceAccountToken=False)
    kind = "ClusterRole" if cluster_wide else "Role"
    rules = RULES if cluster_wide else [*RULES, *OWN_RULES]
    yield _object("rbac.authorization.k8s.io/v1", kind, {}, rules=rules)
    yield _object(
        "rbac.authorization.k8s.io/v1",
        f"{kind}Binding",
        {},
        roleRef={"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": NAME},
        subjects=[{"kind": "ServiceAccount", "name": NAME, **namespace}],
    )
    if cluster_wide:
        yield _object("rbac.authorization.k8s.io/v1", "Role", namespace, rules=OWN_RULES)
        yield _object(
            "rbac.authorization.k8s.io/v1",
            "RoleBinding",
            namespace,
            roleRef={"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": NAME},
            subjects=[{"kind": "ServiceAccount", "name": NAME, **namespace}],
        )
    yield _object("networking.k8s.io/v1", "NetworkPolicy", namespace, spec=_network())
    yield _object("apps/v1", "Deployment", namespace, spec=_deployment(cluster_wide=cluster_wide))


def _object(api_version: str, kind: str, metadata: Manifest, **content: Any) -> Manifest:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": NAME, **metadata, "labels": LABELS},
        **content,
    }


def _network() -> Manifest:
    """Prometheus reads metrics; the API server, coordinators and DNS are called.

    Probes come from the node of the pod, which no policy stops. Where the API server answers is not known here.
    """
    return {
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": NAME}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [_pods({}, "prometheus")],
                "ports": [{"protocol": "TCP", "port": _PORT}],
            }
        ],
        "egress": [
            {"ports": [{"protocol": "TCP", "port": port} for port in (443, 6443)]},
            {
                "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}],
                "ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")],
            },
            {"to": [_pods({}, "sonoforge-coordinator")], "ports": [{"protocol": "TCP", "port": 8080}]},
        ],
    }


def _of_pod(name: str, field: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}


def _pods(namespaces: Manifest, name: str) -> Manifest:
    """The pods of an application, in namespaces with these labels."""
    return {"namespaceSelector": namespaces, "podSelector": {"matchLabels": {"app.kubernetes.io/name": name}}}


def _deployment(*, cluster_wide: bool) -> Manifest:
    release = version("sonoforge")
    probe = {"periodSeconds": 10, "timeoutSeconds": 5}
    container: Manifest = {
        "name": "operator",
        "image": f"sonoforge/operator:{release}",
        "args": [
            "operator",
            "--all-namespaces" if cluster_wide else "--namespace=$(POD_NAMESPACE)",
            f"--key-file={_KEY_FOLDER}/key",
            f"--image=sonoforge/trainer:{release}",
        ],
        "env": [_of_pod("POD_NAMESPACE", "metadata.namespace"), _of_pod("POD_UID", "metadata.uid")],
        "ports": [{"name": "http", "containerPort": _PORT}],
        "livenessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, **probe, "initialDelaySeconds": 30},
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": "http"}, **probe},
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "volumeMounts": [
            {"name": "key", "mountPath": _KEY_FOLDER, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - inside the container
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    return {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": {"app.kubernetes.io/name": NAME}},
        "template": {
            "metadata": {"labels": LABELS},
            "spec": {
                "serviceAccountName": NAME,
                "automountServiceAccountToken": True,
                "enableServiceLinks": False,
                "terminationGracePeriodSeconds": 15,
                # Kubernetes would leave it on a lost node for five minutes more.
                "tolerations": [
                    {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _LOST_NODE_SECONDS}
                    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
                ],
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": _USER,
                    "runAsGroup": _USER,
                    "fsGroup": _USER,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [container],
                "volumes": [
                    # Without it the operator draws a key, and needs a minute at every start to be let in again.
                    {"name": "key", "secret": {"secretName": NAME, "optional": True, "defaultMode": 0o440}},
                    {"name": "tmp", "emptyDir": {}},
                ],
            },
        },
    }
