"""The model card: written beside a teacher, and the only way back from its tensors to a backbone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sonoforge_trainer.contract.checkpoint import ModelCard
from sonoforge_trainer.contract.config import ARCHS, ModelConfig, TrainConfig
from sonoforge_trainer.contract.shards import ShardManifest
from sonoforge_trainer.model import Backbone
from sonoforge_trainer.relative import RelativeBackbone, grid_of_table

REPORTED_KEYS = 20
"""Keys that a report names for each kind of fault."""


def model_card(training: TrainConfig, manifest: ShardManifest, samples: int) -> ModelCard:
    """The card of a teacher trained with `training` on `manifest`, after `samples` images."""
    model, shape = training.model, ARCHS[training.model.arch]
    return ModelCard(
        arch=model.arch,
        embed_dim=shape.embed_dim,
        depth=model.depth or shape.depth,
        heads=shape.heads,
        patch_size=model.patch_size,
        registers=model.registers,
        in_channels=model.in_channels,
        ffn=model.ffn,
        pos_embed=model.pos_embed,
        layer_scale=model.layer_scale,
        mean=training.data.mean,
        std=training.data.std,
        resolution=training.recipe.crops.global_size,
        data_digest=manifest.dataset_digest,
        config_digest=training.digest(),
        samples=samples,
        synthetic_data=manifest.synthetic,
    )


def backbone_from_card(card: ModelCard, tensors: Mapping[str, Tensor]) -> Backbone:
    """Build the backbone of a card from its tensors (names of `Backbone.state_dict`), in fp32 and eval mode.

    Raises what `empty_backbone` raises.
    """
    backbone = empty_backbone(card, tensors)
    copies = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in tensors.items()}
    backbone.load_state_dict(copies, strict=True, assign=True)
    return backbone.eval()


def empty_backbone(card: ModelCard, tensors: Mapping[str, Tensor]) -> Backbone:
    """The backbone that these tensors fit exactly, on the meta device: nothing is copied.

    Raises ValueError where the card contradicts its architecture, and where the tensors are not exactly those of the
    backbone; the message lists missing and unexpected keys and wrong shapes.
    """
    shape = ARCHS[card.arch]
    if (card.embed_dim, card.heads) != (shape.embed_dim, shape.heads):
        raise ValueError(
            f"the model card says {card.arch} of width {card.embed_dim} with {card.heads} heads, but {card.arch} has "
            f"width {shape.embed_dim} and {shape.heads} heads; the card was edited or is damaged"
        )
    config = ModelConfig(
        arch=card.arch,
        depth=card.depth,
        patch_size=card.patch_size,
        registers=card.registers,
        in_channels=card.in_channels,
        ffn=card.ffn,
        drop_path=0.0,
        pos_embed=card.pos_embed,
        **({} if card.layer_scale is None else {"layer_scale": card.layer_scale}),
    )
    with torch.device("meta"):
        backbone = _backbone(config, card, tensors)
    expected = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    faults = key_report(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if faults:
        raise ValueError(
            f"the tensors are not those of the model card's {card.arch}/{card.patch_size} at {card.resolution} px; "
            f"find the teacher that belongs to this card\n{faults}"
        )
    return backbone


def _backbone(config: ModelConfig, card: ModelCard, tensors: Mapping[str, Tensor]) -> Backbone:
    if card.positions == "table":
        return Backbone(config, card.resolution)
    table = tensors.get("blocks.0.attn.relative_table")
    if table is None:
        raise ValueError("the model card says relative positions, but blocks.0.attn.relative_table is missing")
    return RelativeBackbone(config, card.resolution, grid_of_table(len(table)))


def key_report(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """What differs between two sets of tensors, one line a fault kind; empty where nothing does."""
    shapes = [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "shapes": shapes,
    }
    return "\n".join(f"{kind} ({len(names)}): {_listed(names)}" for kind, names in kinds.items() if names)


def _listed(names: list[str]) -> str:
    rest = len(names) - REPORTED_KEYS
    return ", ".join(names[:REPORTED_KEYS]) + (f" and {rest} more" if rest > 0 else "")
