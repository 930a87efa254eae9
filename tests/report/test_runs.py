"""Where runs are found: state folders, summaries, and what checkpoints left in storage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from report_material import commit

from sonoforge_trainer.checkpoint.store import PRUNED
from sonoforge_trainer.contract import (
    MANIFEST,
    Baseline,
    CheckpointSummary,
    ContractError,
    EvaluationResult,
    Score,
)
from sonoforge_trainer.report.catalogue import list_runs
from sonoforge_trainer.report.cli import put_summary
from sonoforge_trainer.report.runs import metric_records, open_run, read_run, survey
from sonoforge_trainer.storage import Storage


@pytest.fixture
def storage():
    return Storage()


def test_each_step_of_the_log_is_there_once_also_after_retention_deleted_the_states(summary, storage):
    records = metric_records(summary, storage)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert records[3]["loss"] == 9.0


def test_a_run_is_found_in_its_state_folder_and_by_its_summary(summary, storage, tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "summary.json").write_text(summary.to_json())
    assert open_run(str(folder), storage) == open_run(str(folder / "summary.json"), storage) == summary


def test_a_run_is_found_in_storage_by_what_its_checkpoints_left(summary, storage, tmp_path):
    real = commit(summary, ("a", "a", "b"))
    found = survey(real.checkpoints_uri, storage)
    assert [c.ref for c in found.checkpoints] == [c.ref for c in real.checkpoints]
    assert [c.scores["planes-knn/f1_macro"].value for c in found.checkpoints] == [0.25, 0.75, 0.5]
    assert (found.job, found.uid, found.training) == ("fetal", "u", None)
    (event,) = found.events
    assert (event.reason, event.step, event.world_size) == ("NewProcessGroup", 10, 2)
    assert open_run(str(tmp_path), storage) == found


def test_a_published_summary_adds_what_storage_does_not_say(summary, storage):
    real = commit(summary, ("a", "a", "a"))
    put_summary(real, storage)
    found = survey(real.checkpoints_uri, storage)
    assert found.floors == real.floors
    assert found.events == real.events
    assert found.checkpoints == real.checkpoints


def test_baselines_beside_the_checkpoints_are_lines_and_rows_without_any_summary(summary, storage):
    real = commit(summary, ("a", "a", "a"))
    result = EvaluationResult.from_json(Path(real.checkpoints[0].results[0].removeprefix("file://")).read_text())
    baseline = Baseline(name="natural", kind="random")
    request = result.request.model_copy(update={"baseline": baseline})
    scores = {"knn/f1_macro": Score(value=0.625), "knn/val_f1_macro": Score(value=0.5)}
    text = result.model_copy(update={"request": request, "scores": scores}).to_json()
    storage.write(f"{real.checkpoints_uri}/baselines/{baseline.id}/eval/planes-0011.json", text.encode())
    before = list_runs(real.checkpoints_uri, storage)
    assert survey(real.checkpoints_uri, storage).floors == {"natural:planes-knn/f1_macro": Score(value=0.625)}
    storage.write(f"{real.checkpoints_uri}/baselines/{baseline.id}/eval/planes-0011.json", b"{}")
    assert survey(real.checkpoints_uri, storage).floors == {}
    assert list_runs(real.checkpoints_uri, storage)[0].digest != before[0].digest


def test_of_an_evaluation_whose_options_were_changed_the_newer_result_counts(summary, storage):
    real = commit(summary, ("a", "a", "a"))
    path = Path(real.checkpoints[0].results[0].removeprefix("file://"))
    result = EvaluationResult.from_json(path.read_text())
    asked = result.request.model_copy(update={"baseline": Baseline(name="natural", kind="random")})
    baselines = f"{real.checkpoints_uri}/baselines/b/eval"
    for name, age, value in (("0", 10, 0.375), ("1", 20, 0.125), ("2", 30, 0.0625)):
        scores = {"knn/f1_macro": Score(value=value)}
        if age > 10:
            scores["linear/f1_macro"] = Score(value=0.9)  # the newest leaves a protocol out
        for uri, request in ((path.parent.as_uri(), result.request), (baselines, asked)):
            text = result.model_copy(update={"scores": scores, "request": request}).to_json()
            storage.write(f"{uri}/planes-{name}.json", text.encode())
            then = path.stat().st_mtime + 60 - age
            os.utime(f"{uri.removeprefix('file://')}/planes-{name}.json", (then, then))
    old = {"natural:planes-knn/f1_macro": Score(value=0.7), "natural:planes-linear/f1_macro": Score(value=0.9)}
    put_summary(real.model_copy(update={"floors": old}), storage)
    found = survey(real.checkpoints_uri, storage)
    assert found.checkpoints[0].scores["planes-knn/f1_macro"].value == 0.375
    assert "planes-linear/f1_macro" not in found.checkpoints[0].scores
    assert found.floors == {"natural:planes-knn/f1_macro": Score(value=0.375)}
    run = read_run(found, storage)
    assert run.results[0].result.scores["knn/f1_macro"].value == 0.375
    assert [one.checkpoint.ref.step for one in run.results] == [0, 10, 20], "one result each"
    assert [one.result.scores["knn/f1_macro"].value for _, one in run.baselines] == [0.375]


def test_a_run_that_went_on_after_its_summary_shows_its_new_checkpoints(summary, storage):
    real = commit(summary, ("a", "a", "a"))
    put_summary(real.model_copy(update={"checkpoints": real.checkpoints[:1]}), storage)
    found = survey(real.checkpoints_uri, storage)
    assert [c.ref.step for c in found.checkpoints] == [0, 10, 20]
    assert found.checkpoints[2].scores["planes-knn/f1_macro"].value == 0.5


def test_a_checkpoint_whose_state_was_deleted_keeps_its_scores(summary, storage):
    real = commit(summary, ("a", "a", "a"))
    ref = real.checkpoints[1].ref
    folder = Path(ref.uri.removeprefix("file://"))
    (folder / PRUNED).write_text(ref.to_json())
    (folder / MANIFEST).unlink()
    found = survey(real.checkpoints_uri, storage)
    assert [c.ref for c in found.checkpoints] == [c.ref for c in real.checkpoints]
    assert found.checkpoints[1].scores["planes-knn/f1_macro"].value == 0.75


def test_what_lies_in_storage_cannot_lead_to_another_place(summary, storage, tmp_path):
    """A PRUNED object and a summary name URIs; a page reads below the run alone."""
    real = commit(summary, ("a", "a", "a"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "metrics.jsonl").write_text('{"step": 7, "samples": 1, "loss": 666.0}\n')
    ref = real.checkpoints[1].ref
    folder = Path(ref.uri.removeprefix("file://"))
    (folder / PRUNED).write_text(ref.model_copy(update={"uri": elsewhere.as_uri()}).to_json())
    lies = tuple(
        c.model_copy(update={"results": tuple(f"{elsewhere.as_uri()}/{u.rpartition('/')[2]}" for u in c.results)})
        for c in real.checkpoints
    )
    put_summary(real.model_copy(update={"checkpoints": lies}), storage)
    found = survey(real.checkpoints_uri, storage)
    assert [c.ref.uri for c in found.checkpoints] == [c.ref.uri for c in real.checkpoints]
    assert [c.results for c in found.checkpoints] == [c.results for c in real.checkpoints]
    assert 666.0 not in [record["loss"] for record in metric_records(found, storage)]


def test_what_lies_beside_a_result_is_not_taken_for_one(summary, storage):
    real = commit(summary, ("a", "a", "a"))
    for checkpoint in real.checkpoints:
        for uri in checkpoint.results:
            storage.write(f"{uri.removesuffix('.json')}/evidence.json", b"{}")
            storage.write(f"{uri.removesuffix('.json')}/gallery.json", b"{}")
    put_summary(real, storage)
    assert survey(real.checkpoints_uri, storage).checkpoints == real.checkpoints


def test_a_log_that_cannot_be_read_is_left_out(summary, storage):
    path = Path(summary.checkpoints[1].ref.uri.removeprefix("file://")) / "metrics.jsonl"
    for text in ('{"step": 1', "[1]", "{}", "3"):
        path.write_text(text)
        assert [r["step"] for r in metric_records(summary, storage)] == list(range(10, 21))


def test_a_damaged_checkpoint_is_left_out(summary, storage):
    real = commit(summary, ("a", "a", "a"))
    folder = Path(real.checkpoints[1].ref.uri.removeprefix("file://"))
    (folder / MANIFEST).write_text("{}")
    assert [c.ref.step for c in survey(real.checkpoints_uri, storage).checkpoints] == [0, 20]


def test_the_best_checkpoint_is_chosen_on_validation_where_a_score_is_named(summary, storage):
    real = commit(summary, ("a", "a", "a"))
    for checkpoint, val in zip(real.checkpoints, (0.1, 0.2, 0.9), strict=True):
        path = Path(checkpoint.results[0].removeprefix("file://"))
        document = json.loads(path.read_text())
        document["scores"]["knn/val_f1_macro"] = {"value": val}
        path.write_text(json.dumps(document))
    found = survey(real.checkpoints_uri, storage, best_by="planes-knn/f1_macro")
    assert [c.best for c in found.checkpoints] == [False, False, True]
    with pytest.raises(ContractError, match="bestBy: found 'planes-linear/f1_macro', which no checkpoint has"):
        survey(real.checkpoints_uri, storage, best_by="planes-linear/f1_macro")
    with pytest.raises(ContractError, match="its validation counterpart decides"):
        survey(real.checkpoints_uri, storage, best_by="planes-knn/val_f1_macro")


def test_a_place_without_a_run_is_refused_with_what_would_do(storage, tmp_path):
    with pytest.raises(ContractError, match="no checkpoint is committed below it"):
        open_run(tmp_path.as_uri(), storage)
    with pytest.raises(ContractError, match=r"no such file or folder\. Allowed: a state folder"):
        open_run(str(tmp_path / "nothing"), storage)


def test_runs_are_read_from_a_bucket(summary, s3):
    real = commit(summary, ("a", "a", "b"))
    root = Path(summary.checkpoints_uri.removeprefix("file://"))
    for path in root.rglob("*"):
        if path.is_file():
            s3.storage.write(f"{s3.uri}/run/{path.relative_to(root)}", path.read_bytes())
    found = open_run(f"{s3.uri}/run", s3.storage)
    assert [c.ref.step for c in found.checkpoints] == [0, 10, 20]
    assert all(isinstance(c, CheckpointSummary) and c.results for c in found.checkpoints)
    assert [c.ref.manifest_digest for c in found.checkpoints] == [c.ref.manifest_digest for c in real.checkpoints]
