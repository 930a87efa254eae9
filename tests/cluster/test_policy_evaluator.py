"""The evaluator gives the answers that the documentation of NetworkPolicy gives for its own examples."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from policy_evaluator import Pod, Policies, Port, matches

NAMESPACES = {
    "default": {"kubernetes.io/metadata.name": "default"},
    "mine": {"project": "myproject", "user": "alice"},
    "other": {"user": "bob"},
}
DB = Pod("db", "10.8.0.1", "default", {"role": "db"}, node="n1", named_ports={"redis": ("TCP", 6379)})
FRONTEND = Pod("frontend", "10.8.0.2", "default", {"role": "frontend"}, node="n1")
CLIENT = Pod("client", "10.8.0.3", "mine", {"role": "client"}, node="n2")
MINE = Pod("mine", "10.8.0.4", "mine", node="n2")
STRANGER = Pod("stranger", "10.8.0.5", "other", {"role": "client"}, node="n2")
PODS = (DB, FRONTEND, CLIENT, MINE, STRANGER)
NODE = Pod("n1", "192.168.0.1", node="n1")
REDIS = Port("TCP", 6379)

EXAMPLE = """
metadata: {name: test-network-policy, namespace: default}
spec:
  podSelector: {matchLabels: {role: db}}
  policyTypes: [Ingress, Egress]
  ingress:
    - from:
        - ipBlock: {cidr: 172.17.0.0/16, except: [172.17.1.0/24]}
        - namespaceSelector: {matchLabels: {project: myproject}}
        - podSelector: {matchLabels: {role: frontend}}
      ports: [{protocol: TCP, port: 6379}]
  egress:
    - to: [{ipBlock: {cidr: 10.0.0.0/24}}]
      ports: [{protocol: TCP, port: 5978}]
