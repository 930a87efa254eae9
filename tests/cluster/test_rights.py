"""What the operator may do with the rights of its installation, asked of the real API server, and what it may not."""

from __future__ import annotations

import pytest
from kubernetes import client
from operators import apply_crds, grant

MUST = [
    ("get", "sonoforge.dev", "pretrainjobs", ""),
    ("watch", "sonoforge.dev", "pretrainjobs", ""),
    ("delete", "sonoforge.dev", "pretrainjobs", ""),
    ("patch", "sonoforge.dev", "pretrainjobs", "status"),
    ("create", "sonoforge.dev", "checkpoints", ""),
    ("patch", "sonoforge.dev", "checkpoints", "status"),
    ("create", "batch", "jobs", ""),
    ("patch", "batch", "jobs", ""),
    ("delete", "batch", "jobs", ""),
    ("watch", "", "pods", ""),
    ("delete", "", "pods", ""),
    ("create", "apps", "deployments", ""),
    ("create", "", "configmaps", ""),
    ("create", "", "serviceaccounts", ""),
    ("create", "networking.k8s.io", "networkpolicies", ""),
    ("create", "", "events", ""),
    ("watch", "coordination.k8s.io", "leases", ""),
]
MUST_NOT = [
    *((verb, "", "secrets", "") for verb in ("get", "list", "watch", "create", "update", "patch", "delete")),
    ("create", "", "pods", "exec"),
    ("get", "", "pods", "exec"),
    ("create", "", "pods", "attach"),
    ("create", "", "pods", "portforward"),
    ("create", "", "pods", ""),
    ("patch", "", "pods", ""),
    ("create", "", "pods", "eviction"),
    ("get", "", "nodes", ""),
    ("patch", "", "nodes", ""),
    ("update", "", "nodes", "status"),
    ("create", "", "serviceaccounts", "token"),
    ("impersonate", "", "users", ""),
    ("escalate", "rbac.authorization.k8s.io", "roles", ""),
    ("bind", "rbac.authorization.k8s.io", "roles", ""),
    ("create", "rbac.authorization.k8s.io", "rolebindings", ""),
    ("patch", "sonoforge.dev", "pretrainjobs", ""),
    ("update", "sonoforge.dev", "pretrainjobs", ""),
    ("delete", "sonoforge.dev", "checkpoints", ""),
    ("patch", "sonoforge.dev", "pretrainruntimes", ""),
    ("patch", "sonoforge.dev", "evalsuites", ""),
    ("delete", "", "configmaps", ""),
]


@pytest.fixture(scope="module")
def allowed(control_plane, api_client, namespace):
    """Whether the operator may do something, by a SubjectAccessReview."""
    apply_crds(control_plane)
    grant(control_plane, namespace)
    reviews = client.AuthorizationV1Api(api_client)

    def ask(verb: str, group: str, resource: str, subresource: str, where: str = namespace, name: str = "") -> bool:
        attributes = client.V1ResourceAttributes(
            verb=verb, group=group, resource=resource, subresource=subresource, namespace=where, name=name
        )
        user = f"system:serviceaccount:{namespace}:sonoforge-operator"
        spec = client.V1SubjectAccessReviewSpec(user=user, resource_attributes=attributes)
        review = reviews.create_subject_access_review(client.V1SubjectAccessReview(spec=spec))
        return bool(review.status.allowed)

    return ask


@pytest.mark.parametrize("right", MUST, ids=lambda right: "-".join(filter(None, right)))
def test_the_operator_may(allowed, right):
    assert allowed(*right)


@pytest.mark.parametrize("right", MUST_NOT, ids=lambda right: "-".join(filter(None, right)))
def test_the_operator_may_not(allowed, right):
    assert not allowed(*right)


def test_it_may_renew_its_own_lease_and_no_other(allowed):
    lease = ("update", "coordination.k8s.io", "leases", "")
    assert allowed(*lease, name="sonoforge-operator")
    assert not allowed(*lease, name="kube-scheduler")
    assert not allowed(*lease)


def test_its_rights_end_at_its_namespace(allowed):
    for right in MUST:
        assert not allowed(*right, where="default")
        assert not allowed(*right, where="")
