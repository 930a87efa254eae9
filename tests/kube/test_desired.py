"""The objects of a job: names inside their limits, pods that are restricted by construction, nothing secret."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import JOB, cluster_job, file

from sonoforge_operator.cluster.desired import (
    checkpoint_object,
    coordinator,
    small_job,
    standing_objects,
    worker_job,
)
from sonoforge_operator.cluster.names import Key, Names
from sonoforge_operator.observed import Child
from sonoforge_operator.status import request_of, requests_of
from sonoforge_trainer.contract import Baseline, CheckpointRef

REF = CheckpointRef(
    step=100,
    samples=3200,
    uri="s3://b/run/step-0000000100/attempt-a",
    manifest_digest=f"sha256:{7:064x}",
    created="2026-01-01T00:00:00Z",
)


def evaluation() -> Child:
    ((_, request),) = requests_of(REF, file().evaluations)
    return Child(f"eval-{request.id}-000", "evaluation", request=request_of(REF, file().evaluations, request.id))


WORKERS = cluster_job().file.job.spec.workers


def everything() -> list[dict]:
    job = cluster_job()
    children = [
        evaluation(),
        Child("retention-0123456789ab-000", "retention", prune=("step-1",)),
        Child("inventory-000-000", "inventory", known=(REF.id,)),
    ]
    return [
        *standing_objects(job),
        coordinator(job),
        worker_job(job, 1, WORKERS, ("bad-node",)),
        checkpoint_object(job, REF),
        *(small_job(job, child, job.owner()) for child in children),
    ]


def templates() -> list[dict]:
    return [m["spec"]["template"] for m in everything() if m["kind"] in ("Job", "Deployment")]


def test_every_pod_is_restricted_and_has_no_token():
    assert len(templates()) == 5
    for template in templates():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        security = spec["securityContext"]
        assert (security["runAsNonRoot"], security["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
        assert security["runAsUser"] > 0
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        kinds = {next(k for k in volume if k != "name") for volume in spec["volumes"]}
        assert kinds <= {"emptyDir", "configMap", "secret", "downwardAPI", "projected"}


def test_workers_get_their_gpus_nodes_and_storage_from_the_runtime_and_the_job():
    job = worker_job(cluster_job(), 2, WORKERS, ("bad-node",))
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert container["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "2"},
    }
    assert spec["nodeSelector"] == {"zone": "a", "gpu": "a100"}
    assert (spec["priorityClassName"], spec["imagePullSecrets"]) == ("training", [{"name": "pull"}])
    assert environment["AWS_ENDPOINT_URL_S3"] == "https://s3.example.org"
    assert environment["AWS_SHARED_CREDENTIALS_FILE"] == "/etc/sonoforge/credentials/credentials"
    assert environment["SONOFORGE_HASH_KEY_FILE"] == "/etc/sonoforge/hash-key/key"
    assert environment["SONOFORGE_IMAGE"] == container["image"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert (job["spec"]["completions"], job["spec"]["completionMode"]) == (3, "Indexed")
    assert "--nodes=1:3" in container["command"]
    assert "bad-node" in json.dumps(spec["affinity"])


def test_nothing_of_the_operators_key_is_in_any_object():
    """The coordinator gets a digest to compare with: who may read the ConfigMap learns no token."""
    job = cluster_job()
    (config,) = [m for m in standing_objects(job) if m["kind"] == "ConfigMap"]
    assert config["data"]["token"] == job.token_digest
    assert config["data"]["token"].startswith("sha256:")


def test_a_coordinator_leaves_a_lost_node_at_once_and_a_worker_after_a_while():
    def patience(manifest: dict) -> set[int]:
        tolerations = manifest["spec"]["template"]["spec"]["tolerations"]
        return {t["tolerationSeconds"] for t in tolerations if t.get("key", "").startswith("node.kubernetes.io/")}

    job = cluster_job()
    assert patience(coordinator(job)) == {0}
    assert patience(worker_job(job, 1, WORKERS)) == {20}


@pytest.mark.parametrize(
    ("toleration", "want"),
    [
        ("{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 90}", {20, 90}),
        ("{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoSchedule}", {20, None}),
        ("{operator: Exists}", {20}),
    ],
)
def test_who_names_the_taints_of_a_lost_node_decides_how_long_a_worker_stays(toleration, want):
    job = cluster_job(text=JOB.replace("{key: gpu, operator: Exists, effect: NoSchedule}", toleration))
    tolerations = worker_job(job, 1, WORKERS)["spec"]["template"]["spec"]["tolerations"]
    assert {
        t.get("tolerationSeconds") for t in tolerations if t.get("key", "").startswith("node.kubernetes.io/")
    } == want


def test_another_coordinator_avoids_the_node_of_the_one_that_was_taken_away():
    deployment = coordinator(cluster_job())
    spec = deployment["spec"]["template"]["spec"]
    (preferred,) = spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred["podAffinityTerm"]["labelSelector"] == deployment["spec"]["selector"]


def test_the_coordinator_has_no_credentials_of_the_storage():
    text = json.dumps(coordinator(cluster_job()))
    assert "AWS_" not in text
    assert '"secretName": "s3"' not in text


def test_an_evaluation_reads_its_request_and_belongs_to_its_checkpoint():
    job = cluster_job()
    owner = {"kind": "Checkpoint", "uid": "c"}
    made = small_job(job, evaluation(), owner)
    assert made["metadata"]["ownerReferences"] == [owner]
    annotations = made["spec"]["template"]["metadata"]["annotations"]
    assert json.loads(annotations["sonoforge.dev/request"])["checkpointUri"] == REF.uri
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert container["command"][-2:] == ["--request", "/etc/sonoforge/request/request.json"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}


def test_a_listing_names_what_is_known():
    listing = Child("inventory-000-000", "inventory", known=("step-1-a", "step-2-b"))
    (container,) = small_job(cluster_job(), listing, owner={})["spec"]["template"]["spec"]["containers"]
    command = ["checkpoints", "list", "s3://b/run", "--known=step-1-a", "--known=step-2-b"]
    assert container["command"][-len(command) :] == command


def test_equal_jobs_give_equal_objects():
    assert json.dumps(everything(), sort_keys=True) == json.dumps(everything(), sort_keys=True)


@pytest.mark.parametrize("part", ["worker", "coordinator", "evaluation", "storage"])
def test_there_is_a_policy_for_every_part_and_none_lets_everything_pass(part):
    policies = [m["spec"] for m in standing_objects(cluster_job()) if m["kind"] == "NetworkPolicy"]
    (spec,) = [s for s in policies if part in s["podSelector"]["matchExpressions"][0]["values"]]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    for rule in [*spec["ingress"], *spec["egress"]]:
        assert rule.get("from") or rule.get("to")


DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


@settings(max_examples=200, deadline=None)
@given(
    name=st.from_regex(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", fullmatch=True),
    uid=st.uuids().map(str),
    attempt=st.integers(1, 9999),
)
def test_no_name_exceeds_what_the_api_takes(name, uid, attempt):
    names = Names(Key("n", name), uid)
    longest = [
        names.coordinator,
        names.workers,
        f"{names.worker_job(attempt)}-99999",
        names.child("retention-0123456789ab-000"),
        names.child("eval-0123456789abcdef-000"),
        f"{names.base}-coordinator",
    ]
    for found in longest:
        assert len(found) <= 63, found
        assert DNS.fullmatch(found), found
    assert len(names.checkpoint("step-0000012345-1a2b3c4d5e6f")) <= 253


@settings(max_examples=100, deadline=None)
@given(first=st.uuids().map(str), second=st.uuids().map(str))
def test_two_jobs_of_one_name_share_no_name(first, second):
    if first != second:
        assert Names(Key("n", "x"), first).base != Names(Key("n", "x"), second).base


def test_a_baseline_is_evaluated_by_its_request_and_not_as_a_floor():
    """Both are models that do not change; only floors are told apart by a flag."""
    _, request = next(requests_of(REF, file().evaluations))
    baseline = Baseline(name="dinov2", kind="weights", uri="s3://bucket/dinov2.pth")
    commands = {}
    for name, asked in (("floors", request), ("baseline", request.model_copy(update={"baseline": baseline}))):
        made = small_job(cluster_job(), Child(f"floor-{name}", "floor", request=asked), owner={})
        (container,) = made["spec"]["template"]["spec"]["containers"]
        commands[name] = container["command"] + container.get("args", [])
        annotation = made["spec"]["template"]["metadata"]["annotations"]
        assert any(asked.to_json() == value for value in annotation.values())
    assert "--floors" in commands["floors"]
    assert "--floors" not in commands["baseline"]
    assert [part for part in commands["floors"] if part != "--floors"] == commands["baseline"]
