"""What the chart's roles and admission policies let people do, asked of the real API server."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from components import wait_for
from control_plane import ControlPlane
from helm import Helm, Manifest
from operators import own_namespace
from sites import job

from sonoforge_operator.resources import CheckpointSpec
from sonoforge_trainer.contract import CheckpointRef

KINDS = ("ClusterRole", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
OPERATOR, PERSON = "system:serviceaccount:{}:sonoforge-operator", "alice"
REF = CheckpointRef(
    step=20,
    samples=640,
    uri="s3://b/run/step-0000000020/attempt-a",
    manifest_digest=f"sha256:{7:064x}",
    created="2026-01-01T00:00:00Z",
)
LABELS = {"sonoforge.dev/job-uid": "0", "sonoforge.dev/part": "worker"}


@dataclass
class Guarded:
    """A namespace with the roles and policies of the chart, and a person who may do nearly everything in it."""

    control_plane: ControlPlane
    namespace: str

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.control_plane.kubectl(f"--namespace={self.namespace}", *arguments, **options)

    def refusal(self, *arguments: str, user: str = PERSON, manifest: Manifest | None = None) -> str:
        """Why a user may not do something; empty where they may."""
        stdin = yaml.safe_dump(manifest) if manifest else None
        try:
            self.kubectl(f"--as={user}", "--as-group=system:authenticated", *arguments, stdin=stdin)
        except subprocess.CalledProcessError as error:
            return str(error.__notes__)
        return ""

    def created(self, manifest: Manifest, *, user: str = PERSON) -> str:
        """Why a user may not make an object; empty where they may. Nothing is made."""
        return self.refusal("create", "--dry-run=server", "--filename=-", user=user, manifest=manifest)

    def may(self, verb: str, resource: str, group: str) -> bool:
        """Whether members of a group, with a role of the cluster in this namespace, may do something."""
        kind, _, part = resource.partition("/")
        asked = ("auth", "can-i", verb, kind, f"--subresource={part}", "--as=somebody", f"--as-group={group}")
        return self.kubectl(*asked, check=False).strip() == "yes"


@pytest.fixture(scope="module")
def guarded(newest_helm: Helm, control_plane, nodes) -> Iterator[Guarded]:
    with own_namespace(control_plane, "guarded") as namespace:
        values = {"trainerImage": {"digest": "sha256:" + "5f" * 32}, "admissionPolicy": {"requireDigests": True}}
        manifests = [m for m in newest_helm.render(values, namespace=namespace) if m["kind"] in KINDS]
        bindings = [
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "RoleBinding",
                "metadata": {"name": role, "namespace": namespace},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                "subjects": [{"kind": "Group", "name": f"{role}s", "apiGroup": "rbac.authorization.k8s.io"}],
            }
            for role in ("view", "edit", "admin", "cluster-admin")
        ]
        for user in (PERSON, OPERATOR.format(namespace), OPERATOR.format("another-namespace")):
            bindings[-1]["subjects"].append({"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"})
        made = Guarded(control_plane, namespace)
        text = yaml.safe_dump_all([*manifests, *bindings])
        control_plane.kubectl("apply", "--server-side", "--filename=-", stdin=text)
        wait_for(lambda: "only the operator" in made.created(pod("probe", LABELS)), "the policies are in force", 30)
        yield made
        control_plane.kubectl("delete", "--filename=-", stdin=yaml.safe_dump_all(manifests))


def spec_of_pod() -> Manifest:
    restricted = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    return {"containers": [{"name": "main", "image": "example.invalid/x:1", "securityContext": restricted}]}


def pod(name: str, labels: Manifest) -> Manifest:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec_of_pod()}


def controller(kind: str, labels: Manifest) -> Manifest:
    """An object that makes pods with these labels."""
    template = {"metadata": {"labels": {"app": "x", **labels}}, "spec": spec_of_pod()}
    metadata = {"name": kind.lower()}
    if kind == "Job":
        template["spec"]["restartPolicy"] = "Never"
        return {"apiVersion": "batch/v1", "kind": kind, "metadata": metadata, "spec": {"template": template}}
    spec = {"selector": {"matchLabels": {"app": "x"}}, "template": template}
    more = {"serviceName": "x"} if kind == "StatefulSet" else {}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": metadata, "spec": spec | more}


def checkpoint(name: str) -> Manifest:
    return {
        "apiVersion": "sonoforge.dev/v1alpha1",
        "kind": "Checkpoint",
        "metadata": {"name": name},
        "spec": CheckpointSpec.of(REF, job="fetal", job_uid="0").document(),
    }


def test_the_clusters_own_roles_take_in_the_custom_resources(guarded: Guarded):
    """Researchers write jobs and suites; runtimes, which bound them, are written by administrators."""
    wait_for(lambda: guarded.may("create", "pretrainjobs", "edits"), "the roles are aggregated", 30)
    wait_for(lambda: guarded.may("create", "pretrainruntimes", "admins"), "the roles are aggregated", 30)
    wait_for(lambda: guarded.may("list", "checkpoints", "views"), "the roles are aggregated", 30)
    rights = [
        ("create", "pretrainjobs"),
        ("patch", "evalsuites"),
        ("patch", "pretrainjobs/scale"),
        ("create", "pretrainruntimes"),
        ("delete", "checkpoints"),
        ("create", "checkpoints"),
        ("patch", "pretrainjobs/status"),
    ]
    granted = {group: [guarded.may(*right, group) for right in rights] for group in ("views", "edits", "admins")}
    assert granted == {
        "views": [False] * 7,
        "edits": [True, True, True, False, False, False, False],
        "admins": [True, True, True, True, True, False, False],
    }
    for group in ("views", "edits", "admins"):
        assert all(guarded.may("list", kind, group) for kind in ("pretrainjobs", "pretrainruntimes", "checkpoints"))


def test_only_the_operator_makes_checkpoints_whatever_rights_others_have(guarded: Guarded):
    refusal = guarded.created(checkpoint("step-20"))
    assert "only the operator writes Checkpoints and statuses" in refusal
    assert guarded.created(checkpoint("step-20"), user=OPERATOR.format(guarded.namespace)) == ""
    assert "only the operator" in guarded.created(checkpoint("step-20"), user=OPERATOR.format("another-namespace"))


def test_only_the_operator_writes_statuses(guarded: Guarded):
    guarded.kubectl("create", "--filename=-", stdin=yaml.safe_dump(job("told")))
    patch = (
        "patch",
        "pj",
        "told",
        "--subresource=status",
        "--type=merge",
        '--patch={"status": {"phase": "Succeeded"}}',
    )
    assert "only the operator writes Checkpoints and statuses" in guarded.refusal(*patch)
    assert guarded.refusal(*patch, user=OPERATOR.format(guarded.namespace)) == ""
    assert guarded.refusal("patch", "pj", "told", "--type=merge", '--patch={"spec": {"suspend": true}}') == ""
    assert guarded.refusal("delete", "pj", "told") == ""


def test_nobody_else_makes_pods_that_count_as_those_of_a_job(guarded: Guarded):
    assert guarded.created(pod("notebook", {"app": "x"})) == ""
    for labels in (LABELS, {"sonoforge.dev/job-uid": "0"}, {"sonoforge.dev/part": "worker"}):
        assert "only the operator makes pods of a PretrainJob" in guarded.created(pod("false", labels))
    for kind in ("Job", "Deployment", "ReplicaSet"):
        assert guarded.created(controller(kind, {})) == ""
        assert "only the operator makes pods of a PretrainJob" in guarded.created(controller(kind, LABELS))
    assert guarded.created(controller("Job", LABELS), user=OPERATOR.format(guarded.namespace)) == ""


def test_pods_of_a_job_keep_their_labels_and_others_do_not_get_them(guarded: Guarded):
    guarded.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all([pod("worker", LABELS), pod("plain", {})]))
    assert "only the operator" in guarded.refusal("label", "pod", "plain", "sonoforge.dev/job-uid=0")
    assert "only the operator" in guarded.refusal("label", "pod", "worker", "sonoforge.dev/job-uid-")
    assert "only the operator" in guarded.refusal(
        "label", "pod", "worker", "sonoforge.dev/part=coordinator", "--overwrite"
    )
    assert guarded.refusal("label", "pod", "worker", "note=seen") == ""
    assert guarded.refusal("annotate", "pod", "plain", "note=seen") == ""


def test_a_controller_that_no_rule_names_gets_no_such_pods_either(guarded: Guarded):
    """A StatefulSet is let in, and its pods are not: they come from a controller that makes none for the operator."""
    guarded.kubectl("create", "--filename=-", stdin=yaml.safe_dump(controller("StatefulSet", LABELS)))

    def refused() -> bool:
        events = guarded.kubectl("get", "events", "--field-selector=reason=FailedCreate", "--output=json")
        return "only the operator makes pods of a PretrainJob" in events

    wait_for(refused, "the event of the refusal", 30)
    assert guarded.kubectl("get", "pods", "--selector=app=x", "--output=name") == ""


def test_pods_of_a_job_come_from_the_jobs_of_the_operator(guarded: Guarded):
    wanted = controller("Job", LABELS)
    guarded.kubectl(
        f"--as={OPERATOR.format(guarded.namespace)}", "create", "--filename=-", stdin=yaml.safe_dump(wanted)
    )
    found = ("get", "pods", "--selector=batch.kubernetes.io/job-name=job", "--output=name")
    wait_for(lambda: guarded.kubectl(*found) != "", "its pod", 30)


def test_administrators_of_the_cluster_can_repair_by_hand(guarded: Guarded):
    guarded.kubectl("create", "--dry-run=server", "--filename=-", stdin=yaml.safe_dump(checkpoint("step-20")))


def test_an_image_without_a_digest_is_refused_where_that_is_asked_for(guarded: Guarded):
    def runtime(image: str) -> Manifest:
        spec = {"images": {"trainer": image}} if image else {}
        return {
            "apiVersion": "sonoforge.dev/v1alpha1",
            "kind": "PretrainRuntime",
            "metadata": {"name": "default"},
            "spec": spec,
        }

    assert "spec.images.trainer: found an image without a digest" in guarded.created(runtime("trainer:1"))
    assert guarded.created(runtime("")) == ""
    assert guarded.created(runtime("trainer@sha256:" + "5f" * 32)) == ""


def test_other_namespaces_are_not_concerned(guarded: Guarded):
    with own_namespace(guarded.control_plane, "unguarded") as namespace:
        other = Guarded(guarded.control_plane, namespace)
        other.kubectl("create", "rolebinding", PERSON, "--clusterrole=cluster-admin", f"--user={PERSON}")
        wait_for(lambda: other.created(pod("plain", {})) == "", "the right to make pods", 30)
        assert other.created(pod("false", LABELS)) == ""
        assert other.created(checkpoint("step-20")) == ""
