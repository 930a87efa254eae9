"""What the chart makes of its values, with each Helm and without a cluster."""

from __future__ import annotations

import json

import pytest
import yaml
from helm import CHART, Helm, Manifest, one

from sonoforge_operator.chart.documents import schema
from sonoforge_operator.cluster.command import command
from sonoforge_operator.crd import RESOURCES
from sonoforge_operator.install import install

DIGEST = "sha256:" + "5f" * 32
NAME = "sonoforge-operator"
SERVED = "--api-versions=sonoforge.dev/v1alpha1/PretrainRuntime"


def pod(manifests: list[Manifest]) -> Manifest:
    found: Manifest = one(manifests, "Deployment")["spec"]["template"]["spec"]
    return found


def container(manifests: list[Manifest]) -> Manifest:
    found: Manifest = pod(manifests)["containers"][0]
    return found


def names(manifests: list[Manifest], kind: str) -> list[str]:
    return [m["metadata"]["name"] for m in manifests if m["kind"] == kind]


# --- the chart and the manifests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_wide", [False, True], ids=["namespaced", "cluster-wide"])
def test_the_chart_installs_what_the_manifests_install(helm: Helm, cluster_wide):
    """But for labels of Helm, and for the namespace, which with the chart the person chooses."""
    namespace = "sonoforge-system" if cluster_wide else "research"
    rendered = helm.render({"clusterWide": True} if cluster_wide else {}, namespace=namespace)
    wanted = [m for m in install(cluster_wide=cluster_wide) if m["kind"] != "Namespace"]
    for manifest in wanted:
        made = one(rendered, manifest["kind"], NAME)
        for subject in manifest.get("subjects", ()):
            subject.setdefault("namespace", namespace)
        if manifest["kind"] == "NetworkPolicy" and not cluster_wide:
            # The chart knows which namespaces are served.
            (coordinators,) = manifest["spec"]["egress"][-1]["to"]
            coordinators["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": "research"}}
        content = {k: v for k, v in made.items() if k != "metadata"}
        assert content == {k: v for k, v in manifest.items() if k != "metadata"}
        assert made["metadata"]["labels"].items() >= manifest["metadata"]["labels"].items()
        cluster = manifest["kind"].startswith("Cluster")
        assert made["metadata"].get("namespace") == (None if cluster else namespace)
    assert len(wanted) == (7 if cluster_wide else 5)


def test_the_chart_is_linted_without_a_word(helm: Helm):
    printed = helm.run("lint", "--strict", str(CHART))
    assert "1 chart(s) linted, 0 chart(s) failed" in printed
    assert "[WARNING]" not in printed
    assert "[ERROR]" not in printed


