"""`sonoforge run` with real processes: the whole way, resized, killed, told to stop, and refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import LocalRun, differences, disturb, faults, write_job

from sonoforge_trainer.contract import EvaluationResult, RunSummary


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below a folder."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "runner.log"
    }


def job_text(run: LocalRun, old: str, new: str) -> None:
    """Edit the job file as a person would, in one go."""
    text = run.job.read_text()
    assert old in text
    edited = run.job.with_suffix(".edited")
    edited.write_text(text.replace(old, new))
    edited.replace(run.job)


def test_every_checkpoint_of_a_run_is_evaluated_once_and_the_page_is_written(calm, folder):
    assert [c.ref.step for c in calm.status.checkpoints] == [0, 16, 32]
    assert differences(calm, calm) == []
    assert calm.status.best
    assert calm.status.restarts == {}
    page = (folder / "state" / "calm" / "report.html").read_text()
    assert "tiny-knn/f1_macro" in page
    assert "raw-pixels" in page
    assert page.count("<figure") >= 2
    summary = RunSummary.from_json((folder / "state" / "calm" / "summary.json").read_text())
    assert [c.ref.step for c in summary.checkpoints] == [0, 16, 32]


def test_the_best_checkpoint_of_a_run_is_the_best_on_validation_and_the_page_says_so(calm, folder):
    """By the results in storage, which the runner never reads."""
    found = {}
    for checkpoint in calm.status.checkpoints:
        (result,) = Path(checkpoint.ref.uri.removeprefix("file://")).glob("eval/*.json")
        found[checkpoint.ref.id] = EvaluationResult.from_json(result.read_bytes()).scores
    val = {id_: scores["knn/val_f1_macro"].value for id_, scores in found.items()}
    assert len(set(val.values())) > 1
    assert calm.status.best == max(val, key=val.__getitem__)
    assert calm.status.best_compared == pytest.approx(val[calm.status.best], abs=1e-6)
    assert calm.status.best_score == pytest.approx(found[calm.status.best]["knn/f1_macro"].value, abs=1e-6)
    page = (folder / "state" / "calm" / "report.html").read_text()
    assert "chosen on validation, by tiny-knn/val_f1_macro" in page


def test_every_trained_checkpoint_has_the_three_health_numbers(calm):
    start, *trained = calm.status.checkpoints
    assert start.score("tiny-health/teacher_entropy") is None
    for checkpoint in trained:
        logged = calm.metrics[checkpoint.ref.step]["teacher_entropy"]
        assert checkpoint.score("tiny-health/teacher_entropy") == pytest.approx(logged, abs=1e-6)
    for checkpoint in calm.status.checkpoints:
        assert checkpoint.score("tiny-health/rankme") >= 1
        assert checkpoint.score("tiny-health/feature_deviation") > 0


def test_each_step_uses_every_virtual_rank_and_an_epoch_uses_every_sample_once(calm):
    """32 steps are two epochs of 240 samples and 32 samples of a third; `faults` looks at each of them."""
    assert faults(calm) == []
    assert sorted(calm.samples) == [(step, rank) for step in range(32) for rank in range(4)]
    assert sorted(calm.metrics) == list(range(1, 33))
    assert len({name for names in calm.samples.values() for name in names}) == 240


def test_running_a_finished_job_again_changes_nothing(calm, folder):
    before = snapshot(folder / "state" / "calm") | snapshot(folder / "runs" / "calm")
    again = LocalRun(folder / "calm.yaml")
    assert again.finish(60) == 0
    assert snapshot(folder / "state" / "calm") | snapshot(folder / "runs" / "calm") == before


def test_three_processes_learn_the_same_as_one(calm, start):
    run = start("three", nodes=3)
    assert run.finish(300) == 0, run.tail()
    assert differences(calm, run.outcome()) == []


def test_a_run_that_grows_shrinks_and_loses_processes_learns_the_same(calm, start):
    """1 -> 2 -> 3 -> 1 nodes while it runs, with a worker and an agent killed in between."""
    run = start("resized", nodes=1, every=8)
    for step, old, new, kind in ((8, 1, 2, "worker"), (16, 2, 3, "agent"), (24, 3, 1, "worker")):
        run.wait(lambda at=step: (p := run.progress()) is not None and any(c.step == at for c in p.checkpoints))
        os.kill(sorted(run.pids(kind))[0], signal.SIGKILL)
        job_text(run, f"maxNodes: {old}", f"maxNodes: {new}")
    assert run.finish(300) == 0, run.tail()
    outcome = run.outcome()
    assert differences(calm, outcome) == []
    assert {record["world_size"] for record in outcome.metrics.values()} >= {1, 2, 3}


def test_random_kills_of_every_process_change_nothing_that_was_learned(calm, start):
    run = start("killed", nodes=2)
    kills = disturb(run, kills=5, seed=3)
    assert run.finish(300) == 0, run.tail()
    assert differences(calm, run.outcome(kills)) == []
    assert len(kills) == 5


def test_a_runner_that_is_told_to_stop_saves_and_goes_on_when_it_is_called_again(calm, start):
    run = start("stopped", nodes=2, every=1000)
    run.wait(lambda: (p := run.progress()) is not None and p.step >= 4)
    run.runner.send_signal(signal.SIGTERM)
    assert run.runner.wait(120) == 143
    assert list((run.state / "children").glob("*.pid")) == []
    assert run.pids("agent") == []
    run.start_again()
    assert run.finish(300) == 0, run.tail()
    outcome = run.outcome()
    assert differences(calm, outcome) == []
    assert outcome.status.lost_steps == 0
    assert {c.ref.step for c in outcome.status.checkpoints} > {0, 32}


def test_a_second_runner_on_the_same_job_is_refused(start):
    run = start("locked", steps=400)
    run.wait(lambda: run.progress() is not None)
    command = [sys.executable, "-m", "sonoforge_trainer", "run", str(run.job), "--state", str(run.state)]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "another `sonoforge run` works on this job" in second.stderr


def test_a_job_that_cannot_work_fails_at_once_and_says_why(folder, start):
    path = write_job(folder, "wrong", steps=8, nodes=2)
    text = path.read_text()
    digest = "sha256:" + "0" * 64
    text = re.sub(r'data: \{shards: ("[^"]+")\}', rf"data: {{shards: \1, datasetDigest: '{digest}'}}", text)
    path.write_text(text.replace("  workers:", "  queueName: fast\n  ttlAfterFinished: 1h\n  workers:"))
    run = LocalRun(path)
    try:
        assert run.finish(120) == 1
    finally:
        run.stop()
    status = run.outcome().status
    assert status.phase == "Failed"
    condition = status.condition("Failed")
    assert condition is not None
    assert condition.reason == "Configuration"
    assert "datasetDigest" in condition.message
    told = re.findall(r"spec\.(\w+) means nothing on one machine", (run.state / "runner.log").read_text())
    assert told == ["queueName", "ttlAfterFinished"]


def test_a_changed_training_spec_is_refused_by_name(calm, folder):
    path = folder / "calm.yaml"
    before = path.read_text()
    path.write_text(before.replace("virtualRanks: 4", "virtualRanks: 2"))
    try:
        run = LocalRun(path)
        assert run.finish(60) == 64
        assert "spec.training: changed since this job was started, and it is immutable" in run.tail()
    finally:
        path.write_text(before)


def test_a_runner_that_is_told_twice_stops_at_once(start):
    run = start("hurried", steps=400)
    run.wait(lambda: (p := run.progress()) is not None and p.step >= 2)
    run.runner.send_signal(signal.SIGINT)
    run.wait(lambda: "stopping: workers save" in run.tail())
    run.runner.send_signal(signal.SIGINT)
    assert run.runner.wait(15) == 130
    assert list((run.state / "children").glob("*.pid")) == []
