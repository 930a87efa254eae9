"""Jobs that cannot run as they are, objects that somebody made or edited by hand, and jobs that are over."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml
from sites import Site, job, open_site
from test_life import JOB

from sonoforge_operator.resources import CheckpointSpec
from sonoforge_trainer.contract import CheckpointRef


@pytest.fixture
def site(opened: Site) -> Iterator[Site]:
    yield opened
    opened.played.paused = False


@pytest.fixture(scope="module")
def opened(control_plane, api_client, nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(control_plane, api_client, tmp_path_factory.mktemp("site"), "rejected") as made:
        yield made


def test_a_job_waits_for_its_runtime_and_starts_once_it_is_there(site):
    site.apply(job("early", runtimeRef={"name": "later"}))
    site.operator.wait_for(lambda: site.accepted("early") == ("False", "RuntimeNotFound"), "it is not accepted", 20)
    status = site.status("early")
    assert (status["phase"], status["reason"]) == ("Pending", "RuntimeNotFound")
    assert (
        "PretrainJob.spec.runtimeRef.name: found 'later'. Allowed: a PretrainRuntime of this namespace (cpu)"
        in status["message"]
    )
    assert site.children("early") == []
    runtime = yaml.safe_load(JOB.split("---")[1])
    site.apply({**runtime, "metadata": {"name": "later"}})
    site.operator.wait_for(lambda: site.accepted("early") == ("True", "Valid"), "it is accepted", 10)
    site.wait_for_phase("early", "Succeeded")


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        (
            {"evaluation": {"suiteRef": {"name": "planes"}, "bestBy": "heads-knn/f1_macro", "floors": False}},
            {"evaluation": {"bestBy": "planes-knn/f1_macro"}},
            "PretrainJob.spec.evaluation.bestBy: found 'heads-knn/f1_macro'. Allowed: one of planes-knn, with /METRIC",
        ),
        (
            {"runtimeRef": {"name": "small"}, "workers": {"minNodes": 1, "maxNodes": 3}},
            {"workers": {"maxNodes": 2}},
            "PretrainJob.spec.workers.maxNodes: found 3. Allowed: at most 2, the runtime's limits.maxNodes",
        ),
    ],
    ids=["no-such-score", "wider-than-its-runtime"],
)
def test_a_job_that_makes_no_sense_is_invalid_until_it_is_corrected(site, request, wrong, right, message):
    name = request.node.callspec.id
    runtime = yaml.safe_load(JOB.split("---")[1])
    site.apply({**runtime, "metadata": {"name": "small"}, "spec": {**runtime["spec"], "limits": {"maxNodes": 2}}})
    site.apply(job(name, **wrong))
    site.wait_for_phase(name, "Invalid", 20)
    assert site.accepted(name) == ("False", "Invalid")
    assert message in site.status(name)["message"]
    assert site.children(name) == []
    site.kubectl("patch", "pj", name, "--type=merge", f"--patch={json.dumps({'spec': right})}")
    site.operator.wait_for(lambda: site.accepted(name) == ("True", "Valid"), "it is accepted", 10)
    site.wait_for_phase(name, "Succeeded")


@pytest.mark.parametrize(
    "garbage",
    [
        {"record": {"uid": 7, "attempt": "many", "restarts": ["no"]}},
        {"record": {"phase": {"of": "the moon"}, "checkpoints": "all"}, "phase": "Running", "conditions": []},
    ],
    ids=["of-wrong-types", "of-wrong-shapes"],
)
def test_a_job_whose_record_was_edited_to_garbage_is_left_alone_and_disturbs_no_other(site, request, garbage):
    """Edited while the operator runs, which remembers, and again while it is away, when it reads what is there."""
    poisoned, good = f"poisoned-{request.node.callspec.id}", f"good-{request.node.callspec.id}"
    patch = ("patch", "pj", poisoned, "--subresource=status", "--type=merge")
    site.played.paused = True
    site.apply(job(poisoned))
    site.operator.wait_for(lambda: site.status(poisoned).get("attempt") == 1, "it is accepted", 30)
    site.kubectl(*patch, f"--patch={json.dumps({'status': garbage})}")
    site.operator.kill()
    site.kubectl(*patch, f"--patch={json.dumps({'status': garbage})}")
    site.operator.start()
    site.operator.wait_until_ready()
    site.apply(job(good))
    site.played.paused = False
    site.wait_for_phase(good, "Succeeded")
    assert site.accepted(poisoned) == ("False", "RecordUnreadable")
    gone = json.dumps([{"op": "remove", "path": "/status/record"}])
    site.kubectl("patch", "pj", poisoned, "--subresource=status", "--type=json", f"--patch={gone}")
    site.wait_for_phase(poisoned, "Succeeded")


def test_labels_of_another_job_make_nothing_its_child(site, job_of):
    """A Checkpoint, a pod and a job that say they belong to another one, and a Job that looks like its workers."""
    site.played.paused = True
    site.apply(job("robbed"), job("robber"))
    site.operator.wait_for(
        lambda: site.played.runs["robbed"].storage if "robbed" in site.played.runs else False, "it runs", 60
    )
    uid = site.get("pj", "robbed")["metadata"]["uid"]
    labels = {
        "app.kubernetes.io/managed-by": "sonoforge",
        "sonoforge.dev/job": "robbed",
        "sonoforge.dev/job-uid": uid,
        "sonoforge.dev/part": "worker",
        "sonoforge.dev/attempt": "1",
        "batch.kubernetes.io/job-completion-index": "0",
    }
    site.kubectl("label", "pj", "robber", *(f"{name}={value}" for name, value in labels.items()))
    template = job_of("forged")["spec"]["template"]
    hold = {"cluster.sonoforge.dev/hold": "yes"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "forged", "labels": labels, "annotations": hold}}
    ref = CheckpointRef(
        step=10,
        samples=320,
        uri="s3://b/elsewhere/step-0000000010/attempt-0",
        manifest_digest=f"sha256:{10:064x}",
        created="2026-01-01T00:00:00Z",
    )
    spec = CheckpointSpec.of(ref, job="robbed", job_uid=uid).document()
    checkpoint = {
        "apiVersion": "sonoforge.dev/v1alpha1",
        "kind": "Checkpoint",
        "metadata": {"name": "forged", "labels": labels},
    }
    owner = {
        "apiVersion": "sonoforge.dev/v1alpha1",
        "kind": "PretrainJob",
        "name": "robbed",
        "uid": uid,
        "controller": True,
    }
    workers = job_of("forged", suspend=True)
    workers["metadata"] |= {"labels": labels | {"sonoforge.dev/attempt": "none"}, "ownerReferences": [owner]}
    site.apply(pod | {"spec": template["spec"]}, checkpoint | {"spec": spec}, workers)
    forged = site.get("pod", "forged")["metadata"]["uid"]
    site.played.paused = False
    site.wait_for_phase("robbed", "Succeeded")
    site.wait_for_phase("robber", "Succeeded")
    status = site.status("robbed")
    assert (status["checkpoints"]["total"], status["restartsTotal"], status["attempt"]) == (2, 0, 1)
    assert site.get("pod", "forged")["metadata"]["uid"] == forged
    assert "status" not in site.get("ckpt", "forged"), "nobody evaluates it"
    assert site.played.errors == []


def test_a_job_goes_with_everything_of_it_some_time_after_its_end(site):
    site.apply(job("brief", ttlAfterFinished="5s"))
    site.wait_for_phase("brief", "Succeeded")
    assert site.children("brief") != []
    site.operator.wait_for(lambda: "brief" not in site.kubectl("get", "pj", "--output=name"), "the job goes", 30)
    site.operator.wait_for(lambda: site.children("brief") == [], "all of it goes", 60)
