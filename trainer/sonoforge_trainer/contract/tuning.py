"""Options of the protocols that train on images: `segment` and `finetune`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sonoforge_trainer.contract.base import Part
from sonoforge_trainer.contract.config import (
    FractionBelowOne,
    NonNegative,
    Positive,
    PositiveFraction,
    PositiveInt,
)

Batch = Annotated[int, Field(ge=2)]
"""Images in a step; batch normalisation needs two."""


class SegmentOptions(Part):
    """How `segment` trains a decoder on the sets' masks. The loss is cross-entropy plus soft Dice, one to one."""

    decoder: Literal["linear", "upernet"] = "linear"
    """`linear`: batch normalisation and a 1x1 convolution on the patches of the last block. `upernet`: pyramid pooling
    and a feature pyramid (arXiv 1807.10221) on the blocks at a third, half, two thirds and all of the depth."""
    backbone: Literal["frozen", "tuned"] = "frozen"
    """Whether the backbone stays as it is, or is trained with the decoder."""
    channels: PositiveInt | None = None
    """upernet: width of its layers. Not given: the backbone's."""
    steps: PositiveInt = 2000
    """Steps of a training."""
    batch: Batch = 16
    """Images in a step; batch normalisation needs two."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of the decoder (AdamW)."""
    backbone_learning_rate: Positive = 1e-4
    """tuned: peak learning rate of the backbone's final norm; blocks below have less, see layerDecay."""
    layer_decay: PositiveFraction = 0.9
    """tuned: learning-rate factor from one block to the block below."""
    drop_path: FractionBelowOne = 0.1
    """tuned: share of a batch that each layer leaves out."""
    weight_decay: NonNegative = 0.01
    """Weight decay of everything but norms, biases and LayerScale."""
    warmup: FractionBelowOne = 0.1
    """Part of the steps in which the learning rate rises from 0; then it falls to 0 as (1 - progress) ^ 0.9."""
    augment: bool = True
    """Random affine maps, flips, brightness, contrast, gamma and noise of the training images."""
    validate_every: PositiveInt = 100
    """Steps between looks at the validation split; the last step is always looked at. The best one is reported."""
    shots: tuple[PositiveInt, ...] = ()
    """Also train on so many patients (or clips, where patients are not known), drawn `seeds` times. Scores are called
    {N}shot_dice_foreground and so on."""


class FinetuneOptions(Part):
    """How `finetune` trains backbone and classifier together."""

    source: Literal["teacher", "scratch"] = "teacher"
    """Where the backbone starts: the evaluated weights, or random ones of the same architecture with LayerScale 1."""
    runs: PositiveInt = 1
    """Trainings from different seeds; with several, scores are means with a deviation."""
    epochs: PositiveInt = 50
    """Passes over the training split. The one that is best on validation is reported."""
    batch: Batch = 64
    """Images in a step; batch normalisation needs two."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of the classifier (AdamW); it falls along half a cosine to 0."""
    layer_decay: PositiveFraction = 0.65
    """Learning-rate factor from one block to the block below. From scratch, 1 is usual."""
    weight_decay: NonNegative = 0.05
    """Weight decay of everything but norms, biases and LayerScale."""
    warmup: FractionBelowOne = 0.1
    """Part of the steps in which the learning rate rises from 0."""
    mixup: NonNegative = 0.8
    """Alpha of mixup (arXiv 1710.09412); 0 for none."""
    cutmix: NonNegative = 1.0
    """Alpha of CutMix (arXiv 1905.04899); 0 for none. With both, each batch is given to one of them at random."""
    label_smoothing: FractionBelowOne = 0.1
    """Share of the target that is spread over all classes."""
    drop_path: FractionBelowOne = 0.1
    """Share of a batch that each layer of the backbone leaves out."""
    augment: bool = True
    """Random affine maps, flips, brightness, contrast, gamma and noise of the training images."""
