"""Makes the checkpoints of a summary real."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sonoforge_trainer.contract import (
    COMMIT,
    MANIFEST,
    METRICS,
    MODEL_CARD,
    TEACHER,
    CheckpointManifest,
    RunSummary,
    StoredObject,
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
