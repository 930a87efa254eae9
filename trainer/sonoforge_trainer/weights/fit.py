"""Whether weights fit a training configuration, and making them fit where nothing is lost by it."""

from __future__ import annotations

from sonoforge_trainer.contract import ARCHS, ContractError, ModelCard, TrainConfig
from sonoforge_trainer.weights.loading import Weights

Difference = tuple[str, object, object]
"""Path of the field, what the job asks for, what the weights have."""


def misfits(card: ModelCard, training: TrainConfig) -> list[Difference]:
    """Fields of the job's model that the weights contradict; none where they fit."""
    model = training.model
    compared: list[Difference] = [
        ("model.arch", model.arch, card.arch),
        ("model.depth", model.depth or ARCHS[model.arch].depth, card.depth),
        ("model.patchSize", model.patch_size, card.patch_size),
        ("model.registers", model.registers, card.registers),
        ("model.ffn", model.ffn, card.ffn),
    ]
    return [difference for difference in compared if difference[1] != difference[2]]


def adaptations(card: ModelCard, training: TrainConfig) -> list[Difference]:
    """What `fitted_to` changes: input and position table, without changing the features."""
    compared: list[Difference] = [
        ("model.inChannels", training.model.in_channels, card.in_channels),
        ("data.mean", training.data.mean, card.mean),
        ("data.std", training.data.std, card.std),
        ("recipe.crops.globalSize", training.recipe.crops.global_size, card.resolution),
    ]
    return [difference for difference in compared if difference[1] != difference[2]]


def fitted_to(weights: Weights, training: TrainConfig, *, where: str = "training") -> Weights:
    """The same model for the input of a job: its channels, normalisation and global crops.

    Raises ContractError, one line for each field of the job that the weights contradict.
    """
    if weights.card.positions == "relative":
        raise ContractError(
            f"{where}.init: found weights with relative positions (BEiT, USFM). Allowed: a ViT with a table of "
            "positions; these can be evaluated as a baseline, but training has no such model"
        )
    found = misfits(weights.card, training)
    if found:
        lines = [
            f"{where}.{path}: found {job!r}. Allowed: {theirs!r}, which the weights have" for path, job, theirs in found
        ]
        raise ContractError("\n".join([*lines, "Change these fields, or give other weights in training.init"]))
    return weights.fitted(mean=training.data.mean, std=training.data.std, resolution=training.recipe.crops.global_size)
