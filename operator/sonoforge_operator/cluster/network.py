"""NetworkPolicies of a job: what its pods need, and nothing else in either direction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sonoforge_operator.api import Network
from sonoforge_operator.cluster.names import LABEL_NAME, LABEL_PART, LABEL_UID, Names

_OPERATOR = "sonoforge-operator"
_NAMESPACE_NAME = "kubernetes.io/metadata.name"
_ANYWHERE = (
    # Not the addresses of the node itself, where some clouds hand out its credentials to whoever asks.
    {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]},
    {"cidr": "::/0", "except": ["fd00:ec2::/32", "fe80::/10"]},
)

Spec = dict[str, Any]


def policies(
    names: Names, network: Network, operator_namespace: str, store_port: int, http_port: int
) -> Iterator[tuple[str, Spec]]:
    """The part that each policy is for, and its spec. None where the platform wants none.

    Workers reach each other, the coordinator's store, DNS and storage; the operator alone reaches the coordinator's
    HTTP port; evaluations and what looks after checkpoints reach DNS and storage. The store has no password, which is
    why nobody else may reach it.
    """
    if not network.policies:
        return
    workers, coordinator = _pods(names, "worker"), _pods(names, "coordinator")
    operator = {
        "namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: operator_namespace}},
        "podSelector": {"matchLabels": {LABEL_NAME: _OPERATOR}},
    }
    outside = [_dns(network), *_storage(network)]
    yield (
        "worker",
        _policy(
            names,
            ("worker",),
            ingress=[{"from": [workers]}],
            egress=[{"to": [workers]}, {"to": [coordinator], "ports": [_tcp(store_port)]}, *outside],
        ),
    )
    yield (
        "coordinator",
        _policy(
            names,
            ("coordinator",),
            ingress=[
                {"from": [workers], "ports": [_tcp(store_port)]},
                {"from": [operator], "ports": [_tcp(http_port)]},
            ],
            egress=[],
        ),
    )
    yield "evaluation", _policy(names, ("evaluation", "storage"), ingress=[], egress=outside)


def _policy(names: Names, parts: tuple[str, ...], *, ingress: list[Spec], egress: list[Spec]) -> Spec:
    of_parts = {"key": LABEL_PART, "operator": "In", "values": list(parts)}
    return {
        "podSelector": {"matchLabels": {LABEL_UID: names.uid}, "matchExpressions": [of_parts]},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    }


def _pods(names: Names, part: str) -> Spec:
    return {"podSelector": {"matchLabels": {LABEL_UID: names.uid, LABEL_PART: part}}}


def _tcp(port: int) -> Spec:
    return {"protocol": "TCP", "port": port}


def _dns(network: Network) -> Spec:
    namespace = {"namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: network.dns_namespace}}}
    return {"to": [namespace], "ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]}


def _storage(network: Network) -> list[Spec]:
    blocks = [{"cidr": cidr} for cidr in network.storage_cidrs] or _ANYWHERE
    return [{"to": [{"ipBlock": block} for block in blocks], "ports": [_tcp(port) for port in network.storage_ports]}]
