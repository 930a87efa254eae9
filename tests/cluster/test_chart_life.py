"""The chart on a real control plane: dry run, install, upgrade, rollback and uninstall, beside a running job.

Each Helm has a control plane of its own, because a chart with CRDs and policies changes the whole cluster. The pod of
the operator is played; the operator itself runs as a process, with the account and the arguments of the release.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from components import wait_for
from control_plane import ControlPlane
from helm import CHART, MONITORING, Helm, HelmError, Manifest
from kubernetes import client, config
from kwok import Kwok
from operators import OperatorProcess, apply_crds
from played import Played
from played_coordinators import Switchboard
from sites import KINDS
from test_life import JOB

HOME, JOBS = "platform", "research"
"""Namespace of the operator, and the one that it serves."""
NAME = "sonoforge-operator"
ARGUMENTS = (f"--namespace={HOME}", "--timeout=2m")
VALUES = {"watchNamespaces": [JOBS], "trainerImage": {"registry": "example.invalid"}}
EVERYTHING = VALUES | {
    "replicas": 2,
    "podDisruptionBudget": {"enabled": True},
    "priorityClasses": [{"name": "research", "value": 1000}],
    "extraCa": {"certificates": "-----BEGIN CERTIFICATE-----\n"},
    "defaultRuntime": {"enabled": True, "spec": {"queueName": "research"}},
    "metrics": {name: {"enabled": True} for name in ("serviceMonitor", "prometheusRule", "dashboard")},
    "imagePullSecrets": ["registry"],
    "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "pool", "operator": "Exists"}],
    "proxy": {"https": "http://proxy.example:3128"},
    "trainerImage": {"digest": "sha256:" + "5f" * 32},
    "admissionPolicy": {"requireDigests": True},
}


@dataclass
class Cluster:
    """A control plane with played nodes, Helm, and the two namespaces."""

    control_plane: ControlPlane
    helm: Helm
    api_client: client.ApiClient

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.control_plane.kubectl(*arguments, **options)

    def release(self, what: str, chart: Path, values: Manifest) -> str:
        return self.helm.run(what, "sonoforge", str(chart), *ARGUMENTS, "--wait", values=values)


@pytest.fixture(scope="module")
def cluster(programs, helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with (
        ControlPlane(programs[0], tmp_path_factory.mktemp("chart")) as running,
        Kwok(programs[1] / "kwok", running) as kwok,
        config.new_client_from_config(str(running.kubeconfig)) as api_client,
    ):
        kwok.add_nodes(4)
        for name in (HOME, JOBS):
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
            running.kubectl("create", "--filename=-", stdin=yaml.safe_dump(manifest))
        yield Cluster(running, helm.at(running.kubeconfig), api_client)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart as of an earlier version, whose CRD does not know a field of today's."""
    folder = tmp_path_factory.mktemp("older") / "sonoforge"
    shutil.copytree(CHART, folder)
    chart = yaml.safe_load((folder / "Chart.yaml").read_text())
    (folder / "Chart.yaml").write_text(yaml.safe_dump(chart | {"version": "0.0.9", "appVersion": "0.0.9"}))
    file = folder / "files" / "crds" / "pretrainjobs.yaml"
    crd = yaml.safe_load(file.read_text())
    properties = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    del properties["spec"]["properties"]["ttlAfterFinished"]
    file.write_text(yaml.safe_dump(crd, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def installed(cluster: Cluster, older: Path) -> str:
    """The older version, installed. What Helm printed."""
    return cluster.release("install", older, VALUES)


class Bench:
    """A running job, and the operator as the release of the moment wants it."""

    def __init__(self, cluster: Cluster, played: Played, board: Switchboard, folder: Path) -> None:
        self.cluster, self.played = cluster, played
        self._board, self._folder = board, folder
        self._operator: OperatorProcess | None = None

    @property
    def operator(self) -> OperatorProcess:
        assert self._operator is not None
        return self._operator

    def start_operator(self) -> None:
        """Start what the Deployment says in place of what ran before, and wait for a pass over every job."""
        self.stop_operator()
        deployment = self.cluster.control_plane.get("deployment", NAME, f"--namespace={HOME}")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["args"][:2] == ["operator", f"--namespace={JOBS}"]
        own = [argument for argument in container["args"][2:] if not argument.startswith("--key-file")]
        account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
        kubeconfig = self.cluster.control_plane.kubeconfig_of_service_account(HOME, account)
        folder = self._folder / "operator"
        self._operator = OperatorProcess(kubeconfig, JOBS, folder, self._board.url, f"--own-namespace={HOME}", *own)
        self._operator.start()
        self._operator.wait_until_ready()
        self._operator.wait_for(lambda: self.passes() >= 1, "a pass over each job", 30)

    def start_job(self) -> None:
        """Start the operator, and a job whose nodes all run and whose first checkpoint has its scores."""
        self.cluster.kubectl("apply", f"--namespace={JOBS}", "--filename=-", stdin=JOB)
        self.start_operator()
        self.operator.wait_for(lambda: self.status().get("nodesText") == "3/3", "all nodes run", 60)
        self.operator.wait_for(lambda: self.status().get("checkpoints", {}).get("evaluated") == 1, "first scores", 60)

    def stop_operator(self) -> None:
        if self._operator is not None:
            self._operator.terminate()
            self._operator = None

    def passes(self) -> float:
        return self.operator.metrics().get("sonoforge_reconcile_seconds_count", 0)

    def status(self) -> Any:
        return self.cluster.control_plane.get("pj", "fetal", f"--namespace={JOBS}").get("status", {})

    def picture(self) -> dict[str, tuple[str, str]]:
        """Everything of the job: its uid, and of running pods also the version, which changes with all about them."""
        found = {}
        for item in self.cluster.control_plane.get(f"pj,{KINDS}", f"--namespace={JOBS}")["items"]:
            kind, metadata = item["kind"], item["metadata"]
            if kind == "PretrainJob" or metadata.get("labels", {}).get("sonoforge.dev/job") == "fetal":
                runs = kind == "Pod" and item["status"]["phase"] == "Running"
                found[f"{kind}/{metadata['name']}"] = metadata["uid"], metadata["resourceVersion"] if runs else ""
        return found


@pytest.fixture
def bench(cluster: Cluster, tmp_path: Path) -> Iterator[Bench]:
    board = Switchboard()
    with Played(cluster.api_client, JOBS, tmp_path / "played", board) as played:
        made = Bench(cluster, played, board, tmp_path)
        yield made
        made.stop_operator()
    board.close()


def knows(cluster: Cluster, field: str) -> bool:
    """Whether the served CRD has a field of the spec."""
    crd = cluster.control_plane.get("crd", "pretrainjobs.sonoforge.dev")
    fields = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    return field in fields


def of_the_release(cluster: Cluster) -> list[str]:
    """What is there of the release, CRDs and what they define aside."""
    kinds = (
        "serviceaccounts,roles,rolebindings,deployments,pods,networkpolicies,clusterroles,"
        "validatingadmissionpolicies,validatingadmissionpolicybindings"
    )
    selector = "--selector=app.kubernetes.io/part-of=sonoforge"
    return cluster.kubectl("get", kinds, "--all-namespaces", selector, "--output=name").split()


def test_notes_tell_what_is_left_to_do_and_stop_telling_it_once_it_is_done(cluster: Cluster, installed):
    order = f"kubectl -n {HOME} create secret generic {NAME} --from-literal=key="
    assert order in installed
    cluster.kubectl("create", "secret", "generic", NAME, f"--namespace={HOME}", "--from-literal=key=0123456789abcdef")
    again = cluster.release("upgrade", CHART, VALUES)
    assert "TO DO" not in again
    assert f"kubectl -n {JOBS} get pj,ckpt -w" in again
    assert not cluster.helm.run("rollback", "sonoforge", "1", *ARGUMENTS).startswith("Error")


@pytest.mark.parametrize("cluster_wide", [False, True], ids=["namespaced", "cluster-wide"])
def test_everything_that_can_be_rendered_is_accepted_by_the_api_server(cluster: Cluster, installed, cluster_wide):
    """As a dry run, but for the kinds of the Prometheus operator, which the test cluster does not have."""
    served = "--api-versions=sonoforge.dev/v1alpha1/PretrainRuntime"
    where = {"clusterWide": True, "watchNamespaces": [], "jobNamespaces": [JOBS]} if cluster_wide else {}
    manifests = cluster.helm.render(EVERYTHING | where, served, namespace=HOME)
    monitors = [m["kind"] for m in manifests if m["apiVersion"] == MONITORING]
    assert sorted(monitors) == ["PrometheusRule", "ServiceMonitor"]
    accepted = [m for m in manifests if m["apiVersion"] != MONITORING]
    printed = cluster.kubectl(
        *("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--field-manager=test", "--filename=-"),
        stdin=yaml.safe_dump_all(accepted),
    )
    assert printed.count("(server dry run)") == len(accepted)
    assert len({m["kind"] for m in accepted}) == (15 if cluster_wide else 14)


def test_a_running_job_is_undisturbed_by_upgrade_rollback_uninstall_and_a_new_install(
    cluster: Cluster, installed, older, bench: Bench
):
    bench.played.paused = True
    bench.start_job()
    before = bench.picture()
    running = [name for name, (_, version) in before.items() if version]
    assert len(running) == 4, "three workers and a coordinator"
    assert len(before) > 12

    def undisturbed(after: str) -> None:
        assert bench.picture() == before, after

    cluster.release("upgrade", CHART, VALUES | {"podAnnotations": {"a.example/changed": "yes"}, "replicas": 2})
    assert knows(cluster, "ttlAfterFinished"), "CRDs are upgraded with the release"
    undisturbed("while no operator acts")
    bench.start_operator()
    undisturbed("upgrade")

    cluster.helm.run("rollback", "sonoforge", "1", *ARGUMENTS, "--wait")
    assert not knows(cluster, "ttlAfterFinished")
    bench.start_operator()
    undisturbed("rollback")

    bench.stop_operator()
    cluster.helm.run("uninstall", "sonoforge", *ARGUMENTS, "--wait")
    wait_for(lambda: of_the_release(cluster) == [], "nothing of the release", 30)
    undisturbed("uninstall")
    assert len(cluster.kubectl("get", "crd", "--output=name").split()) == 4

    cluster.release("install", CHART, VALUES)
    assert knows(cluster, "ttlAfterFinished"), "CRDs that were kept are taken over"
    bench.start_operator()
    undisturbed("a new install")
    bench.played.paused = False
    bench.operator.wait_for(lambda: bench.status().get("phase") == "Succeeded", "Succeeded", 180)
    status = bench.status()
    assert (status["attempt"], status["restartsTotal"]) == (1, 0)
    assert status["checkpoints"] == {"total": 6, "evaluated": 6, "failed": 0}
    assert not bench.played.errors


def test_the_default_runtime_is_made_where_its_kind_is_served_and_outlives_the_release(cluster: Cluster, installed):
    runtime = {
        "defaultRuntime": {"enabled": True, "spec": {"queueName": "research", "accelerator": {"resourceName": ""}}}
    }
    cluster.release("upgrade", CHART, VALUES | runtime)
    made = cluster.control_plane.get("prt", "default", f"--namespace={JOBS}")
    assert (made["spec"]["queueName"], made["spec"]["network"]["dnsNamespace"]) == ("research", "kube-system")
    cluster.release("upgrade", CHART, VALUES)
    assert (
        cluster.control_plane.get("prt", "default", f"--namespace={JOBS}")["metadata"]["uid"] == made["metadata"]["uid"]
    )


def test_a_second_release_serves_other_namespaces_and_never_the_same(cluster: Cluster, installed):
    only_once = {"crds": {"enabled": False}, "aggregatedRoles": {"enabled": False}}
    other = ("install", "second", str(CHART), "--namespace=second", "--create-namespace", "--timeout=2m")
    with pytest.raises(HelmError, match=rf"(?s)Role.*{NAME}.*{JOBS}.*ownership"):
        cluster.helm.run(*other, values=only_once | {"watchNamespaces": [JOBS]})
    assert cluster.kubectl("get", "deployments", "--namespace=second", "--output=name") == ""
    cluster.helm.run(*other, "--replace", "--wait", values=only_once)
    cluster.helm.run("uninstall", "second", "--namespace=second", "--wait", "--timeout=2m")


def test_crds_go_with_the_release_where_that_is_asked_for(cluster: Cluster, installed):
    cluster.release("upgrade", CHART, VALUES | {"crds": {"keep": False}})
    cluster.helm.run("uninstall", "sonoforge", *ARGUMENTS, "--wait")
    wait_for(lambda: cluster.kubectl("get", "crd", "--output=name") == "", "no CRDs", 60)
    wait_for(lambda: of_the_release(cluster) == [], "nothing of the release", 30)


def test_crds_that_were_applied_by_hand_are_taken_over_where_that_is_said(cluster: Cluster, installed):
    apply_crds(cluster.control_plane)
    with pytest.raises(HelmError, match="ownership"):
        cluster.release("install", CHART, VALUES)
    cluster.helm.run(
        *("install", "sonoforge", str(CHART), *ARGUMENTS, "--take-ownership", "--replace", "--wait"), values=VALUES
    )
    owner = cluster.control_plane.get("crd", "pretrainjobs.sonoforge.dev")["metadata"]["annotations"]
    assert (owner["meta.helm.sh/release-name"], owner["helm.sh/resource-policy"]) == ("sonoforge", "keep")
