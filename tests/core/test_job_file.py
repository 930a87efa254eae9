"""A job file is read with errors that lead to the line and the field."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import JOB

from sonoforge_operator.api import parse_job_file, seconds
from sonoforge_trainer.contract import ContractError, read_suite

SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"


def test_a_job_with_its_suite_is_read():
    file = parse_job_file(JOB, where="job.yaml")
    assert file.job.spec.training.recipe.steps == 100
    assert [e.name for e in file.evaluations] == ["planes"]
    assert file.run_config("u1").checkpoints.uri == "s3://b/run"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("minNodes: 1", "minNodes: 3", "PretrainJob.spec.workers.minNodes: found 3. Allowed: at most maxNodes 2"),
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
        (
            "planes-knn/f1_macro",
            "planes-knn/f1_marco",
            "bestBy: found 'planes-knn/f1_marco'. Allowed: planes-knn/ with one of accuracy, balanced_accuracy, f1",
        ),
        (
            "maxNodes: 2",
            "maxNodes: 3, gpusPerNode: 2",
            "PretrainJob.spec.workers.maxNodes: found 3. Allowed: at most 2 (maxNodes x workers.gpusPerNode 2 <= "
            "training.recipe.virtualRanks 4)",
        ),
        (
            "maxNodes: 2",
            "maxNodes: 1, gpusPerNode: 8",
            "PretrainJob.spec.workers.maxNodes: found 1. Allowed: none, lower workers.gpusPerNode (maxNodes x "
            "workers.gpusPerNode 8 <= training.recipe.virtualRanks 4)",
        ),
        (
            "protocols: [knn]",
            "protocols: [knn], k: [10, 0]",
            "spec.evaluations.0.k.1: found 0. Allowed: a whole number",
        ),
        ("protocols: [knn]", "protocols: [knn], shots: []", "spec.evaluations.0.shots: found []. Allowed: a list of"),
        (
            "protocols: [knn]",
            "protocols: [segment], segment: {decoder: unet}",
            "spec.evaluations.0.segment.decoder: found 'unet'. Allowed: one of linear, upernet",
        ),
        (
            "protocols: [knn]",
            "protocols: [segment], segment: {batch: 1}",
            "spec.evaluations.0.segment.batch: found 1. Allowed: a whole number",
        ),
        (
            "protocols: [knn]",
            "protocols: [finetune], finetune: {layerDecay: 1.5}",
            "spec.evaluations.0.finetune.layerDecay: found 1.5. Allowed: a number",
        ),
        (
            "protocols: [knn]",
            "protocols: [finetune], finetune: {labelSmooting: 0.1}",
            "spec.evaluations.0.finetune.labelSmooting: unknown key; did you mean 'labelSmoothing'?",
        ),
        ("protocols: [knn]", "protocols: [knn], seed: -1", "spec.evaluations.0.seed: found -1. Allowed: a whole"),
        ("protocols: [knn]", "protocols: [knn], resolution: 0", "spec.evaluations.0.resolution: found 0. Allowed: a"),
        ("preset: tiny", "preset: tinny", "spec.training.recipe.preset: found 'tinny'. Allowed: one of"),
        (
            "kind: EvalSuite",
            "kind: EvalSweet",
            "found kind 'EvalSweet'. Allowed: PretrainJob, PretrainRuntime, EvalSuite",
        ),
        ("keepLast: 2", "keepLast: 2, everySeconds: 0", "everySeconds: found 0. Allowed: a whole number > 0"),
        (
            "maxNodes: 2",
            "maxNodes: 2, nodeSelector: {'a b': x}",
            "spec.workers.nodeSelector.a b: found 'a b'. Allowed: a text at most 317 long matching ^",
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


@pytest.mark.parametrize("found", ["'5x'", "5"])
def test_a_field_of_several_types_is_refused_in_one_line_that_allows_each(found):
    text = JOB.replace("  workers:", f"  restartPolicy: {{stallAfter: {found}}}\n  workers:")
    with pytest.raises(ContractError) as error:
        parse_job_file(text, where="job.yaml")
    assert str(error.value) == (
        f"job.yaml: PretrainJob.spec.restartPolicy.stallAfter: found {found}. Allowed: auto or a text at most 32 long "
        "matching ^([0-9]+(s|m|h|d))+$"
    )


@pytest.mark.parametrize(
    ("protocols", "best_by", "known"),
    [
        ("[fewshot], shots: [1, 3]", "planes-fewshot/logreg_3shot_f1_macro", True),
        ("[fewshot], shots: [1, 3]", "planes-fewshot/logreg_5shot_f1_macro", False),
        ("[segment-probe]", "planes-segment-probe/dice_foreground_per_image", True),
        ("[segment-probe]", "planes-segment-probe/f1_macro", False),
        ("[segment]", "planes-segment/iou_mean", True),
        ("[segment]", "planes-segment/5shot_iou_mean", False),
        ("[segment], segment: {shots: [5]}", "planes-segment/5shot_iou_mean", True),
        ("[finetune]", "planes-finetune/auroc_macro", True),
        ("[finetune]", "planes-finetune/dice_mean", False),
        ("[health, knn]", "planes-health/rankme", True),
        ("[health, knn]", "planes-health/f1_macro", False),
    ],
)
def test_the_metric_that_decides_is_one_that_its_protocol_reports(protocols, best_by, known):
    text = JOB.replace("planes-knn/f1_macro", best_by).replace("protocols: [knn]", f"protocols: {protocols}")
    if known:
        assert parse_job_file(text, where="job.yaml").job.spec.evaluation.best_by == best_by
    else:
        with pytest.raises(ContractError, match=f"bestBy: found '{best_by}'. Allowed: {best_by.split('/')[0]}/ with"):
            parse_job_file(text, where="job.yaml")


def test_a_worker_for_each_virtual_rank_is_allowed():
    text = JOB.replace("maxNodes: 2", "maxNodes: 2, gpusPerNode: 2")
    assert parse_job_file(text, where="job.yaml").job.spec.workers.gpus_per_node == 2


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_samples_are_valid(path):
    text = path.read_text()
    if "kind: PretrainJob" in text:
        assert parse_job_file(text, where=path.name).evaluations
    else:
        assert read_suite(text, where=path.name).baselines


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
