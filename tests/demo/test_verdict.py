"""The demo fails where its last checkpoint is not better than the random initialisation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sonoforge_operator.api import parse_job_file
from sonoforge_trainer.contract import CheckpointRef, CheckpointSummary, RunSummary, Score

ROOT = Path(__file__).parents[2]
JOB = (ROOT / "manifests" / "samples" / "demo.yaml").read_text()
NAME = "phantoms-linear/f1_macro"


@pytest.fixture(scope="module")
def verdict():
    """The demo's own function; its folder is no package."""
    spec = importlib.util.spec_from_file_location("verdict", ROOT / "demo" / "verdict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.verdict


def run_of(text, scores):
    """The job and the summary of a run with these scores of its steps."""
    file = parse_job_file(text, where="demo.yaml")
    checkpoints = [
        CheckpointSummary(
            ref=CheckpointRef(
                step=step,
                samples=step * 32,
                uri=f"s3://b/run/step-{step:010d}/attempt-a",
                manifest_digest=f"sha256:{step:064x}",
                created="",
            ),
            scores={} if value is None else {file.job.spec.evaluation.best_by: Score(value=value)},
        )
        for step, value in scores.items()
    ]
    summary = RunSummary(
        job="demo",
        uid="u",
        phase="Succeeded",
        training=file.job.spec.training,
        checkpoints_uri="s3://b/run",
        best_by=file.job.spec.evaluation.best_by,
        checkpoints=tuple(checkpoints),
    )
    return file, summary


@pytest.mark.parametrize(
    ("best_is", "scores", "learned", "sentence"),
    [
        ("highest", {0: 0.25, 150: 0.9, 300: 0.5}, True, "0.2500 at random initialisation, 0.5000 at step 300; better"),
        ("highest", {0: 0.5, 150: 0.9, 300: 0.25}, False, "0.2500 at step 300; not better (margin -0.2500)"),
        ("highest", {0: 0.5, 300: 0.5}, False, "not better (margin 0.0000)"),
        ("lowest", {0: 0.5, 300: 0.25}, True, "better by 0.2500"),
        ("lowest", {0: 0.25, 300: 0.5}, False, "not better (margin -0.2500)"),
        ("highest", {150: 0.1, 300: 0.5}, False, "the random initialisation (step 0) has no score"),
        ("highest", {0: 0.1, 150: 0.5}, False, "the last step (step 300) has no score"),
        ("highest", {0: 0.1, 300: None}, False, "the last step (step 300) has no score"),
    ],
)
def test_a_run_learned_where_its_last_step_is_better_than_its_first(verdict, best_is, scores, learned, sentence):
    found = verdict(*run_of(JOB.replace(f"bestBy: {NAME}", f"bestBy: {NAME}, bestIs: {best_is}"), scores))
    assert found.learned == learned
    assert NAME in found.sentence
    assert sentence in found.sentence


def test_a_job_that_names_no_score_is_not_shown_to_have_learned(verdict):
    file, summary = run_of(JOB, {0: 0.1, 300: 0.5})
    file = parse_job_file(JOB.replace(f", bestBy: {NAME}", ""), where="demo.yaml")
    assert not verdict(file, summary).learned
