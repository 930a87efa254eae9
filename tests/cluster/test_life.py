"""The whole life of a job on a real control plane: from `kubectl apply` to Succeeded, and what `kubectl get` says."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from operators import OperatorProcess, apply_crds, grant
from played import Played
from played_coordinators import Switchboard

JOB = """
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainJob
metadata: {name: fetal}
spec:
  runtimeRef: {name: cpu}
  training:
    data: {shards: s3://b/set/shards.json}
    recipe: {preset: tiny, budgetSamples: 3200, globalBatch: 32, virtualRanks: 4}
  workers: {minNodes: 1, maxNodes: 3}
  checkpoints: {uri: s3://b/run, everySamples: 640, keepLast: 2}
  evaluation: {suiteRef: {name: planes}, bestBy: planes-knn/f1_macro, floors: false, parallel: 2}
---
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainRuntime
metadata: {name: cpu}
spec: {accelerator: {resourceName: ""}}
---
apiVersion: sonoforge.dev/v1alpha1
kind: EvalSuite
metadata: {name: planes}
spec:
  evaluations:
    - {name: planes, shards: s3://b/e/shards.json, protocols: [knn]}
"""


@pytest.fixture(scope="module")
def switchboard() -> Iterator[Switchboard]:
    board = Switchboard()
    yield board
    board.close()


@pytest.fixture(scope="module")
def played(api_client, namespace, nodes, switchboard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    with Played(api_client, namespace, tmp_path_factory.mktemp("played"), switchboard) as playing:
        yield playing


@pytest.fixture(scope="module")
def operator(control_plane, namespace, switchboard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    apply_crds(control_plane)
    folder: Path = tmp_path_factory.mktemp("operator")
    with OperatorProcess(grant(control_plane, namespace), namespace, folder, switchboard.url) as process:
        process.wait_until_ready()
        yield process


def get(kubectl, *what: str) -> Any:
    return json.loads(kubectl("get", *what, "--output=json"))


def test_a_job_is_applied_trained_evaluated_and_succeeds(operator, played, kubectl):
    kubectl("apply", "--filename=-", stdin=JOB)
    played.paused = True

    def phase() -> str:
        return str(get(kubectl, "pj", "fetal").get("status", {}).get("phase"))

    operator.wait_for(lambda: phase() != "None", "a status", 30)
    operator.wait_for(lambda: len(get(kubectl, "ckpt")["items"]) == 1, "the first checkpoint", 60)
    played.paused = False
    operator.wait_for(lambda: phase() == "Running", "Running", 30)
    operator.wait_for(lambda: phase() == "Succeeded", "Succeeded", 120)

    job = get(kubectl, "pj", "fetal")
    status = job["status"]
    assert (status["step"], status["steps"], status["percent"]) == (100, 100, 100)
    assert status["checkpoints"] == {"total": 6, "evaluated": 6, "failed": 0}
    conditions = {c["type"]: c["status"] for c in status["conditions"]}
    assert conditions["Succeeded"] == "True"
    assert (conditions["Failed"], conditions["Training"], conditions["Stalled"]) == ("False", "False", "False")
    assert status["observedGeneration"] == job["metadata"]["generation"]

    found = {c["spec"]["step"]: c for c in get(kubectl, "ckpt")["items"]}
    assert sorted(found) == [0, 20, 40, 60, 80, 100]
    assert [s for s, c in found.items() if c["status"].get("best")] == [100]
    assert {c["status"]["phase"] for c in found.values()} == {"Evaluated"}
    assert sorted(s for s, c in found.items() if c["status"].get("pruned")) == [0, 20, 40, 60]
    run = played.runs["fetal"]
    assert [n for n in Counter(run.evaluated).values() if n != 1] == []
    assert len(run.evaluated) == 6

    assert [d["metadata"]["name"] for d in get(kubectl, "deployments")["items"]] == []
    alive = [p for p in get(kubectl, "pods")["items"] if p["status"]["phase"] in ("Pending", "Running")]
    assert alive == []
    table = kubectl("get", "pj,ckpt")
    assert "Succeeded" in table
    assert "100.0%" in table
    assert not played.errors, played.errors


def test_kubeflow_trainer_2991_a_finished_job_is_not_begun_anew(operator, played, kubectl):
    """Neither by a new operator, nor by a change of what it is made of."""
    before, status = jobs_of(kubectl), get(kubectl, "pj", "fetal")["status"]
    assert before
    operator.kill()
    operator.start()
    operator.wait_until_ready()
    touch(operator, kubectl)
    assert jobs_of(kubectl) == before
    assert get(kubectl, "pj", "fetal")["status"] == status


@pytest.mark.parametrize("again", [False, True], ids=["the-same-operator", "another-operator"])
def test_kubeflow_trainer_3779_children_that_a_ttl_deleted_of_a_finished_job_are_not_made_again(
    operator, played, kubectl, again
):
    """There the deletion of the children looked like a job that had yet to begin, for ever."""
    status = get(kubectl, "pj", "fetal")["status"]
    if again:
        operator.kill()
    kubectl("delete", "jobs,pods,deployments", "--all", "--cascade=foreground")
    if again:
        operator.start()
        operator.wait_until_ready()
    touch(operator, kubectl)
    assert jobs_of(kubectl) == set()
    assert get(kubectl, "pods,deployments")["items"] == []
    assert get(kubectl, "pj", "fetal")["status"] == status


def jobs_of(kubectl) -> set[str]:
    return {j["metadata"]["uid"] for j in get(kubectl, "jobs")["items"]}


def touch(operator, kubectl) -> None:
    """Change the suite of the job, and wait until the operator looked at it."""
    count = "sonoforge_reconcile_seconds_count"
    before = operator.metrics().get(count, 0)
    suite = yaml.safe_load(JOB.split("---")[2])
    suite["metadata"]["labels"] = {"touched": str(time.monotonic())}
    kubectl("apply", "--filename=-", stdin=yaml.safe_dump(suite))
    operator.wait_for(lambda: operator.metrics().get(count, 0) > before, "a pass", 30)
