"""Baselines: models that a suite compares every checkpoint with. They do not change while a run trains."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from sonoforge_trainer.contract.base import Misfit, Part, canonical_json, refuse
from sonoforge_trainer.contract.init import WeightsUri
from sonoforge_trainer.contract.shards import Sha256

FloorKind = Literal["raw-pixels", "hog", "hog-lbp"]
BaselineKind = Literal["weights", "random", "raw-pixels", "hog", "hog-lbp"]
FLOORS: tuple[str, ...] = get_args(FloorKind)
"""Kinds that learn nothing at all."""


class Baseline(Part):
    """One model beside the checkpoint, measured by the same evaluations. It is evaluated once for each run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
    """Name of the model in tables; scores are called BASELINE:NAME-PROTOCOL/METRIC."""
    kind: BaselineKind
    """weights: a file of published weights. random: the checkpoint's architecture with random weights; its `finetune`
    is supervised training from scratch, with LayerScale 1 at the start. raw-pixels, hog, hog-lbp: features that nobody
    learned (frozen protocols only)."""
    uri: WeightsUri | None = None
    """weights: the file, safetensors or .pth, in a layout of DINOv2, timm, Hugging Face, USFM or a plain ViT."""
    sha256: Sha256 | None = None
    """weights: digest that the file must have. Without it, a file that is replaced later is not noticed."""
    mean: Annotated[tuple[float, ...], Field(max_length=3)] = ()
    """weights: mean of each channel that it was trained with. Empty: the model card's, or ImageNet's."""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(max_length=3)] = ()
    """weights: standard deviation of each channel. Empty: likewise."""
    resolution: Annotated[int, Field(gt=0)] | None = None
    """weights: side in pixels of the input where the evaluation names none. Not given: what the file was trained at."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """random: seed of the weights."""

    @model_validator(mode="after")
    def _fields_go_with_the_kind(self) -> Self:
        if self.kind == "weights" and self.uri is None:
            refuse(Misfit("uri", None, "the URI of a file, with kind weights"))
        given = {
            "uri": self.uri,
            "sha256": self.sha256,
            "mean": self.mean,
            "std": self.std,
            "resolution": self.resolution,
        }
        if self.kind != "weights":
            refuse(*(Misfit(name, value, f"nothing, with kind {self.kind}") for name, value in given.items() if value))
        if self.kind != "random" and self.seed:
            refuse(Misfit("seed", self.seed, f"nothing, with kind {self.kind}"))
        return self

    @property
    def id(self) -> str:
        """What it is, whatever it is called: its kind, and 16 hex digits of the digest of its other fields."""
        document = {key: value for key, value in self.document().items() if key != "name"}
        return f"{self.kind}-{hashlib.sha256(canonical_json(document).encode()).hexdigest()[:16]}"
