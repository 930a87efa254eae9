"""Who reaches whom: every pair of pods in both directions, by the policies that the operator and the chart really make.

The evaluator says what a network plugin has to do with them; no plugin is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from helm import Helm, Manifest, one
from policy_evaluator import Pod, Policies, Port
from test_life import JOB

from sonoforge_operator.api import parse_job_file
from sonoforge_operator.cluster.desired import ClusterJob, coordinator, small_job, standing_objects, worker_job
from sonoforge_operator.cluster.names import Key, Names
from sonoforge_operator.install import install
from sonoforge_operator.observed import Child
from sonoforge_operator.status import requests_of
from sonoforge_trainer.contract import CheckpointRef

TRIED = [
    Port(protocol, number)
    for protocol in ("TCP", "UDP")
    for number in (22, 53, 80, 443, 5000, 6443, 8080, 8081, 8333, 29400, 29401, 65000)
]
"""Ports that are tried: those that something uses, their neighbours, and some that nothing uses."""
ALL = frozenset(TRIED)
DNS = frozenset({Port("TCP", 53), Port("UDP", 53)})
NONE: frozenset[Port] = frozenset()
STORAGE, SERVER = "10.1.0.7", "10.0.0.1"
NAMESPACES = ("research", "sonoforge-system", "kube-system", "monitoring", "elsewhere")

Reached = Mapping[tuple[str, str], frozenset[Port]]


def tcp(*numbers: int) -> frozenset[Port]:
    return frozenset(Port("TCP", number) for number in numbers)


def job(name: str, network: Manifest, operator_namespace: str) -> ClusterJob:
    """A job whose runtime has these network settings."""
    documents = list(yaml.safe_load_all(JOB))
    documents[1]["spec"]["network"] = network
    file = parse_job_file(yaml.safe_dump_all(documents), where="job.yaml")
    return ClusterJob(Names(Key("research", name), f"uid-of-{name}"), file, "sha256:0", "trainer:1", operator_namespace)


def pods_of(made: ClusterJob) -> Iterator[tuple[str, Manifest]]:
    """What each pod of a job is, and its labels, from the templates that the operator applies."""
    ref = CheckpointRef(
        step=20,
        samples=640,
        uri="s3://b/run/step-0000000020/attempt-a",
        manifest_digest=f"sha256:{7:064x}",
        created="2026-01-01T00:00:00Z",
    )
    ((_, request),) = requests_of(ref, made.file.evaluations)
    children = {
        "evaluation": Child(f"eval-{request.id}-000", "evaluation", request=request),
        "retention": Child("retention-0123456789ab-000", "retention", prune=("step-1",)),
        "inventory": Child("inventory-000-000", "inventory"),
    }
    manifests = {
        "worker-0": worker_job(made, 1, made.file.job.spec.workers),
        "worker-1": worker_job(made, 1, made.file.job.spec.workers),
        "coordinator": coordinator(made),
        **{name: small_job(made, child, made.owner()) for name, child in children.items()},
    }
    for name, manifest in manifests.items():
        yield name, manifest["spec"]["template"]["metadata"]["labels"]


@dataclass(frozen=True)
class World:
    """Everything that may be at one end of a connection."""

    pods: tuple[Pod, ...]
    policies: Policies

    def reached(self) -> Reached:
        """The ports of every pair with something of ours, where any is reached, by the names of source and target."""
        ours = ("fetal/", "cardiac/", "operator")
        return {
            (source.name, target.name): ports
            for source in self.pods
            for target in self.pods
            if source != target and (source.name.startswith(ours) or target.name.startswith(ours))
            if (ports := frozenset(port for port in TRIED if self.policies.allow(source, target, port)))
        }


def world(network: Manifest, operator: list[Manifest], *, blocks_hold_for_pods: bool, operator_at: str) -> World:
    """Two jobs in one namespace, the operator, those it works with, and strangers everywhere."""
    jobs = [job("fetal", network, operator_at), job("cardiac", network, operator_at)]
    deployment = one(operator, "Deployment")
    found: list[tuple[str, str, Manifest]] = [
        (f"{made.names.key.name}/{name}", "research", labels) for made in jobs for name, labels in pods_of(made)
    ]
    found += [
        ("operator", operator_at, deployment["spec"]["template"]["metadata"]["labels"]),
        ("prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
        ("dns", "kube-system", {"k8s-app": "kube-dns"}),
        ("stranger", "research", {"app": "notebook"}),
        ("stranger beside the operator", "sonoforge-system", {"app": "web"}),
        ("stranger elsewhere", "elsewhere", {"app": "web"}),
        # Labels alone, in another namespace, make nobody a worker, a coordinator or the operator.
        ("false worker", "elsewhere", dict(next(pods_of(jobs[0]))[1])),
        ("false operator", "elsewhere", deployment["spec"]["template"]["metadata"]["labels"]),
    ]
    pods = [
        Pod(name, f"10.88.0.{number}", namespace, labels, node="node")
        for number, (name, namespace, labels) in enumerate(found, start=1)
    ]
    outside = {
        "storage": STORAGE,
        "API server": SERVER,
        "another host": "10.2.0.9",
        "metadata service": "169.254.169.254",
        "internet": "203.0.113.5",
        "internet6": "2001:db8::5",
    }
    pods += [Pod(name, address) for name, address in outside.items()]
    policies = [m for made in jobs for m in standing_objects(made) if m["kind"] == "NetworkPolicy"]
    own = one(operator, "NetworkPolicy")
    policies.append({**own, "metadata": {**own["metadata"], "namespace": operator_at}})
    labels = {name: {"kubernetes.io/metadata.name": name} for name in NAMESPACES}
    return World(tuple(pods), Policies(policies, labels, blocks_hold_for_pods))


def of_jobs(storage: Reached) -> dict[tuple[str, str], frozenset[Port]]:
    """What the pods of both jobs reach: `storage` is what those that use it reach of it."""
    made: dict[tuple[str, str], frozenset[Port]] = {}
    for name in ("fetal", "cardiac"):
        workers, small = [f"{name}/worker-{n}" for n in (0, 1)], ("evaluation", "retention", "inventory")
        made[workers[0], workers[1]] = made[workers[1], workers[0]] = ALL
        for worker in workers:
            made[worker, f"{name}/coordinator"] = tcp(29400)
        for pod in (*workers, *(f"{name}/{part}" for part in small)):
            made[pod, "dns"] = DNS
            for (_, target), ports in storage.items():
                made[pod, target] = made.get((pod, target), NONE) | ports
        made["operator", f"{name}/coordinator"] = tcp(8080)
    return made


NARROW = {"storageCidrs": ["10.1.0.0/16"], "storagePorts": [8333]}
CHART = {"networkPolicy": {"apiServer": {"cidrs": [f"{SERVER}/32"], "ports": [6443]}}}
OF_THE_OPERATOR = {("operator", "dns"): DNS, ("prometheus", "operator"): tcp(8080)}


@pytest.mark.parametrize("blocks_hold_for_pods", [True, False], ids=["blocks-hold-for-pods", "blocks-hold-outside"])
@pytest.mark.parametrize("operator_at", ["sonoforge-system", "research"])
def test_nothing_passes_but_what_a_run_needs(newest_helm: Helm, operator_at, blocks_hold_for_pods):
    """Workers reach each other, their coordinator, DNS and storage; the operator reaches coordinators; no more."""
    values = CHART | ({"watchNamespaces": ["research"]} if operator_at != "research" else {})
    rendered = newest_helm.render(values, namespace=operator_at)
    made = world(NARROW, rendered, blocks_hold_for_pods=blocks_hold_for_pods, operator_at=operator_at)
    storage = {("", "storage"): tcp(8333)}
    expected = of_jobs(storage) | OF_THE_OPERATOR | {("operator", "API server"): tcp(6443)}
    assert made.reached() == expected
    assert len(made.pods) ** 2 * len(TRIED) > 10_000, "connections that were tried"


def test_where_no_addresses_are_given_the_ports_alone_are_open(newest_helm: Helm):
    """The defaults know no address of the storage or of the API server, and say so in docs/operations.md."""
    made = world({}, newest_helm.render(namespace="research"), blocks_hold_for_pods=True, operator_at="research")
    hosts = ("storage", "API server", "another host", "internet", "internet6")
    open_pods = (
        "dns",
        "prometheus",
        "stranger",
        "stranger beside the operator",
        "stranger elsewhere",
        "false worker",
        "false operator",
    )
    storage = {("", target): tcp(443) for target in (*hosts, *open_pods)}
    operator = {("operator", target): tcp(443, 6443) for target in (*hosts, "metadata service", *open_pods)}
    operator["operator", "dns"] |= DNS
    assert made.reached() == of_jobs(storage) | OF_THE_OPERATOR | operator


def test_no_job_reaches_the_metadata_service_of_its_node_by_default(newest_helm: Helm):
    """It answers on port 80 with the credentials of the node, and a storage may well be on port 80."""
    network = {"storagePorts": [80, 443]}
    made = world(network, newest_helm.render(namespace="research"), blocks_hold_for_pods=True, operator_at="research")
    reached = {source for source, target in made.reached() if target == "metadata service"}
    assert reached == {"operator"}
    assert made.reached()["fetal/worker-0", "internet"] == tcp(80, 443)


def test_metrics_are_read_by_whom_the_values_name_and_by_nobody_without(newest_helm: Helm):
    def readers(metrics_from: list[Any]) -> set[str]:
        rendered = newest_helm.render({"networkPolicy": {"metricsFrom": metrics_from}}, namespace="sonoforge-system")
        made = world(NARROW, rendered, blocks_hold_for_pods=True, operator_at="sonoforge-system")
        return {source for (source, target), _ in made.reached().items() if target == "operator"}

    assert readers([]) == set()
    assert readers([{"namespace": "monitoring"}]) == {"prometheus"}
    assert readers([{"namespace": "elsewhere", "podLabels": {"app": "web"}}]) == {"stranger elsewhere"}


@pytest.mark.parametrize("cluster_wide", [True, False], ids=["cluster-wide", "namespaced"])
def test_the_manifests_mean_what_the_chart_means(newest_helm: Helm, cluster_wide):
    operator_at = "sonoforge-system" if cluster_wide else "research"
    values = {"clusterWide": cluster_wide}
    rendered = newest_helm.render(values, namespace=operator_at)
    reached = [
        world(NARROW, made, blocks_hold_for_pods=True, operator_at=operator_at).reached()
        for made in (rendered, list(install(cluster_wide=cluster_wide)))
    ]
    assert reached[0] == reached[1]


def test_without_policies_of_a_job_strangers_reach_its_store(newest_helm: Helm):
    """What the policies are for; this is what the other tests would see if they saw nothing."""
    rendered = newest_helm.render(CHART, namespace="research")
    made = world({"policies": False}, rendered, blocks_hold_for_pods=True, operator_at="research")
    assert made.reached()["stranger elsewhere", "fetal/coordinator"] == ALL