def test_crds_come_with_the_release_to_the_byte_and_are_kept(helm: Helm):
    found = {m["metadata"]["name"]: m for m in helm.render() if m["kind"] == "CustomResourceDefinition"}
    assert sorted(found) == sorted(f"{resource.plural}.sonoforge.dev" for resource in RESOURCES)
    for resource in RESOURCES:
        made = found[f"{resource.plural}.sonoforge.dev"]
        assert made["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
        assert made == resource.definition()


# --- values -----------------------------------------------------------------------------------------------------------


def test_crds_can_be_left_out_or_go_with_the_release(helm: Helm):
    assert names(helm.render({"crds": {"enabled": False}}), "CustomResourceDefinition") == []
    going = [m for m in helm.render({"crds": {"keep": False}}) if m["kind"] == "CustomResourceDefinition"]
    assert [m["metadata"].get("annotations") for m in going] == [None] * 4


def test_watched_namespaces_get_a_role_each_and_only_its_own_the_right_to_a_lease(helm: Helm):
    made = helm.render({"watchNamespaces": ["fetal", "cardiac", "fetal"]})
    where = sorted(m["metadata"]["namespace"] for m in made if m["kind"] == "Role")
    assert where == ["cardiac", "fetal", "research"]
    for namespace in where:
        binding = one(made, "RoleBinding", namespace=namespace)
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": NAME, "namespace": "research"}]
        rules = one(made, "Role", namespace=namespace)["rules"]
        may_write_leases = [r["verbs"] for r in rules if r["resources"] == ["leases"] and "get" not in r["verbs"]]
        assert may_write_leases == ([["create"], ["update"]] if namespace == "research" else [])
    assert [a for a in container(made)["args"] if "namespace" in a] == ["--namespace=fetal", "--namespace=cardiac"]
    peers = one(made, "NetworkPolicy")["spec"]["egress"][-1]["to"]
    assert [p["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for p in peers] == ["fetal", "cardiac"]
    assert [k for k in ("ClusterRoleBinding",) if names(made, k)] == []


def test_it_can_serve_the_whole_cluster(helm: Helm):
    made = helm.render({"clusterWide": True})
    assert "--all-namespaces" in container(made)["args"]
    assert names(made, "ClusterRoleBinding") == [NAME]
    (role,) = [m for m in made if m["kind"] == "Role"]
    assert {tuple(rule["resources"]) for rule in role["rules"]} == {("leases",)}
    bindings = [m for m in made if m["kind"] == "ValidatingAdmissionPolicyBinding"]
    assert [b["spec"].get("matchResources") for b in bindings] == [None, None]


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({}, "sonoforge/operator:{version}"),
        ({"tag": "1.2"}, "sonoforge/operator:1.2"),
        (
            {"registry": "registry.hospital.example:5000/ai/"},
            "registry.hospital.example:5000/ai/sonoforge/operator:{version}",
        ),
        ({"repository": "ours/operator", "digest": DIGEST}, f"ours/operator@{DIGEST}"),
        ({"tag": "1.2", "digest": DIGEST}, f"sonoforge/operator:1.2@{DIGEST}"),
    ],
)
def test_images_are_named_by_tag_or_digest(helm: Helm, image, reference):
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    made = container(helm.render({"image": image, "trainerImage": {**image, "repository": "t"}}))
    assert made["image"] == reference.format(version=version)
    repository = image.get("repository", "sonoforge/operator")
    assert f"--image={reference.format(version=version).replace(repository, 't')}" in made["args"]


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ([], {"not-ready": 30, "unreachable": 30}),
        ([{"key": "node.kubernetes.io/unreachable", "operator": "Exists"}], {"not-ready": 30}),
        ([{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}], {"not-ready": 30}),
        ([{"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"}], {"not-ready": 30, "unreachable": 30}),
        ([{"operator": "Exists"}], {"not-ready": 30, "unreachable": 30}),
    ],
)
def test_the_operator_leaves_a_lost_node_after_half_a_minute_unless_its_taints_are_named(
    helm: Helm, given: list[Manifest], want: dict[str, int]
):
    found = pod(helm.render({"tolerations": given}))["tolerations"]
    assert found[: len(given)] == given
    added = {each["key"].removeprefix("node.kubernetes.io/"): each["tolerationSeconds"] for each in found[len(given) :]}
    assert added == want


def test_pods_get_what_a_cluster_asks_of_them(helm: Helm):
    toleration = {"key": "control-plane", "operator": "Exists", "effect": "NoSchedule"}
    made = helm.render(
        {
            "imagePullSecrets": ["registry"],
            "imagePullPolicy": "Never",
            "priorityClassName": "platform",
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [toleration],
            "podAnnotations": {"a.example/b": "c"},
            "serviceAccountAnnotations": {"d.example/e": "f"},
            "commonLabels": {"team": "imaging", "app.kubernetes.io/name": "another"},
            "keySecret": "other",
            "resources": {"requests": {"cpu": 1}, "limits": {"memory": "1Gi"}},
        }
    )
    spec = pod(made)
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert container(made)["imagePullPolicy"] == "Never"
    assert (spec["priorityClassName"], spec["nodeSelector"]) == ("platform", {"pool": "cpu"})
    assert spec["tolerations"][0] == toleration
    template = one(made, "Deployment")["spec"]["template"]["metadata"]
    assert template["annotations"] == {"a.example/b": "c"}
    assert "team" not in template["labels"]
    assert one(made, "ServiceAccount")["metadata"]["annotations"] == {"d.example/e": "f"}
    ours = [m for m in made if m["kind"] != "CustomResourceDefinition"]
    assert {m["metadata"]["labels"].get("team") for m in ours} == {"imaging"}
    assert {m["metadata"]["labels"]["app.kubernetes.io/name"] for m in ours} == {NAME}
    assert spec["volumes"][0]["secret"]["secretName"] == "other"
    assert container(made)["resources"] == {"requests": {"cpu": 1, "memory": "128Mi"}, "limits": {"memory": "1Gi"}}


