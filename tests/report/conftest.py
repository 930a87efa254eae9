"""A run of three checkpoints on disk, and the tags of a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sonoforge_trainer.contract import (
    CheckpointRef,
    CheckpointSummary,
    Evaluation,
    EvaluationRequest,
    EvaluationResult,
    RunEvent,
    RunSummary,
    Score,
    TrainConfig,
)

sys.path.insert(0, str(Path(__file__).parent))  # for report_material.py; tests are no package

SHA = "sha256:" + "cd" * 32
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)


@pytest.fixture
def summary(tmp_path: Path) -> RunSummary:
    """A run of three checkpoints, with logs, results and pictures on disk."""
    checkpoints = []
    for step, score, val in ((0, 0.25, 0.125), (10, 0.75, 0.875), (20, 0.5, 0.625)):
        ref = CheckpointRef(
            step=step,
            samples=step * 32,
            uri=f"file://{tmp_path}/step-{step:010d}/attempt-a",
            manifest_digest=f"sha256:{step:064x}",
            created="",
        )
        folder = tmp_path / f"step-{step:010d}" / "attempt-a"
        (folder / "eval").mkdir(parents=True)
        lines = [
            json.dumps({"step": s, "samples": s * 32, "loss": 10.0 - s / 4, "loss_dino": 1.0, "lr": 0.1})
            for s in range(max(1, step - 10), step + 1)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" if step else "")
        evaluation = Evaluation(name="planes", shards="file:///e/shards.json", protocols=("knn",))
        request = EvaluationRequest(
            checkpoint_uri=ref.uri, checkpoint_digest=ref.manifest_digest, evaluation=evaluation
        )
        result = EvaluationResult(
            request=request,
            step=step,
            samples=step * 32,
            dataset_digest=SHA,
            counts={"test": 4},
            scores={"knn/f1_macro": Score(value=score, low=score - 0.1, high=score + 0.1)},
            chosen={"knn": "cls k=10"},
            details={"knn": {"confusion": {"head": [2, 1], "femur": [1, 0]}}},
            feature_passes=1,
            pictures=("pca.png",),
        )
        (folder / "eval" / "pca.png").write_bytes(PIXEL)
        Path(request.result_uri.removeprefix("file://")).write_text(result.to_json())
        checkpoints.append(
            CheckpointSummary(
                ref=ref,
                scores={
                    "planes-knn/f1_macro": Score(value=score, low=score - 0.1, high=score + 0.1),
                    "planes-knn/val_f1_macro": Score(value=val),
                },
                results=(request.result_uri,),
                best=step == 10,
            )
        )
    return RunSummary(
        job="fetal",
        uid="u",
        phase="Succeeded",
        training=TrainConfig.resolve({"data": {"shards": "file:///s/shards.json"}, "recipe": {"preset": "tiny"}}),
        checkpoints_uri=f"file://{tmp_path}",
        best_by="planes-knn/f1_macro",
        checkpoints=tuple(checkpoints),
        floors={"raw pixels:planes-knn/f1_macro": Score(value=0.4)},
        events=(RunEvent(time=1.0, reason="WorkerReplaced", message="<b>node 1</b>", warning=True),),
        restarts={"infrastructure": 2},
    )
