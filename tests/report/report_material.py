"""A run of three checkpoints on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sonoforge_trainer.contract import (
    COMMIT,
    MANIFEST,
    METRICS,
    MODEL_CARD,
    TEACHER,
    CheckpointManifest,
    CheckpointRef,
    CheckpointSummary,
    Evaluation,
    EvaluationRequest,
    EvaluationResult,
    RunEvent,
    RunSummary,
    Score,
    StoredObject,
    TrainConfig,
)

SHA = "sha256:" + "cd" * 32
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)
DIGEST = "sha256:" + "0" * 64


def commit(summary: RunSummary, attempts: tuple[str, ...]) -> RunSummary:
    """Make the checkpoints of the summary real: manifests with COMMITs, as attempts say who wrote them."""
    checkpoints = []
    for number, (checkpoint, attempt) in enumerate(zip(summary.checkpoints, attempts, strict=True)):
        old = Path(checkpoint.ref.uri.removeprefix("file://"))
        folder = old.with_name(f"attempt-{attempt}")
        old.rename(folder)
        for name in (TEACHER, MODEL_CARD, "state-00000-of-00001.safetensors"):
            (folder / name).write_bytes(b"not read by a page")
        objects = []
        for name in (TEACHER, MODEL_CARD, "state-00000-of-00001.safetensors", METRICS):
            data = (folder / name).read_bytes()
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            objects.append(StoredObject(name=name, bytes=len(data), sha256=digest))
        manifest = CheckpointManifest(
            job="fetal",
            uid="u",
            attempt=attempt,
            step=checkpoint.ref.step,
            samples=checkpoint.ref.samples,
            seed=0,
            virtual_ranks=4,
            world_size=2 - number % 2,
            data_digest=DIGEST,
            config_digest=DIGEST,
            torch_version="2",
            created=f"2026-01-01T00:00:{number:02d}.000Z",
            objects=tuple(objects),
        )
        body = manifest.to_json().encode()
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        (folder / MANIFEST).write_bytes(body)
        (folder / COMMIT).write_text(digest)
        ref = checkpoint.ref.model_copy(
            update={"uri": folder.as_uri(), "manifest_digest": digest, "created": manifest.created}
        )
        results = tuple(p.as_uri() for p in sorted(folder.glob("eval/planes-*.json")))
        checkpoints.append(checkpoint.model_copy(update={"ref": ref, "results": results}))
    return summary.model_copy(update={"checkpoints": tuple(checkpoints)})


def summary_of_three(root: Path) -> RunSummary:
    """A run of three checkpoints in a folder, with logs, results and pictures on disk."""
    checkpoints = []
    for step, score, val in ((0, 0.25, 0.125), (10, 0.75, 0.875), (20, 0.5, 0.625)):
        ref = CheckpointRef(
            step=step,
            samples=step * 32,
            uri=f"file://{root}/step-{step:010d}/attempt-a",
            manifest_digest=f"sha256:{step:064x}",
            created="",
        )
        folder = root / f"step-{step:010d}" / "attempt-a"
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
        checkpoints_uri=f"file://{root}",
        best_by="planes-knn/f1_macro",
        checkpoints=tuple(checkpoints),
        floors={"raw pixels:planes-knn/f1_macro": Score(value=0.4)},
        events=(RunEvent(time=1.0, reason="WorkerReplaced", message="<b>node 1</b>", warning=True),),
        restarts={"infrastructure": 2},
    )
