"""A job file is read with errors that lead to the line and the field."""

from __future__ import annotations

import pytest
from builders import JOB

from sonoforge_operator.api import parse_job_file, seconds
from sonoforge_trainer.contract import ContractError


def test_a_job_with_its_suite_is_read():
    file = parse_job_file(JOB, where="job.yaml")
    assert file.job.spec.training.recipe.steps == 100
    assert [e.name for e in file.evaluations] == ["planes"]
    assert file.run_config("u1").checkpoints.uri == "s3://b/run"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("minNodes: 1", "minNodes: 3", "job.yaml: PretrainJob.spec.workers: minNodes 3 is above maxNodes 2"),
        ("suiteRef: {name: planes}", "suiteRef: {name: plains}", "suiteRef.name: found 'plains'. Allowed: an object"),
        (
            "planes-knn/f1_macro",
            "planes-linear/f1_macro",
            "bestBy: found 'planes-linear/f1_macro'. Allowed: one of planes-knn",
        ),
        (
            "planes-knn/f1_macro",
            "planes-knn/val_f1_macro",
            "spec.evaluation.bestBy: found 'planes-knn/val_f1_macro'. Allowed: the score to show, without 'val_'",
        ),
        ("preset: tiny", "preset: tinny", "spec.training.recipe.preset: found 'tinny'. Allowed: one of"),
        (
            "kind: EvalSuite",
            "kind: EvalSweet",
            "found kind 'EvalSweet'. Allowed: PretrainJob, PretrainRuntime, EvalSuite",
        ),
        ("keepLast: 2", "keepLast: 2, keepLast: 3", "job.yaml, line 10: key 'keepLast' is given twice"),
        ("maxNodes: 2", "maxNodes: [", "job.yaml, line"),
        ("keepBest: 1", "keepbest: 1", "spec.checkpoints.keepbest: unknown key; did you mean 'keepBest'?"),
    ],
)
def test_a_mistake_is_named_with_its_place(old, new, message):
    with pytest.raises(ContractError) as error:
        parse_job_file(JOB.replace(old, new), where="job.yaml")
    assert message in str(error.value)


def test_two_jobs_in_a_file_are_refused():
    with pytest.raises(ContractError, match=r"found 2 PretrainJob documents. Allowed: exactly one"):
        parse_job_file(JOB + "---" + JOB.split("---")[0], where="job.yaml")


def test_what_a_cluster_adds_to_an_object_is_left_alone():
    text = JOB.replace(
        "metadata: {name: fetal}", "metadata: {name: fetal, labels: {a: b}, managedFields: []}\nstatus: {x: 1}"
    )
    assert parse_job_file(text, where="job.yaml").job.metadata.name == "fetal"


def test_durations_add_up():
    assert seconds("1h30m") == 5400
    assert seconds("7d") == 604_800
