"""From a file to a backbone: which ViT it is, strict loading, and a report of every key."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from sonoforge_trainer.card import backbone_from_card, empty_backbone
from sonoforge_trainer.contract import ARCHS, MODEL_CARD, TEACHER, CardSource, ModelCard
from sonoforge_trainer.contract.config import Arch
from sonoforge_trainer.model import Backbone
from sonoforge_trainer.storage import ObjectNotFoundError, Storage
from sonoforge_trainer.weights.errors import WeightsError
from sonoforge_trainer.weights.files import read_tensors
from sonoforge_trainer.weights.layouts import RELATIVE, Translated, translate
from sonoforge_trainer.weights.surgery import with_input, with_resolution

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of the published natural-image models (and of USFM), of RGB images scaled to 0..1."""


@dataclass(frozen=True)
class Weights:
    """A backbone that was read, and how."""

    card: ModelCard
    """What it is and what it expects."""
    tensors: Mapping[str, Tensor]
    """By the names of `Backbone.state_dict`, on the CPU."""
    translated: Translated
    """What became of each name of the file."""
    sha256: str
    """Digest of the file."""

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone, in fp32 and eval mode."""
        return backbone_from_card(self.card, self.tensors)

    def fitted(
        self,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        resolution: int | None = None,
    ) -> Weights:
        """The same model for another input; what is None stays. Raises WeightsError."""
        card, tensors = self.card, dict(self.tensors)
        if resolution is not None:
            card, tensors = with_resolution(card, tensors, resolution)
        if mean is not None or std is not None:
            card, tensors = with_input(card, tensors, mean or card.mean, std or card.std)
        return Weights(card, tensors, self.translated, self.sha256)


def load_weights(
    uri: str, storage: Storage, *, sha256: str | None = None, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> Weights:
    """Read the file of weights at `uri`. A teacher of Sonoforge is read with the model card beside it.

    `sha256` is what the file must be; `mean` and `std` are what the model was trained with where it is not ImageNet's
    (they are not looked at where there is a card). Loading is strict. Raises WeightsError, StorageError.
    """
    name = uri.rpartition("/")[2]
    data = storage.read(uri, sha256=sha256)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    card = _card_beside(uri, storage) if name == TEACHER else None
    try:
        translated = translate(read_tensors(name, data))
        del data
        card = card or card_of(translated, digest, mean=mean, std=std)
        tensors = {key: tensor.float() for key, tensor in translated.tensors.items()}
        empty_backbone(card, tensors)  # strict: every key and shape is compared
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{name}: {error}") from None
    return Weights(card, tensors, translated, digest)


def _card_beside(uri: str, storage: Storage) -> ModelCard | None:
    beside = f"{uri.rpartition('/')[0]}/{MODEL_CARD}"
    try:
        return ModelCard.from_json(storage.read(beside), where=beside)
    except ObjectNotFoundError:
        return None


def card_of(translated: Translated, sha256: str, *, mean: tuple[float, ...], std: tuple[float, ...]) -> ModelCard:
    """The card of a ViT by the shapes of its tensors. Raises WeightsError where they are none that we can build."""
    tensors = translated.tensors
    kernel, table = _need(tensors, "patch_embed.proj.weight", 4), _need(tensors, "pos_embed", 3)
    width, channels, patch, columns = kernel.shape
    arch = _arch_of(width)
    if channels not in (1, 3) or patch != columns:
        raise WeightsError(
            f"the patch embedding takes {channels} channels and patches of {patch}x{columns}. Allowed: 1 or 3 channels "
            "and square patches"
        )
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    grid = math.isqrt(table.shape[1] - 1)
    if grid**2 != table.shape[1] - 1:
        raise WeightsError(f"pos_embed has {table.shape[1]} rows. Allowed: one for CLS and those of a square grid")
    default_mean, default_std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((), ())
    mean, std = mean or default_mean, std or default_std
    if not len(mean) == len(std) == channels:
        raise WeightsError(
            f"found {len(mean)} means and {len(std)} deviations for {channels} channels; give the mean and std that "
            "the model was trained with, one for each channel"
        )
    if "blocks.0.norm1.weight" not in tensors:
        raise WeightsError("blocks.0.norm1.weight: found nothing. Allowed: a pre-norm ViT whose blocks count from 0")
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    return ModelCard(
        arch=arch,
        embed_dim=width,
        depth=len(blocks),
        heads=ARCHS[arch].heads,
        patch_size=patch,
        registers=registers,
        in_channels=1 if channels == 1 else 3,
        ffn="swiglu" if "blocks.0.mlp.w12.weight" in tensors else "mlp",
        # As the authors of DINOv2 resize: the register models with antialias, the others with the offset.
        pos_embed="antialias" if registers else "offset",
        positions="relative" if f"blocks.0.{RELATIVE}" in tensors else "table",
        mean=mean,
        std=std,
        resolution=grid * patch,
        source=CardSource(layout=translated.layout, sha256=sha256),
    )


def _arch_of(width: int) -> Arch:
    for arch, shape in ARCHS.items():
        if shape.embed_dim == width:
            return arch
    known = ", ".join(f"{shape.embed_dim} ({arch})" for arch, shape in ARCHS.items())
    raise WeightsError(f"tokens are {width} wide. Allowed: {known}")


def _need(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != dimensions:
        found = "nothing" if tensor is None else f"{tuple(tensor.shape)}"
        raise WeightsError(f"{name}: found {found}. Allowed: a tensor of {dimensions} dimensions; this is no such ViT")
    return tensor
