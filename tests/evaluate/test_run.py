"""Evaluations of checkpoints from storage to storage."""

import json
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from evaluation_material import png, request_of, write_checkpoint

from sonoforge_trainer.checkpoint import DamagedCheckpointError
from sonoforge_trainer.contract import (
    COMMIT,
    METRICS,
    TEACHER,
    EvaluationResult,
    is_validation_score,
    selection_score,
)
from sonoforge_trainer.evaluate.errors import EvaluationDataError
from sonoforge_trainer.evaluate.run import evaluate
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.shards.build import BuildRule, DataSetCard, Rendered, build
from sonoforge_trainer.shards.plan import Placed
from sonoforge_trainer.shards.sources import Row

CPU = torch.device("cpu")
ALL = ("knn", "linear", "logreg", "fewshot", "segment-probe", "health")


def path_of(uri):
    return Path(urlparse(uri).path)


def objects_of(checkpoint):
    folder = path_of(checkpoint[0])
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_protocol_works_on_one_pass_over_the_images(checkpoint, phantoms, storage):
    request = request_of(checkpoint, phantoms, *ALL)
    result = evaluate(request, storage, CPU)
    assert result.feature_passes == 1
    assert {name.split("/")[0] for name in result.scores} == set(ALL)
    assert result.step == 10
    assert result.samples == 320
    assert sum(result.counts.values()) == 144
    assert result.scores["knn/balanced_accuracy"].low <= result.scores["knn/balanced_accuracy"].value
    assert set(result.details["knn"]["recall"]) == {"abdomen", "background", "femur", "head", "heart", "spine"}
    assert result.details["segment-probe"]["images"] == result.details["knn"]["images"] == result.counts
    assert storage.read(request.result_uri) == result.to_json().encode()
    on_test = {name for name in result.scores if not is_validation_score(name)}
    assert {selection_score(name) for name in on_test} <= set(result.scores)
    assert {name for name in on_test if selection_score(name) == name} == {
        n for n in on_test if n.startswith("health/")
    }
    picture = storage.read(f"{checkpoint[0]}/eval/{result.pictures[0]}")
    assert picture.startswith(b"\x89PNG")


def test_the_health_of_a_checkpoint_has_the_entropy_that_its_run_logged_last(tmp_path, phantoms, storage):
    """And none at step 0, before which nothing is logged."""
    log = b'{"step": 5, "teacher_entropy": 4.5}\n{"step": 10, "teacher_entropy": 4.25}\n'
    found = []
    for step, metrics in ((10, log), (0, b"")):
        base = (tmp_path / f"run-{step}").as_uri()
        checkpoint = write_checkpoint(storage, base, step=step, metrics=metrics)
        found.append(evaluate(request_of(checkpoint, phantoms, "health"), storage, CPU).scores)
    assert found[0]["health/teacher_entropy"].value == 4.25
    assert {"health/rankme", "health/feature_deviation"} <= found[0].keys()
    assert found[0].keys() - found[1].keys() == {"health/teacher_entropy"}


def test_a_metric_log_that_was_altered_is_refused(tmp_path, phantoms, storage):
    checkpoint = write_checkpoint(storage, (tmp_path / "run").as_uri(), metrics=b'{"teacher_entropy": 4.5}\n')
    (path_of(checkpoint[0]) / METRICS).write_bytes(b'{"teacher_entropy": 9.5}\n')
    with pytest.raises(DamagedCheckpointError, match=r"metrics\.jsonl"):
        evaluate(request_of(checkpoint, phantoms, "health"), storage, CPU)


def test_a_set_without_validation_is_refused_because_nothing_could_be_chosen_on_it(tmp_path, checkpoint, storage):
    """Health asks for no labels and no splits: it is what such a set can be evaluated with."""
    random = np.random.default_rng(0)
    rows = [
        Row(n + 1, f"{n}.png", None, label="ab"[n % 2], split=split, patient=str(n))
        for n, split in enumerate(["train"] * 8 + ["test"] * 4)
    ]
    build(
        [[Placed(row, n, n) for n, row in enumerate(rows)]],
        DataSetCard("set"),
        lambda row: Rendered(png(random.integers(0, 256, (40, 40))), "png"),
        (tmp_path / "set").as_uri(),
        storage,
        KeyHasher(b"0" * 32),
        BuildRule(),
    )
    shards = (tmp_path / "set" / "shards.json").as_uri()
    with pytest.raises(EvaluationDataError, match=r"no usable sample in val; build the set .*--validation draws val"):
        evaluate(request_of(checkpoint, shards, "knn"), storage, CPU)
    assert "health/rankme" in evaluate(request_of(checkpoint, shards, "health"), storage, CPU).scores


def test_a_second_evaluation_of_the_same_set_costs_no_second_pass(checkpoint, phantoms, storage):
    first = evaluate(request_of(checkpoint, phantoms, "knn"), storage, CPU)
    second = evaluate(request_of(checkpoint, phantoms, "knn", name="again"), storage, CPU)
    other = evaluate(request_of(checkpoint, phantoms, "logreg", "segment-probe", name="other"), storage, CPU)
    assert [first.feature_passes, second.feature_passes, other.feature_passes] == [1, 0, 0]
    assert second.scores == first.scores