"""


def policies(*texts: str, **options: Any) -> Policies:
    return Policies([yaml.safe_load(text) for text in texts], NAMESPACES, **options)


def of(spec: str) -> Policies:
    """The policies of a namespace with one, whose spec is given."""
    return Policies([{"metadata": {"name": "p", "namespace": "default"}, "spec": yaml.safe_load(spec)}], NAMESPACES)


def outside(address: str) -> Pod:
    return Pod(address, address)


def reaching(made: Policies, port: Port = REDIS, destination: Pod = DB) -> set[str]:
    return {p.name for p in PODS if p != destination and made.allow(p, destination, port)}


def test_the_documented_example_lets_in_whom_it_says_it_does():
    made = policies(EXAMPLE)
    assert reaching(made) == {"frontend", "client", "mine"}
    assert reaching(made, Port("TCP", 6380)) == set()
    assert reaching(made, Port("UDP", 6379)) == set()
    inside = {a: made.allow(outside(a), DB, REDIS) for a in ("172.17.0.9", "172.17.2.255", "172.17.1.1", "172.18.0.1")}
    assert list(inside.values()) == [True, True, False, False]


def test_the_documented_example_lets_out_to_its_network_and_port_alone():
    made = policies(EXAMPLE)
    assert made.allow(DB, outside("10.0.0.7"), Port("TCP", 5978))
    assert not made.allow(DB, outside("10.0.0.7"), Port("TCP", 5979))
    assert not made.allow(DB, outside("10.0.1.7"), Port("TCP", 5978))
    assert not made.allow(DB, FRONTEND, Port("TCP", 5978))
    assert made.allow(FRONTEND, CLIENT, Port("TCP", 1)), "nobody selects either"


@pytest.mark.parametrize(
    ("source", "who"),
    [
        ("[{namespaceSelector: {matchLabels: {user: alice}}, podSelector: {matchLabels: {role: client}}}]", {"client"}),
        (
            "[{namespaceSelector: {matchLabels: {user: alice}}}, {podSelector: {matchLabels: {role: client}}}]",
            {"client", "mine"},
        ),
        ("[{namespaceSelector: {}, podSelector: {matchLabels: {role: client}}}]", {"client", "stranger"}),
        ("[{namespaceSelector: {}}]", {"frontend", "client", "mine", "stranger"}),
        ("[{podSelector: {}}]", {"frontend"}),
        ("[{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: default}}}]", {"frontend"}),
        ("[]", {"frontend", "client", "mine", "stranger"}),
    ],
)
def test_selectors_in_one_entry_are_both_meant_and_entries_are_alternatives(source, who):
    assert reaching(of(f"{{podSelector: {{}}, ingress: [{{from: {source}}}]}}")) == who


@pytest.mark.parametrize(
    ("spec", "comes_in", "goes_out"),
    [
        ("{podSelector: {}, policyTypes: [Ingress]}", False, True),
        ("{podSelector: {}, ingress: [{}], policyTypes: [Ingress]}", True, True),
        ("{podSelector: {}, policyTypes: [Egress]}", True, False),
        ("{podSelector: {}, egress: [{}], policyTypes: [Egress]}", True, True),
        ("{podSelector: {}, policyTypes: [Ingress, Egress]}", False, False),
        ("{podSelector: {}}", False, True),
        ("{podSelector: {}, egress: [{to: [{podSelector: {}}]}]}", False, False),
        ("{podSelector: {matchLabels: {role: nobody}}, policyTypes: [Ingress, Egress]}", True, True),
    ],
    ids=["deny-in", "allow-in", "deny-out", "allow-out", "deny-all", "no-types", "types-by-egress", "selects-nobody"],
)
def test_default_policies_do_as_documented(spec, comes_in, goes_out):
    made = of(spec)
    assert (made.allow(CLIENT, DB, REDIS), made.allow(DB, CLIENT, REDIS)) == (comes_in, goes_out)


def test_both_ends_have_to_agree():
    closed = "{metadata: {namespace: mine}, spec: {podSelector: {}, policyTypes: [Egress]}}"
    assert policies(EXAMPLE).allow(CLIENT, DB, REDIS)
    assert not policies(EXAMPLE, closed).allow(CLIENT, DB, REDIS)


def test_policies_add_up_and_none_takes_away_what_another_gives():
    deny = "{metadata: {namespace: default}, spec: {podSelector: {}, policyTypes: [Ingress, Egress]}}"
    opened = "{metadata: {namespace: default}, spec: {podSelector: {matchLabels: {role: frontend}}, egress: [{}]}}"
    assert not policies(deny, EXAMPLE).allow(FRONTEND, DB, REDIS), "the frontend may not send"
    assert policies(deny, EXAMPLE, opened).allow(FRONTEND, DB, REDIS)


@pytest.mark.parametrize(
    ("ports", "allowed"),
    [
        ("[{protocol: TCP, port: 32000, endPort: 32768}]", {("TCP", 32000), ("TCP", 32768)}),
        ("[{port: 6379}]", {("TCP", 6379)}),
        ("[{port: redis}]", {("TCP", 6379)}),
        ("[{port: other}]", set()),
        ("[{protocol: UDP}]", {("UDP", 6379), ("UDP", 32000)}),
        ("[{protocol: UDP, port: 6379}, {port: 32769}]", {("UDP", 6379), ("TCP", 32769)}),
    ],
)
def test_ports_are_numbers_ranges_names_or_all_of_a_protocol(ports, allowed):
    made = of(f"{{podSelector: {{}}, ingress: [{{ports: {ports}}}]}}")
    tried = [("TCP", n) for n in (6379, 31999, 32000, 32768, 32769)] + [("UDP", 6379), ("UDP", 32000)]
    assert {each for each in tried if made.allow(CLIENT, DB, Port(*each))} == allowed


def test_whether_an_ip_block_holds_for_pods_is_for_the_caller_to_say():
    text = (
        "{metadata: {namespace: default}, spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.8.0.0/16}}]}]}}"
    )
    assert policies(text).allow(CLIENT, DB, REDIS)
    assert not policies(text, blocks_hold_for_pods=False).allow(CLIENT, DB, REDIS)
    assert policies(text, blocks_hold_for_pods=False).allow(outside("10.8.9.9"), DB, REDIS)
    assert not policies(text).allow(outside("2001:db8::1"), DB, REDIS)


def test_a_pod_reaches_itself_and_its_node_whatever_policies_say():
    made = of("{podSelector: {}, policyTypes: [Ingress, Egress]}")
    assert made.allow(DB, DB, REDIS)
    assert made.allow(NODE, DB, REDIS)
    assert made.allow(DB, NODE, REDIS)
    assert not made.allow(Pod("n2", "192.168.0.2", node="n2"), DB, REDIS)
    assert not made.allow(FRONTEND, DB, REDIS), "another pod of the node"


@pytest.mark.parametrize(
    ("expression", "selected"),
    [
        ("{key: role, operator: In, values: [db, x]}", {"db"}),
        ("{key: role, operator: NotIn, values: [db, client]}", {"frontend", "mine"}),
        ("{key: role, operator: Exists}", {"db", "frontend", "client", "stranger"}),
        ("{key: role, operator: DoesNotExist}", {"mine"}),
    ],
)
def test_expressions_of_selectors(expression, selected):
    selector = {"matchExpressions": [yaml.safe_load(expression)]}
    assert {p.name for p in PODS if matches(selector, p.labels)} == selected
