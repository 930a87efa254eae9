"""Analytic FLOPs of training, for MFU. A multiplication and an addition are 2; norms and softmax are left out."""

from __future__ import annotations

import itertools

from sonoforge_trainer.contract.config import ARCHS, HeadConfig, ModelConfig, TrainConfig
from sonoforge_trainer.model import MLP_RATIO, swiglu_hidden

TRAINING_PASSES = 3
"""Forward, and twice that for backward."""


def embed_flops(model: ModelConfig, size: int) -> float:
    """FLOPs of embedding the patches of one square image of `size` pixels."""
    patches = (size // model.patch_size) ** 2
    return 2.0 * patches * model.in_channels * model.patch_size**2 * ARCHS[model.arch].embed_dim


def block_flops(model: ModelConfig, size: int) -> float:
    """FLOPs of all blocks for one square image of `size` pixels, without drop path."""
    shape = ARCHS[model.arch]
    dim, tokens = shape.embed_dim, 1 + model.registers + (size // model.patch_size) ** 2
    ffn = 3 * swiglu_hidden(dim) if model.ffn == "swiglu" else 2 * MLP_RATIO * dim
    linear = 2.0 * tokens * dim * (4 * dim + ffn)
    attention = 4.0 * tokens**2 * dim
    return (model.depth or shape.depth) * (linear + attention)


def forward_flops(model: ModelConfig, size: int) -> float:
    """FLOPs of the backbone for one square image of `size` pixels, outside training."""
    return embed_flops(model, size) + block_flops(model, size)


def head_flops(dim: int, head: HeadConfig) -> float:
    """FLOPs of a head for one token of width `dim`."""
    widths = [dim, *[head.hidden_dim] * (head.layers - 1), head.bottleneck_dim, head.prototypes]
    return 2.0 * sum(before * after for before, after in itertools.pairwise(widths))


def training_flops(training: TrainConfig, *, drop_path: float | None = None) -> float:
    """FLOPs of one source image in training: teacher on the global crops, student on all three times, and heads.

    The masked part of the patches is taken as probability x mean ratio; drop path saves its rate of the student's
    blocks. `drop_path` replaces the configured rate.
    """
    model, recipe = training.model, training.recipe
    crops, masks = recipe.crops, recipe.masks
    views = 2
    rate = model.drop_path if drop_path is None else drop_path
    teacher = views * forward_flops(model, crops.global_size)
    blocks = views * block_flops(model, crops.global_size) + crops.local_count * block_flops(model, crops.local_size)
    embeds = views * embed_flops(model, crops.global_size) + crops.local_count * embed_flops(model, crops.local_size)
    student = TRAINING_PASSES * (embeds + (1 - rate) * blocks)
    patches = (crops.global_size // model.patch_size) ** 2
    masked = views * patches * masks.probability * sum(masks.ratio) / 2
    teacher_rows = views + masked
    student_rows = views + crops.local_count + masked
    heads = (teacher_rows + TRAINING_PASSES * student_rows) * head_flops(ARCHS[model.arch].embed_dim, recipe.head)
    return teacher + student + heads
