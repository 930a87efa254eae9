"""The table that `make real` ends with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sonoforge_trainer.contract import CheckpointRef, CheckpointSummary, EvalSuiteSpec, Evaluation, RunSummary, Score
from sonoforge_trainer.storage import Storage

ROOT = Path(__file__).parents[2]


def comparison(*arguments):
    """The demo's own function; its folder is no package."""
    spec = importlib.util.spec_from_file_location("table", ROOT / "demo" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.comparison(*arguments)


def checkpoint(step, scores):
    ref = CheckpointRef(
        step=step,
        samples=step * 32,
        uri=f"file:///nowhere/step-{step}",
        manifest_digest=f"sha256:{step:064x}",
        created="",
    )
    return CheckpointSummary(ref=ref, scores=scores)


def test_the_last_checkpoint_stands_beside_the_baselines_and_the_best_is_marked(tmp_path):
    found = Score(value=0.75, low=0.7, high=0.8)
    summary = RunSummary(
        job="real",
        uid="u",
        phase="Succeeded",
        checkpoints_uri=tmp_path.as_uri(),
        checkpoints=(
            checkpoint(0, {"liver-knn/balanced_accuracy": Score(value=0.3, low=0.2, high=0.4)}),
            checkpoint(9, {"liver-knn/balanced_accuracy": found, "liver-knn/val_balanced_accuracy": Score(value=0.9)}),
        ),
        floors={
            "hog-lbp:liver-knn/balanced_accuracy": Score(value=0.74, low=0.69, high=0.79),
            "raw-pixels:liver-knn/balanced_accuracy": Score(value=0.4, low=0.35, high=0.45),
            "raw-pixels:liver-knn/accuracy": Score(value=0.4, low=0.35, high=0.45),
        },
    )
    suite = EvalSuiteSpec(
        evaluations=(
            Evaluation(name="liver", shards="s3://b/liver/shards.json", protocols=("knn",)),
            Evaluation(name="head", shards="s3://b/head/shards.json", protocols=("segment",)),
        )
    )
    assert comparison(summary, suite, Storage()) == (
        "| data set | protocol | random initialisation | last checkpoint | hog lbp | raw pixels |\n"
        "|---|---|---|---|---|---|\n"
        "| liver | knn balanced_accuracy | 0.300 (0.200 to 0.400) | **0.750 (0.700 to 0.800)** "
        "| 0.740 (0.690 to 0.790) = | 0.400 (0.350 to 0.450) |"
    )