def test_several_replicas_are_updated_one_by_one_and_a_drain_takes_one(helm: Helm):
    made = helm.render({"replicas": 3, "podDisruptionBudget": {"enabled": True}})
    deployment = one(made, "Deployment")["spec"]
    assert deployment["replicas"] == 3
    assert deployment["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    # A replica that waits for the Lease is healthy and never `readyz`.
    assert container(made)["readinessProbe"]["httpGet"]["path"] == "/healthz"
    assert pod(made)["affinity"]["podAntiAffinity"]
    budget = one(made, "PodDisruptionBudget")["spec"]
    assert (budget["maxUnavailable"], budget["selector"]) == (1, deployment["selector"])


def test_times_and_addresses_become_options_of_the_operator(helm: Helm):
    url = "http://{service}.{namespace}.svc.example:8080"
    given = {"pollSeconds": 5, "leaseSeconds": 60, "renewSeconds": 40, "retrySeconds": 2.5, "staleSeconds": 200}
    arguments = container(helm.render({"timing": given, "coordinatorUrl": url}))["args"]
    assert set(arguments) > {
        "--poll-seconds=5",
        "--lease-seconds=60",
        "--renew-seconds=40",
        "--retry-seconds=2.5",
        "--stale-seconds=200",
        f"--coordinator-url={url}",
    }
    assert not any("stuck" in argument or "silence" in argument for argument in arguments)


def test_every_option_of_the_chart_is_one_that_the_operator_has(helm: Helm):
    timing = dict.fromkeys(schema()["$defs"]["Timing"]["properties"], 1)
    made = helm.render({"timing": timing, "coordinatorUrl": "http://a", "watchNamespaces": ["a"]})
    known = {option for parameter in command.params for option in parameter.opts}
    assert {argument.split("=")[0] for argument in container(made)["args"][1:]} <= known
    assert len(container(made)["args"]) == 4 + len(timing) + 1


def test_a_proxy_is_in_the_environment_and_not_otherwise(helm: Helm):
    made = helm.render({"proxy": {"https": "http://proxy.example:3128", "noProxy": ".example"}})
    environment = {e["name"]: e.get("value") for e in container(made)["env"]}
    of_pod = {"POD_NAMESPACE": None, "POD_UID": None}
    assert environment == {**of_pod, "HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": ".example"}
    assert {e["name"] for e in container(helm.render())["env"]} == of_pod.keys()


def test_the_network_policy_is_narrowed_by_addresses_and_readers_of_metrics(helm: Helm):
    peers = [{"namespace": "monitoring", "podLabels": {"app": "prometheus"}}, {"namespace": "audit"}]
    made = helm.render(
        {
            "networkPolicy": {
                "metricsFrom": peers,
                "apiServer": {"cidrs": ["10.0.0.1/32"], "ports": [8443]},
                "dnsNamespace": "dns",
            }
        }
    )
    spec = one(made, "NetworkPolicy")["spec"]
    (ingress,) = spec["ingress"]
    assert ingress["from"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
            "podSelector": {"matchLabels": {"app": "prometheus"}},
        },
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "audit"}}},
    ]
    server, dns, _ = spec["egress"]
    assert server == {"ports": [{"protocol": "TCP", "port": 8443}], "to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}]}
    assert dns["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "dns"}}}]
    assert one(helm.render({"networkPolicy": {"metricsFrom": []}}), "NetworkPolicy")["spec"]["ingress"] == []
    assert names(helm.render({"networkPolicy": {"enabled": False}}), "NetworkPolicy") == []


@pytest.mark.parametrize(("value", "kind"), [("serviceMonitor", "ServiceMonitor"), ("podMonitor", "PodMonitor")])
def test_metrics_are_scraped_where_that_is_asked_for(helm: Helm, value, kind):
    made = helm.render({"metrics": {value: {"enabled": True, "labels": {"release": "prom"}, "interval": "10s"}}})
    monitor = one(made, kind)
    assert monitor["metadata"]["labels"].items() >= {"release": "prom", "app.kubernetes.io/name": NAME}.items()
    ((endpoint,),) = [v for k, v in monitor["spec"].items() if k.endswith("ndpoints")]
    assert endpoint == {"port": "http", "path": "/metrics", "interval": "10s", "honorLabels": True}
    assert monitor["spec"]["selector"] == one(made, "Deployment")["spec"]["selector"]
    assert names(made, "Service") == ([NAME] if kind == "ServiceMonitor" else [])
    if kind == "ServiceMonitor":
        service = one(made, "Service")
        assert service["metadata"]["labels"].items() >= monitor["spec"]["selector"]["matchLabels"].items()
        assert service["spec"]["ports"] == [{"name": "http", "port": 8080, "targetPort": "http", "protocol": "TCP"}]


def test_alerts_and_the_dashboard_are_made_where_that_is_asked_for(helm: Helm):
    plain = helm.render()
    assert (names(plain, "PrometheusRule"), names(plain, "ConfigMap")) == ([], [])
    made = helm.render(
        {
            "metrics": {
                "prometheusRule": {"enabled": True, "labels": {"role": "alerts"}},
                "dashboard": {"enabled": True, "annotations": {"folder": "AI"}},
            }
        }
    )
    rule = one(made, "PrometheusRule")
    assert rule["metadata"]["labels"]["role"] == "alerts"
    assert rule["spec"] == yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    board = one(made, "ConfigMap")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert board["metadata"]["annotations"] == {"folder": "AI"}
    assert json.loads(board["data"]["sonoforge.json"]) == json.loads((CHART / "files" / "dashboard.json").read_text())


def test_aggregated_roles_and_admission_policies_can_be_left_out(helm: Helm):
    made = helm.render()
    assert sorted(names(made, "ClusterRole")) == ["sonoforge-admin", "sonoforge-edit", "sonoforge-view"]
    policies = ["research.sonoforge-operator.pods", "research.sonoforge-operator.records"]
    assert sorted(names(made, "ValidatingAdmissionPolicy")) == policies
    without = helm.render({"aggregatedRoles": {"enabled": False}, "admissionPolicy": {"enabled": False}})
    kinds = {m["kind"] for m in without}
    assert kinds & {"ClusterRole", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"} == set()


def test_priority_classes_are_made(helm: Helm):
    made = helm.render({"priorityClasses": [{"name": "research", "value": 1000, "preemptionPolicy": "Never"}]})
    found = one(made, "PriorityClass")
    assert (found["metadata"]["name"], found["value"], found["preemptionPolicy"]) == ("research", 1000, "Never")


def test_the_default_runtime_is_made_once_its_kind_is_served(helm: Helm):
    values = {
        "watchNamespaces": ["fetal", "cardiac"],
        "defaultRuntime": {
            "enabled": True,
            "spec": {"queueName": "research", "workers": {"priorityClassName": "train", "requests": {"cpu": 8}}},
        },
        "extraCa": {"certificates": "-----BEGIN CERTIFICATE-----\n"},
    }
    made = helm.render(values, SERVED)
    for namespace in ("fetal", "cardiac"):
        runtime = one(made, "PretrainRuntime", "default", namespace)
        assert runtime["spec"] == {
            "queueName": "research",
            "workers": {"priorityClassName": "train", "requests": {"cpu": 8}},
            "storage": {"caBundle": "sonoforge-ca"},
        }
        assert runtime["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
        assert one(made, "ConfigMap", "sonoforge-ca", namespace)["data"] == {"ca.crt": "-----BEGIN CERTIFICATE-----\n"}
    assert names(helm.render(values), "PretrainRuntime") == []
