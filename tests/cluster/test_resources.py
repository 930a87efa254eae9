"""A real API server takes the generated definitions, and refuses what a person should not write, in words that help."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sonoforge_operator import api, crd
from sonoforge_operator.resources import (
    BestCheckpoint,
    CheckpointObjectStatus,
    CheckpointSpec,
    LastCheckpoint,
    NodeCounts,
    PretrainJobStatus,
)
from sonoforge_operator.status import EvaluationStatus
from sonoforge_trainer.contract import CheckpointRef, Score, load_yaml_documents

ROOT = Path(__file__).parents[2]
CRDS = sorted((ROOT / "manifests/crds").glob("*.yaml"))
SAMPLES = sorted((ROOT / "manifests/samples").glob("*.yaml"))
NAMES = [f"{resource.plural}.sonoforge.dev" for resource in crd.RESOURCES]
CLUSTER = load_yaml_documents((ROOT / "manifests/samples/cluster.yaml").read_text(), where="cluster.yaml")
RUNTIME, SUITE, JOB = CLUSTER
REF = CheckpointRef(
    step=1250,
    samples=1_280_000,
    uri="s3://us-research/runs/fetal-vitb16/step-0000001250/attempt-a",
    manifest_digest="sha256:" + "1a" * 32,
    created="2026-01-01T00:00:00Z",
)


@pytest.fixture(scope="module", autouse=True)
def definitions(control_plane: Any) -> None:
    """The custom resources are served."""
    control_plane.kubectl("apply", "--server-side", *(f"--filename={file}" for file in CRDS))
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", *(f"crd/{n}" for n in NAMES))


@pytest.fixture
def job(kubectl: Callable[..., str]) -> Iterator[str]:
    """Name of the sample job, on the server."""
    create(kubectl, JOB)
    yield JOB["metadata"]["name"]
    kubectl("delete", "pretrainjob", JOB["metadata"]["name"])


def create(kubectl: Callable[..., str], document: Any, *options: str) -> str:
    return kubectl("create", "--filename=-", *options, stdin=json.dumps(document))


def refusal(kubectl: Callable[..., str], *arguments: str, **options: Any) -> str:
    """What the API server said when it refused."""
    with pytest.raises(subprocess.CalledProcessError) as refused:
        kubectl(*arguments, **options)
    return str(refused.value.stderr)


def changed(document: Any, **parts: Any) -> Any:
    """The document with other parts of its spec, given as `workers__minNodes=9`; None takes a part away."""
    made = copy.deepcopy(document)
    for path, value in parts.items():
        *parents, last = path.split("__")
        inner = made["spec"]
        for name in parents:
            inner = inner.setdefault(name, {})
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    return made


def table(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_the_definitions_are_structural_and_apply_twice_without_a_change(control_plane):
    before = control_plane.get("crd", *NAMES)["items"]
    for item in before:
        conditions = {c["type"]: c["status"] for c in item["status"]["conditions"]}
        assert conditions == {"NamesAccepted": "True", "Established": "True"}, item["metadata"]["name"]
    control_plane.kubectl("apply", "--server-side", *(f"--filename={file}" for file in CRDS))
    after = control_plane.get("crd", *NAMES)["items"]
    assert [i["metadata"]["generation"] for i in after] == [i["metadata"]["generation"] for i in before]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_a_sample_is_accepted_by_the_server_with_every_field_known(kubectl, sample):
    told = kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", f"--filename={sample}")
    documents = load_yaml_documents(sample.read_text(), where=sample.name)
    assert told.count("serverside-applied (server dry run)") == len(documents)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(JOB, workers__minNodes=9), "minNodes is above maxNodes; lower minNodes or raise maxNodes"),
        (changed(JOB, workers__minNodes=2, workers__maxNodes=None), "minNodes is above maxNodes;"),
        (changed(JOB, evaluation__suiteRef=None), "bestBy needs evaluations to choose by; name an EvalSuite"),
        (changed(JOB, evaluation__bestBy=None), "stopAfterNoGain needs a score that can gain; name it in bestBy"),
        (changed(JOB, training__recipe__virtualRanks=30), "globalBatch is not a multiple of virtualRanks"),
        (
            changed(JOB, training__recipe__crops={"localSize": 100}),
            "recipe.crops.localSize is not a multiple of model.patchSize; change one of them",
        ),
        (
            changed(JOB, training__recipe__preset="ultradyno"),
            'Unsupported value: "ultradyno": supported values: "dinov2-short", "ultradino", "tiny"',
        ),
        (changed(JOB, training__recipe__seed=-1), "spec.training.recipe.seed in body should be greater than or equal"),
        (changed(JOB, restartPolicy__stallAfter="soon"), "spec.restartPolicy.stallAfter in body should match"),
        (changed(JOB, checkpoints__keeplast=3), 'unknown field "spec.checkpoints.keeplast"'),
        (changed(JOB, checkpoints=None), "spec.checkpoints: Required value"),
        ({**JOB, "metadata": {"name": "x" * 64}}, "the name is a label of other objects, so it may have at most 63"),
        (
            changed(SUITE, evaluations=SUITE["spec"]["evaluations"] * 2),
            'Duplicate value: {"name":"planes"}',
        ),
        (
            changed(SUITE, baselines=[{"name": "dinov2", "kind": "weights"}]),
            "a baseline of kind weights needs its file; give uri",
        ),
        (
            changed(SUITE, baselines=[{"name": "random", "kind": "random", "uri": "s3://b/a.pth"}]),
            "uri goes with kind weights only; change the kind or remove uri",
        ),
        (
            changed(SUITE, baselines=[{"name": "same", "kind": kind} for kind in ("hog", "random")]),
            'Duplicate value: {"name":"same"}',
        ),
        (
            changed(JOB, training__init={"uri": "https://host/dinov2.pth"}),
            "spec.training.init.uri in body should match",
        ),
        (
            changed(RUNTIME, workers__tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]),
            "operator Exists compares no value; remove the value or use Equal",
        ),
        (changed(RUNTIME, evaluation__tolerations=[{"value": "b"}]), "operator Equal needs a key; give one or use"),
        (changed(RUNTIME, network__storageCidrs=["10.20.0.0"]), "spec.network.storageCidrs[0]"),
        (changed(RUNTIME, workers__requests={"memory": "64 GB"}), "spec.workers.requests.memory in body should match"),
        (changed(RUNTIME, userId=0), "spec.userId in body should be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_refused_with_what_to_do(kubectl, document, message):
    said = refusal(
        kubectl, "create", "--filename=-", "--dry-run=server", "--validate=strict", stdin=json.dumps(document)
    )
    assert message in said


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (
            {"training": {"recipe": {"seed": 1}}},
            "spec.training: Invalid value: "
            "training decides the result and cannot change; create another job with the new settings",
        ),
        (
            {"training": {"recipe": {"loss": {"koleo": 0.2}}}},
            "spec.training: Invalid value: training decides the result and cannot change",
        ),
        (
            {"checkpoints": {"uri": "s3://us-research/runs/other"}},
            "spec.checkpoints.uri: Invalid value: "
            "the run continues from the checkpoints at this uri, so it cannot change; create another job",
        ),
    ],
)
def test_what_would_break_a_run_cannot_change(kubectl, job, patch, message):
    said = refusal(kubectl, "patch", "pj", job, "--type=merge", f"--patch={json.dumps({'spec': patch})}")
    assert re.sub(r'(Invalid value: )("[^"]*"|\w+)(: )', r"\1", said).count(message) == 1


def test_what_is_safe_to_change_can_change_while_a_job_runs(kubectl, job):
    patch = {
        "workers": {"minNodes": 2, "maxNodes": 4},
        "suspend": True,
        "checkpoints": {"keepLast": 5},
        "evaluation": {"stopAfterNoGain": None, "parallel": 1},
    }
    kubectl("patch", "pj", job, "--type=merge", f"--patch={json.dumps({'spec': patch})}")
    spec = json.loads(kubectl("get", "pj", job, "--output=json"))["spec"]
    assert spec["workers"]["maxNodes"] == 4
    assert "stopAfterNoGain" not in spec["evaluation"]


def test_a_job_is_resized_by_kubectl_scale_within_its_bounds(kubectl, job):
    kubectl("patch", "pj", job, "--type=merge", '--patch={"spec": {"workers": {"minNodes": 2}}}')
    kubectl("scale", "pj", job, "--replicas=5")
    assert json.loads(kubectl("get", "pj", job, "--output=json"))["spec"]["workers"]["maxNodes"] == 5
    assert "minNodes is above maxNodes; lower minNodes or raise maxNodes" in refusal(
        kubectl, "scale", "pj", job, "--replicas=1"
    )


def test_a_job_reads_the_same_from_a_file_and_from_the_server(kubectl, job):
    served = json.loads(kubectl("get", "pj", job, "--output=json"))
    assert served["spec"]["training"] == JOB["spec"]["training"]
    assert api.parse_job(served).spec == api.parse_job(JOB).spec
    for document, parse in ((RUNTIME, api.parse_runtime), (SUITE, api.parse_suite)):
        answer = json.loads(create(kubectl, document, "--dry-run=server", "--output=json"))
        assert parse(answer).spec == parse(document).spec


def test_a_number_or_an_empty_value_in_a_runtime_is_taken(kubectl):
    document = changed(RUNTIME, workers__requests={"cpu": 8}, workers__sharedMemory="", accelerator__resourceName="")
    answer = json.loads(create(kubectl, document, "--dry-run=server", "--output=json"))
    read = api.parse_runtime(answer).spec
    assert (read.workers.requests, read.workers.shared_memory) == ({"cpu": "8"}, "")
    assert read.accelerator.resource_name == ""


def test_a_field_may_be_null_where_nothing_is_given(kubectl):
    document = changed(JOB, ttlAfterFinished=None)
    document["spec"] |= {"ttlAfterFinished": None, "evaluation": {"suiteRef": None, "bestBy": None}}
    answer = json.loads(create(kubectl, document, "--dry-run=server", "--output=json"))
    assert api.parse_job(answer).spec == api.parse_job(document).spec


def test_explain_reads_like_documentation(kubectl):
    said = " ".join(kubectl("explain", "pj.spec.training.recipe").split())
    for text in (
        "The training recipe; a preset gives what is left out.",
        "globalBatch <integer> Images in one optimiser step, whatever the number of processes. "
        "Default: the preset's (dinov2-short 2048, ultradino 128, tiny 32).",
        "preset <string> enum: dinov2-short, ultradino, tiny Where numbers that are not given come from. "
        "Default: dinov2-short.",
    ):
        assert text in said


@pytest.mark.parametrize("kind", ["pj", "prt", "evs", "ckpt"])
def test_every_field_is_explained(kubectl, kind):
    assert "<no description>" not in kubectl("explain", kind, "--recursive=false")
    assert "<no description>" not in kubectl("explain", f"{kind}.spec")


def test_get_shows_where_a_job_stands(kubectl, job):
    status = PretrainJobStatus(
        phase="Running",
        nodes=NodeCounts(ready=7, max=8),
        nodes_text="7/8",
        step=1250,
        progress_text="2.0 %",
        eta="3h20m",
        last_checkpoint=LastCheckpoint(name="c", step=1250, samples=1_280_000, time="2026-01-01T00:00:00Z"),
        best=BestCheckpoint(name="c", score=0.81),
        best_text="0.810",
        restarts={"infrastructure": 2},
        restarts_total=2,
        queue="night",
        loss=11.5,
        loss_text="11.50",
        throughput_text="1,024/s",
        reason="Stepping",
        record={"attempts": [{"a": 1}]},
    ).document()
    kubectl("patch", "pj", job, "--subresource=status", "--type=merge", f"--patch={json.dumps({'status': status})}")
    header, row = table(kubectl("get", "pj", job))
    assert header == ["NAME", "PHASE", "NODES", "STEP", "PROGRESS", "ETA", "CKPT-AGE", "BEST", "RESTARTS", "AGE"]
    assert row[:6] == [job, "Running", "7/8", "1250", "2.0 %", "3h20m"]
    assert re.fullmatch(r"\d+[dhms].*", row[6])  # the age of the checkpoint
    assert row[7:9] == ["0.810", "2"]
    wide_header, wide_row = table(kubectl("get", "pj", job, "--output=wide"))
    assert wide_header[10:] == ["QUEUE", "LOSS", "THROUGHPUT", "REASON"]
    assert wide_row[10:] == ["night", "11.50", "1,024/s", "Stepping"]
    served = json.loads(kubectl("get", "pj", job, "--output=json"))["status"]
    assert PretrainJobStatus.parse(served).document() == status
    assert json.loads(kubectl("get", "pj", job, "--subresource=scale", "--output=json"))["status"]["replicas"] == 7


def test_get_shows_a_checkpoint_and_its_scores(kubectl):
    document = {
        "apiVersion": "sonoforge.dev/v1alpha1",
        "kind": "Checkpoint",
        "metadata": {"name": f"fetal-vitb16-{REF.id}"},
        "spec": CheckpointSpec.of(REF, job="fetal-vitb16", job_uid="u1").document(),
    }
    create(kubectl, document)
    evaluation = EvaluationStatus(
        name="planes", id="1a", phase="Succeeded", scores={"planes-knn/f1_macro": Score(value=0.81, low=0.8, high=0.82)}
    )
    status = CheckpointObjectStatus(
        phase="Evaluated", evaluations=(evaluation,), scores_text="planes-knn 0.810", best=True
    ).document()
    name = document["metadata"]["name"]
    kubectl("patch", "ckpt", name, "--subresource=status", "--type=merge", f"--patch={json.dumps({'status': status})}")
    header, row = table(kubectl("get", "ckpt", name))
    assert header == ["NAME", "JOB", "STEP", "SAMPLES", "SCORES", "BEST", "STATE", "AGE"]
    assert row[:7] == [name, "fetal-vitb16", "1250", "1280000", "planes-knn 0.810", "true", "Evaluated"]
    served = json.loads(kubectl("get", "ckpt", name, "--output=json"))
    assert CheckpointSpec.parse(served["spec"]).ref == REF
    assert CheckpointObjectStatus.parse(served["status"]).document() == status
    said = refusal(kubectl, "patch", "ckpt", name, "--type=merge", '--patch={"spec": {"step": 1}}')
    assert "a Checkpoint is a record of what was made; it cannot change" in said


def test_one_word_lists_objects_of_every_kind(kubectl, job):
    assert f"pretrainjob.sonoforge.dev/{job}" in kubectl("get", "sonoforge", "--output=name").splitlines()
