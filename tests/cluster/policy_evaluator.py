"""What NetworkPolicies mean, after the documentation of networking.k8s.io/v1 and of nothing else.

It knows the objects of the API and not one line of what makes them, so that it can prove what they let pass. Where the
API leaves something to the network plugin (whether an ipBlock also holds for the addresses of pods), the caller says
which of the two to assume.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Spec = Mapping[str, Any]

FIELDS = {"Ingress": ("from", "ingress"), "Egress": ("to", "egress")}
"""What a direction calls its peers and its rules."""


@dataclass(frozen=True)
class Pod:
    """A pod, or, without a namespace, an address outside the cluster or of a node."""

    name: str
    address: str
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    node: str = ""
    """The node it runs on; of a node, its own name."""
    named_ports: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Protocol and number of its containers' ports, by name."""

    @property
    def in_cluster(self) -> bool:
        """Whether it is a pod, to which policies and selectors apply."""
        return bool(self.namespace)


@dataclass(frozen=True)
class Port:
    """Where a connection goes to."""

    protocol: str
    number: int


@dataclass(frozen=True)
class Policies:
    """The NetworkPolicies of a cluster, and the labels of its namespaces."""

    objects: Sequence[Spec]
    namespaces: Mapping[str, Mapping[str, str]]
    blocks_hold_for_pods: bool = True
    """Whether an ipBlock selects a pod by its address. The API leaves that open."""

    def allow(self, source: Pod, destination: Pod, port: Port) -> bool:
        """Whether a connection can be made: the source may send it, and the destination may receive it."""
        if source == destination or self._on_its_node(source, destination):
            return True
        return self._one_way("Egress", source, destination, port) and self._one_way(
            "Ingress", destination, source, port
        )

    @staticmethod
    def _on_its_node(one: Pod, other: Pod) -> bool:
        """Traffic between a pod and the node where it runs is always allowed."""
        return one.in_cluster != other.in_cluster and bool(one.node) and one.node == other.node

    def _one_way(self, direction: str, subject: Pod, other: Pod, port: Port) -> bool:
        """Whether the policies that select the subject let one direction pass. Without any, all passes."""
        applying = self.applying(direction, subject)
        if not applying:
            return True
        peers, rules = FIELDS[direction]
        destination = other if direction == "Egress" else subject
        return any(
            self._some_peer(rule.get(peers), policy, other) and _some_port(rule.get("ports"), port, destination)
            for policy in applying
            for rule in policy["spec"].get(rules) or ()
        )

    def applying(self, direction: str, subject: Pod) -> list[Spec]:
        """The policies that isolate a pod in a direction."""
        return [p for p in self.objects if self._selects(p, subject) and direction in _types(p["spec"])]

    def _selects(self, policy: Spec, pod: Pod) -> bool:
        own = policy["metadata"]["namespace"]
        return pod.namespace == own and matches(policy["spec"].get("podSelector") or {}, pod.labels)

    def _some_peer(self, peers: Sequence[Spec] | None, policy: Spec, other: Pod) -> bool:
        """An empty or missing list is everybody, also outside the cluster."""
        return not peers or any(self.is_peer(peer, policy["metadata"]["namespace"], other) for peer in peers)

    def is_peer(self, peer: Spec, own_namespace: str, other: Pod) -> bool:
        """Whether one entry of `from` or `to`, in a policy of a namespace, means somebody."""
        if "ipBlock" in peer:
            assert len(peer) == 1, "an ipBlock stands alone"
            return (self.blocks_hold_for_pods or not other.in_cluster) and _in_block(peer["ipBlock"], other.address)
        if not other.in_cluster:
            return False
        if "namespaceSelector" in peer:
            if not matches(peer["namespaceSelector"], self.namespaces[other.namespace]):
                return False
        elif other.namespace != own_namespace:
            return False
        return matches(peer.get("podSelector") or {}, other.labels)


def matches(selector: Spec, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects; an empty one selects everything."""
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items()) and all(
        _holds(expression, labels) for expression in selector.get("matchExpressions") or ()
    )


def _holds(expression: Spec, labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or ()
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":  # holds also where the label is missing
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case other:
            raise ValueError(f"no operator of a label selector: {other}")


def _types(spec: Spec) -> Sequence[str]:
    """Where no types are given: Ingress always, Egress where there are rules for it."""
    return spec.get("policyTypes") or (("Ingress", "Egress") if spec.get("egress") else ("Ingress",))


def _in_block(block: Spec, address: str) -> bool:
    found = ipaddress.ip_address(address)
    return found in ipaddress.ip_network(block["cidr"]) and not any(
        found in ipaddress.ip_network(excepted) for excepted in block.get("except") or ()
    )


def _some_port(ports: Sequence[Spec] | None, wanted: Port, destination: Pod) -> bool:
    """An empty or missing list is every port."""
    return not ports or any(_is_port(port, wanted, destination) for port in ports)


def _is_port(port: Spec, wanted: Port, destination: Pod) -> bool:
    """A port without a number is every port of its protocol; a name is one of the destination's containers."""
    protocol, number = port.get("protocol", "TCP"), port.get("port")
    if isinstance(number, str):
        return destination.named_ports.get(number) == (wanted.protocol, wanted.number) and wanted.protocol == protocol
    if number is None:
        return bool(wanted.protocol == protocol)
    return bool(wanted.protocol == protocol and number <= wanted.number <= port.get("endPort", number))