def test_another_resolution_is_another_pass(checkpoint, phantoms, storage):
    evaluate(request_of(checkpoint, phantoms, "knn"), storage, CPU)
    assert evaluate(request_of(checkpoint, phantoms, "knn", resolution=48), storage, CPU).feature_passes == 1


def test_doing_it_twice_changes_nothing(checkpoint, phantoms, storage):
    request = request_of(checkpoint, phantoms, "knn", "health")
    first = evaluate(request, storage, CPU)
    before = objects_of(checkpoint)
    assert evaluate(request, storage, CPU) == first
    assert objects_of(checkpoint) == before


def test_nothing_of_the_checkpoint_itself_is_touched(checkpoint, phantoms, storage):
    """Released code of the paper wrote beside its source, and parallel jobs raced."""
    before = objects_of(checkpoint)
    evaluate(request_of(checkpoint, phantoms, "knn"), storage, CPU)
    after = objects_of(checkpoint)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith(("eval/", "features-")) for name in after.keys() - before.keys())


def test_damaged_features_and_a_damaged_result_are_made_again(checkpoint, phantoms, storage):
    request = request_of(checkpoint, phantoms, "knn")
    first = evaluate(request, storage, CPU)
    kept = next(path_of(checkpoint[0]).glob("features-*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    path_of(request.result_uri).write_text('{"format": "cut o')
    again = evaluate(request, storage, CPU)
    assert again.feature_passes == 1
    assert again.scores == first.scores
    assert EvaluationResult.from_json(storage.read(request.result_uri)) == again


def test_a_teacher_that_was_altered_is_refused(checkpoint, phantoms, storage):
    teacher = path_of(checkpoint[0]) / TEACHER
    teacher.write_bytes(teacher.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedCheckpointError, match=r"teacher\.safetensors"):
        evaluate(request_of(checkpoint, phantoms, "knn"), storage, CPU)


def test_a_checkpoint_without_its_commit_does_not_exist(checkpoint, phantoms, storage):
    (path_of(checkpoint[0]) / COMMIT).unlink()
    with pytest.raises(DamagedCheckpointError, match="COMMIT"):
        evaluate(request_of(checkpoint, phantoms, "knn"), storage, CPU)


def test_another_checkpoint_under_the_same_address_is_refused(checkpoint, phantoms, storage):
    with pytest.raises(DamagedCheckpointError, match="digest"):
        evaluate(request_of((checkpoint[0], "sha256:" + "1" * 64), phantoms, "knn"), storage, CPU)


def test_two_checkpoints_have_different_numbers_and_each_its_own_features(tmp_path, phantoms, storage):
    base = (tmp_path / "run").as_uri()
    results = [
        evaluate(request_of(write_checkpoint(storage, base, step=s, seed=s), phantoms, "health"), storage, CPU)
        for s in (1, 2)
    ]
    assert [r.feature_passes for r in results] == [1, 1]
    assert results[0].scores != results[1].scores


def test_no_planted_name_is_in_results_features_pictures_or_logs(tmp_path, storage, capsys):
    """Patients, clips, references and a note of the source hold a name; the builder and the evaluation see them all."""
    name = "Zwetschgenmus"
    random = torch.Generator().manual_seed(0)
    rows = [
        Row(n + 1, f"{name}/{n}.png", None, label="ab"[n % 2], split=split, patient=f"{name} {n}", clip=f"{name}")
        for n, split in enumerate(["train"] * 12 + ["val"] * 6 + ["test"] * 6)
    ]

    def render(row):
        return Rendered(png(torch.randint(0, 256, (40, 40), generator=random).numpy()), "png")

    output = (tmp_path / "set").as_uri()
    plan = [[Placed(row, n, n) for n, row in enumerate(rows)]]
    build(plan, DataSetCard("set"), render, output, storage, KeyHasher(b"0" * 32), BuildRule())
    checkpoint = write_checkpoint(storage, (tmp_path / "run").as_uri())
    request = request_of(checkpoint, f"{output}/shards.json", "knn", "fewshot", "health", where={"split": "train"})
    with pytest.raises(ValueError, match="val and test") as caught:
        evaluate(request, storage, CPU)
    evaluate(request_of(checkpoint, f"{output}/shards.json", "knn", "fewshot", "health"), storage, CPU)
    said = capsys.readouterr()
    assert "protocol done" in said.out + said.err
    assert name not in said.out + said.err + str(caught.value)
    assert not [key for key, data in objects_of(checkpoint).items() if name.encode() in data]


def test_the_result_reads_as_the_contract_says(checkpoint, phantoms, storage):
    request = request_of(checkpoint, phantoms, "knn", name="short")
    evaluate(request, storage, CPU)
    document = json.loads(storage.read(f"{checkpoint[0]}/eval/short-{request.id}.json"))
    assert document["format"] == "sonoforge.evaluation/v1"
    assert document["featurePasses"] == 1
    assert set(document["seconds"]) == {"features", "knn", "artifacts"}
