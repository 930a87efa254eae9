"""Weights as a checkpoint: a committed prefix that every evaluation reads as it reads a run's own.

It holds a teacher, its model card, a manifest and COMMIT, and no training state, so no run continues from it. The same
weights give the same bytes, so whoever writes it twice, or two at once, changes nothing.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import save

from sonoforge_trainer.checkpoint.store import reference
from sonoforge_trainer.contract import (
    COMMIT,
    IMPORTED,
    MANIFEST,
    MODEL_CARD,
    TEACHER,
    CheckpointManifest,
    CheckpointRef,
    ModelCard,
    StoredObject,
)
from sonoforge_trainer.model import Backbone
from sonoforge_trainer.storage import Storage

_NO_TIME = "1970-01-01T00:00:00.000Z"
"""Time of writing: a real one would make the same weights another checkpoint."""


def write_imported(backbone: Backbone, card: ModelCard, uri: str, storage: Storage) -> CheckpointRef:
    """Write a backbone with its card below `uri`. Raises StorageError."""
    objects = {
        TEACHER: save({name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}),
        MODEL_CARD: card.to_json().encode(),
    }
    digests = {name: f"sha256:{hashlib.sha256(data).hexdigest()}" for name, data in objects.items()}
    # No data set and no configuration of ours led to it: the file, or else the tensors, stand for both.
    origin = card.source.sha256 if card.source else digests[TEACHER]
    manifest = CheckpointManifest(
        job=IMPORTED,
        uid=origin.removeprefix("sha256:")[:32],
        attempt=IMPORTED,
        step=0,
        samples=0,
        seed=0,
        virtual_ranks=1,
        world_size=1,
        data_digest=card.data_digest or origin,
        config_digest=card.config_digest or origin,
        torch_version=torch.__version__,
        created=_NO_TIME,
        objects=tuple(
            StoredObject(name=name, bytes=len(data), sha256=digests[name]) for name, data in sorted(objects.items())
        ),
        extra={IMPORTED: True},
    )
    body = manifest.to_json().encode()
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    for name, data in objects.items():
        storage.write(f"{uri}/{name}", data)
    storage.write(f"{uri}/{MANIFEST}", body)
    storage.write(f"{uri}/{COMMIT}", digest.encode())
    return reference(uri, digest, manifest)
