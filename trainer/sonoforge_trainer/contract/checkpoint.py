"""The checkpoint manifest, the model card, and how checkpoints are laid out in storage.

<uri>/step-0000012345/attempt-<id>/state-00000-of-00002.safetensors   training state, one part a process
                                   teacher.safetensors                the backbone to use
                                   model-card.json                    what the backbone expects
                                   metrics.jsonl                      metric records since the checkpoint before
                                   manifest.json                      all of the above, with sizes and digests
                                   COMMIT                             the manifest's digest; written last
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from sonoforge_trainer.contract.base import Part
from sonoforge_trainer.contract.config import Arch, Positive
from sonoforge_trainer.contract.shards import Sha256

MANIFEST, COMMIT, TEACHER, MODEL_CARD = "manifest.json", "COMMIT", "teacher.safetensors", "model-card.json"
METRICS = "metrics.jsonl"
FEATURES = "features-"
"""Beginning of the names of features that evaluations keep beside a checkpoint."""
QUARANTINE = "QUARANTINE"
"""Object that marks a checkpoint as damaged; its body says why. Nothing of a quarantined checkpoint is deleted."""
IMPORTED = "imported"
"""Entry of a manifest's `extra` that marks weights of others: a checkpoint to evaluate, without a training state."""


class CardSource(Part):
    """Where a backbone comes from that no run of Sonoforge made."""

    layout: str
    """Whose names its tensors had: dinov2, timm, huggingface, usfm or vit."""
    sha256: Sha256
    """Digest of the file."""


class ModelCard(Part):
    """What a backbone is and what it expects. Preprocessing comes from here and from nowhere else."""

    format: Literal["sonoforge.model-card/v1"] = "sonoforge.model-card/v1"
    """Format of this document."""
    arch: Arch
    """Architecture."""
    embed_dim: int
    """Width of a feature."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads per block."""
    patch_size: int
    """Side of a patch in pixels."""
    registers: int
    """Register tokens."""
    in_channels: Literal[1, 3]
    """Channels of an input."""
    ffn: Literal["mlp", "swiglu"]
    """Feed-forward layer."""
    pos_embed: Literal["offset", "antialias"]
    """How position embeddings are resized."""
    layer_scale: Annotated[Positive | None, Field(exclude_if=lambda value: value is None)] = None
    """Value that LayerScale started with, for who starts again at random. None where no run of Sonoforge made it."""
    positions: Literal["table", "relative"] = "table"
    """`relative`: attention also has a bias by relative position (BEiT, USFM). For evaluation only."""
    mean: tuple[float, ...]
    """Mean of each channel, of images scaled to 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    resolution: int
    """Side in pixels of the square input it was trained at."""
    data_digest: Sha256 | None = None
    """The data set it was trained on. None where no run of Sonoforge made it."""
    config_digest: Sha256 | None = None
    """The TrainConfig it was trained with. None where no run of Sonoforge made it."""
    samples: int = 0
    """Images seen in a run of Sonoforge."""
    source: CardSource | None = None
    """The file it was read from, where no run of Sonoforge made it."""
    synthetic_data: bool = False
    """True where it learned from generated images."""


class StoredObject(Part):
    """One object of a checkpoint."""

    name: str
    """Name below the checkpoint's prefix."""
    bytes: int
    """Size."""
    sha256: Sha256
    """Digest."""


class CheckpointManifest(Part):
    """Everything needed to load a checkpoint safely and to know where it comes from."""

    format: Literal["sonoforge.checkpoint/v1"] = "sonoforge.checkpoint/v1"
    """Format of this document."""
    job: str
    """Name of the job."""
    uid: str
    """Identity of the job."""
    attempt: str
    """Identity of the process group that wrote it."""
    step: Annotated[int, Field(ge=0)]
    """Optimiser steps done. 0 is the random initialisation."""
    samples: Annotated[int, Field(ge=0)]
    """Images seen: the data cursor. The position of every virtual rank follows from it."""
    seed: int
    """Seed of the run."""
    virtual_ranks: int
    """Virtual ranks of the run."""
    world_size: int
    """Processes that wrote it. Any number can load it."""
    data_digest: Sha256
    """Data set."""
    config_digest: Sha256
    """TrainConfig."""
    image_digest: str = ""
    """Container image, where there is one: its digest, or the name it was given by where that is not pinned."""
    torch_version: str
    """torch that wrote it."""
    created: str
    """UTC time, ISO 8601."""
    objects: tuple[StoredObject, ...]
    """Every object except this manifest and COMMIT."""
    previous: Sha256 | None = None
    """Digest of the manifest that this run continued from or wrote before: a chain."""
    extra: dict[str, Any] = {}
    """Small values beside the tensors, such as the mark of imported weights."""


class CheckpointRef(Part):
    """A committed checkpoint, as progress reports it."""

    step: int
    """Optimiser steps done."""
    samples: int
    """Images seen."""
    uri: str
    """Prefix of its objects."""
    manifest_digest: Sha256
    """Digest of its manifest: its identity."""
    created: str
    """UTC time, ISO 8601."""

    @property
    def id(self) -> str:
        """Short name: `step-0000012345-1a2b3c4d5e6f`."""
        return f"step-{self.step:010d}-{self.manifest_digest.removeprefix('sha256:')[:12]}"


def checkpoint_prefix(uri: str, step: int, attempt: str) -> str:
    """The write-once prefix of a checkpoint."""
    return f"{uri.rstrip('/')}/step-{step:010d}/attempt-{attempt}"


_PREFIX = re.compile(r"/step-(\d{10})/attempt-([0-9A-Za-z]+)(?:/|$)")


def parse_prefix(uri: str) -> tuple[int, str] | None:
    """(step, attempt) of an object or prefix below a checkpoint, or None."""
    match = _PREFIX.search(uri)
    return (int(match[1]), match[2]) if match else None


def run_uri(prefix: str) -> str:
    """The URI below which a checkpoint's run keeps everything; that of imported weights is their own."""
    match = _PREFIX.search(prefix)
    return prefix[: match.start()] if match else prefix
