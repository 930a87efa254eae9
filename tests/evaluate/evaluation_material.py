"""Committed checkpoints as the contract describes them, with a backbone of random weights; and small masks."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from sonoforge_trainer.contract import (
    ARCHS,
    COMMIT,
    MANIFEST,
    METRICS,
    MODEL_CARD,
    TEACHER,
    CheckpointManifest,
    Evaluation,
    EvaluationRequest,
    ModelCard,
    ModelConfig,
    StoredObject,
    checkpoint_prefix,
)
from sonoforge_trainer.model import Backbone, initialise
from sonoforge_trainer.storage import Storage

DIGEST = "sha256:" + "0" * 64


def model_card(**changes: object) -> ModelCard:
    shape = ARCHS["vit_tiny"]
    values = {
        "arch": "vit_tiny",
        "embed_dim": shape.embed_dim,
        "depth": 2,
        "heads": shape.heads,
        "patch_size": 8,
        "registers": 2,
        "in_channels": 1,
        "ffn": "mlp",
        "pos_embed": "antialias",
        "mean": (0.18,),
        "std": (0.22,),
        "resolution": 32,
        "data_digest": DIGEST,
        "config_digest": DIGEST,
        "samples": 320,
    }
    return ModelCard(**{**values, **changes})


def backbone_of(card: ModelCard, seed: int = 0) -> Backbone:
    config = ModelConfig(
        arch=card.arch,
        depth=card.depth,
        patch_size=card.patch_size,
        registers=card.registers,
        in_channels=card.in_channels,
        pos_embed=card.pos_embed,
        drop_path=0.0,
    )
    backbone = Backbone(config, card.resolution)
    initialise(backbone, seed)
    with torch.no_grad():
        for block in backbone.blocks:  # as large as trained ones: at 1e-5 a fresh block does nothing
            block.ls1.gamma.fill_(0.3)
            block.ls2.gamma.fill_(0.3)
    return backbone.eval()


def write_checkpoint(
    storage: Storage, base: str, *, step: int = 10, seed: int = 0, metrics: bytes | None = None, **changes: object
) -> tuple[str, str]:
    """URI and manifest digest of a committed checkpoint, with a metric log where one is given."""
    card = model_card(**changes)
    prefix = checkpoint_prefix(base, step, "A")
    objects = {
        "state-00000-of-00001.safetensors": save({"x": torch.zeros(1)}),
        TEACHER: save(dict(backbone_of(card, seed).state_dict())),
        MODEL_CARD: card.to_json().encode(),
    }
    if metrics is not None:
        objects[METRICS] = metrics
    for name, data in objects.items():
        storage.write(f"{prefix}/{name}", data)
    manifest = CheckpointManifest(
        job="test",
        uid="uid",
        attempt="A",
        step=step,
        samples=card.samples,
        seed=seed,
        virtual_ranks=1,
        world_size=1,
        data_digest=DIGEST,
        config_digest=DIGEST,
        torch_version=torch.__version__,
        created="2026-01-01T00:00:00.000Z",
        objects=tuple(
            StoredObject(name=name, bytes=len(data), sha256=f"sha256:{hashlib.sha256(data).hexdigest()}")
            for name, data in objects.items()
        ),
    )
    body = manifest.to_json().encode()
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    storage.write(f"{prefix}/{MANIFEST}", body)
    storage.write(f"{prefix}/{COMMIT}", digest.encode())
    return prefix, digest


def request_of(checkpoint: tuple[str, str], shards: str, *protocols: str, **changes: object) -> EvaluationRequest:
    values = {
        "name": "phantoms",
        "shards": shards,
        "protocols": protocols,
        "bootstrap": 50,
        "shots": (1, 2),
        "k": (5, 10),
    }
    return EvaluationRequest(
        checkpoint_uri=checkpoint[0], checkpoint_digest=checkpoint[1], evaluation=Evaluation(**{**values, **changes})
    )


def png(pixels: np.ndarray) -> bytes:
    """Pixels as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(data, "PNG")
    return data.getvalue()


def disc(row: float, column: float, radius: float, side: int = 32) -> np.ndarray:
    """A mask [side, side] that is 1 inside a disc."""
    y, x = np.mgrid[:side, :side]
    return ((y - row) ** 2 + (x - column) ** 2 < radius**2).astype(np.uint8)
