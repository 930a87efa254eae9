"""NetworkPolicies as rules of iptables inside the network namespace of each pod, for networks of tests.

It says no at once instead of keeping silent as plugins do, so that a test knows a refusal from a slow machine. IPv4
only, and ports by number only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from policy_evaluator import FIELDS, Pod, Policies, Spec

_CHAINS = {"Ingress": ("INPUT", "-i", "-s"), "Egress": ("OUTPUT", "-o", "-d")}
"""Of a direction: the chain, how it names a device, and how it names the other end."""


def rules(policies: Policies, pod: Pod, everybody: Sequence[Pod]) -> str:
    """What `iptables-restore` reads in the network namespace of a pod. `everybody` includes its node."""
    lines = ["*filter"]
    for direction, (chain, device, other) in _CHAINS.items():
        applying = policies.applying(direction, pod)
        if not applying:
            continue
        lines += [
            f"-A {chain} {device} lo -j ACCEPT",
            f"-A {chain} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        ]
        lines += [f"-A {chain} {other} {each.address} -j ACCEPT" for each in everybody if _is_node_of(each, pod)]
        for policy in applying:
            for rule in policy["spec"].get(FIELDS[direction][1]) or ():
                lines += _of_rule(policies, policy, rule, direction, everybody, f"{chain[:2]}{len(lines)}")
        lines += [f"-A {chain} -p tcp -j REJECT --reject-with tcp-reset", f"-A {chain} -j REJECT"]
    return "\n".join([*lines, "COMMIT", ""])


def _is_node_of(each: Pod, pod: Pod) -> bool:
    return not each.in_cluster and bool(each.node) and each.node == pod.node


def _of_rule(
    policies: Policies, policy: Spec, rule: Spec, direction: str, everybody: Sequence[Pod], name: str
) -> Iterator[str]:
    """The lines of one rule: a chain of its own with the ports, and jumps to it for each peer."""
    chain, _, other = _CHAINS[direction]
    yield f":{name} - [0:0]"
    yield from (f"-A {name} {port} -j ACCEPT" for port in _ports(rule))
    peers = rule.get(FIELDS[direction][0])
    if not peers:
        yield f"-A {chain} -j {name}"
    for number, peer in enumerate(peers or ()):
        if "ipBlock" not in peer:
            found = [
                p for p in everybody if p.in_cluster and policies.is_peer(peer, policy["metadata"]["namespace"], p)
            ]
            yield from (f"-A {chain} {other} {p.address} -j {name}" for p in found)
        elif ":" not in peer["ipBlock"]["cidr"]:
            block = f"{name}b{number}"
            yield f":{block} - [0:0]"
            yield from (f"-A {block} {other} {cidr} -j RETURN" for cidr in peer["ipBlock"].get("except") or ())
            yield f"-A {block} -j {name}"
            yield f"-A {chain} {other} {peer['ipBlock']['cidr']} -j {block}"


def _ports(rule: Spec) -> Iterator[str]:
    """How iptables says the ports of a rule; one empty text for all of them."""
    for port in rule.get("ports") or [None]:
        if port is None:
            yield ""
            continue
        protocol, number = port.get("protocol", "TCP").lower(), port.get("port")
        assert not isinstance(number, str), "ports by number only"
        yield f"-p {protocol}" + (f" --dport {number}:{port.get('endPort', number)}" if number else "")
