"""Small builders of Kubernetes objects, as an API server gives them."""

from __future__ import annotations

import json
from typing import Any

import yaml

from sonoforge_operator.api import JobFile, parse_job_file
from sonoforge_operator.cluster.desired import ClusterJob
from sonoforge_operator.cluster.names import Key, Names

JOB = """
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainJob
metadata: {name: fetal.v2, uid: 0b8a4d4e-5b0e-4b8e-9f0a-1c2d3e4f5a6b}
spec:
  runtimeRef: {name: a100}
  training:
    data: {shards: s3://b/set/shards.json}
    recipe: {preset: tiny, budgetSamples: 3200, globalBatch: 32, virtualRanks: 8}
  workers: {minNodes: 1, maxNodes: 3, gpusPerNode: 2, nodeSelector: {zone: a}}
  checkpoints: {uri: s3://b/run, everySamples: 320}
  evaluation: {suiteRef: {name: planes}, bestBy: planes-knn/f1_macro}
---
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainRuntime
metadata: {name: a100}
spec:
  images: {trainer: "sonoforge/trainer@sha256:1111", pullSecrets: [pull]}
  workers:
    nodeSelector: {gpu: a100}
    tolerations: [{key: gpu, operator: Exists, effect: NoSchedule}]
    priorityClassName: training
    requests: {cpu: "8", memory: 64Gi}
    limits: {memory: 64Gi}
  evaluation: {gpus: 1}
  queueName: research
  storage:
    endpointUrl: https://s3.example.org
    credentialsSecret: s3
    caBundle: ca
    pathStyle: true
  network: {storageCidrs: [10.1.0.0/16], storagePorts: [8333]}
  hashKeySecret: hash
---
apiVersion: sonoforge.dev/v1alpha1
kind: EvalSuite
metadata: {name: planes}
spec:
  evaluations:
    - {name: planes, shards: s3://b/e/shards.json, protocols: [knn]}
"""


def documents() -> list[dict[str, Any]]:
    """The job, the runtime and the suite above."""
    return list(yaml.safe_load_all(JOB))


def file(text: str = JOB) -> JobFile:
    """The same as one job file."""
    return parse_job_file(text, where="job.yaml")


def cluster_job(
    name: str = "fetal.v2", uid: str = "0b8a4d4e-5b0e-4b8e-9f0a-1c2d3e4f5a6b", *, text: str = JOB
) -> ClusterJob:
    """The job above in a cluster."""
    return ClusterJob(
        names=Names(Key("research", name), uid),
        file=file(text),
        token_digest="sha256:" + "0" * 64,
        default_image="",
        operator_namespace="sonoforge-system",
    )


def pod(
    job_uid: str,
    index: int | None = None,
    *,
    uid: str = "pod-1",
    phase: str = "Running",
    created: str = "2026-01-01T00:00:00Z",
    state: dict[str, Any] | None = None,
    conditions: list[dict[str, Any]] | None = None,
    deleted: str | None = None,
    part: str = "worker",
    reason: str | None = None,
) -> dict[str, Any]:
    """A pod of a Job."""
    labels = {"sonoforge.dev/part": part}
    if index is not None:
        labels["batch.kubernetes.io/job-completion-index"] = str(index)
    return {
        "metadata": {
            "name": uid,
            "namespace": "research",
            "uid": uid,
            "creationTimestamp": created,
            "labels": labels,
            "ownerReferences": [{"kind": "Job", "uid": job_uid, "controller": True}],
            **({"deletionTimestamp": deleted} if deleted else {}),
        },
        "spec": {"nodeName": "node-a"},
        "status": {
            "phase": phase,
            "conditions": conditions or [],
            "containerStatuses": [{"state": state or {"running": {"startedAt": created}}}],
            "podIP": "10.0.0.7",
            **({"reason": reason} if reason else {}),
        },
    }


def ended(code: int, said: dict[str, Any] | None = None, reason: str = "Error") -> dict[str, Any]:
    """The state of a container that ended."""
    message = {"message": json.dumps(said)} if said else {}
    return {"terminated": {"exitCode": code, "reason": reason, "startedAt": "2026-01-01T00:00:01Z", **message}}


def worker_job(attempt: int = 1, *, uid: str = "job-1", parallelism: int = 3, **spec: Any) -> dict[str, Any]:
    """The Indexed Job of an attempt."""
    return {
        "metadata": {
            "name": f"workers-{attempt}",
            "namespace": "research",
            "uid": uid,
            "labels": {"sonoforge.dev/part": "worker", "sonoforge.dev/attempt": str(attempt)},
        },
        "spec": {"parallelism": parallelism, **spec},
    }


def small_job(child: str, *, uid: str = "job-2", condition: str | None = None) -> dict[str, Any]:
    """The Job of an evaluation."""
    return {
        "metadata": {
            "name": f"x-{child}",
            "namespace": "research",
            "uid": uid,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"sonoforge.dev/part": "evaluation", "sonoforge.dev/child": child},
        },
        "status": {"conditions": [{"type": condition, "status": "True"}] if condition else []},
    }
