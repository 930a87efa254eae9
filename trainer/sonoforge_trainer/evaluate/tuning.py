"""What `segment` and `finetune` share: images, a trainable copy of the backbone, optimiser groups, batches, the best.

The backbone is always a copy of the one that the model card describes, with its registers and its preprocessing. It is
never built from a flag, and the evaluated weights themselves never change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sonoforge_trainer import draws
from sonoforge_trainer.contract import ModelCard, OptimConfig
from sonoforge_trainer.evaluate.augment import UNIFORMS, shade, warp
from sonoforge_trainer.evaluate.features import Normalise
from sonoforge_trainer.evaluate.metrics import Ints
from sonoforge_trainer.evaluate.problem import best
from sonoforge_trainer.model import Backbone, initialise
from sonoforge_trainer.optim import update_rule
from sonoforge_trainer.schedule import learning_rate, linear

EVALUATION_BATCH = 32
"""Images in a forward pass without gradient."""

POLY_POWER = 0.9
"""Exponent of the polynomial decay, as DeepLab (arXiv 1606.00915)."""

Made = TypeVar("Made", bound=nn.Module)
_ORDER, _AUGMENT, _SEED = "tune-order", "tune-augment", "tune-seed"
"""Purposes of the draws."""


@dataclass(frozen=True)
class Tunable:
    """A backbone to train copies of, and the images to train them on."""

    backbone: Backbone
    """The evaluated weights. They are read and never changed."""
    card: ModelCard
    """Its preprocessing."""
    resolution: int
    """Side R in pixels of the square input."""
    images: Mapping[int, Tensor]
    """uint8 [C, R, R] by row of the set's table."""
    device: torch.device
    """Where to compute."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        return (self.resolution // self.card.patch_size,) * 2

    def teacher(self, drop_path: float) -> Backbone:
        """A trainable copy of the evaluated backbone, in training mode."""
        made = copy.deepcopy(self.backbone).requires_grad_(True)
        made.config = made.config.model_copy(update={"drop_path": drop_path})
        return made.to(self.device).train()

    def scratch(self, drop_path: float, seed: int) -> Backbone:
        """A trainable backbone of the same architecture with random weights, in training mode."""
        made = supervised_start(self.backbone, seed)
        made.config = made.config.model_copy(update={"drop_path": drop_path})
        return made.to(self.device).train()

    def pixels(self, rows: Iterable[int]) -> Tensor:
        """Images [n, C, R, R] uint8 of some rows of the table, on the device."""
        return torch.stack([self.images[int(row)] for row in rows]).to(self.device)

    def normalise(self, images_u8: Tensor) -> Tensor:
        """What the backbone sees of images that are not augmented: training, validation and test have one way."""
        return self.shaded(images_u8, None, None)

    def shaded(self, images_u8: Tensor, uniforms_nu: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Normalised images [n, C, R, R]; photometric augmentation before that, where its numbers are given."""
        images = images_u8.float() / 255
        if uniforms_nu is not None:
            assert generator is not None
            images = shade(images, uniforms_nu, generator)
        return Normalise(self.card, self.device)(images)


def supervised_start(like: Backbone, seed: int) -> Backbone:
    """A backbone of this architecture with random weights to be trained on labels from.

    They are those that pretraining starts with, but LayerScale is 1: at 1e-5 a short training ends before the blocks
    say much.
    """
    made = Backbone(like.config.model_copy(update={"layer_scale": 1.0}), like.image_size)
    initialise(made, seed)
    return made


@dataclass(frozen=True)
class Batch:
    """One training batch."""

    places: Ints
    """Which of the training images, by their place in the split."""
    images: Tensor
    """Normalised [n, C, R, R]."""
    masks: Tensor | None
    """int64 [n, R, R], moved as the images were."""


def batches(
    source: Tunable, rows: Ints, masks_u8: Tensor | None, *, batch: int, steps: int, augment: bool, seed: int
) -> Iterator[Batch]:
    """`steps` batches of equal size, passing over the images in a new order each time; a small set repeats in a batch.

    `rows` [n] are rows of the set's table, `masks_u8` [n, R, R] their classes. Everything follows from the seed.
    """
    order = endless_order(len(rows), seed)
    for step in range(steps):
        places = np.array([next(order) for _ in range(batch)], np.int64)
        images = source.pixels(rows[places])
        masks = None if masks_u8 is None else masks_u8[torch.from_numpy(places)].to(source.device)
        numbers, generator = None, torch.Generator().manual_seed(seed * 1_000_003 + step)
        if augment:
            numbers = torch.from_numpy(draws.uniforms(batch * UNIFORMS, seed, _AUGMENT, step).reshape(batch, UNIFORMS))
            images, masks = warp(images, masks, numbers)
        yield Batch(places, source.shaded(images, numbers, generator), None if masks is None else masks.long())


def endless_order(count: int, seed: int) -> Iterator[int]:
    """Places 0..count-1 in random order, then in another, and so on."""
    passes = 0
    while True:
        yield from draws.permutation(count, seed, _ORDER, passes).tolist()
        passes += 1


def parameter_groups(
    backbone: Backbone | None, head: nn.Module, *, backbone_lr: float, head_lr: float, layer_decay: float, decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimiser of torch: `lr` and `peak` are the peak learning rate, `names` the parameters.

    Layer decay is that of pretraining, see `update_rule`: with 12 blocks and 0.65 the final norm has the whole rate,
    block 11 has 0.65, block 0 has 0.65^12, embeddings have 0.65^13. Norms, biases and LayerScale do not decay.
    """
    rates: dict[str, tuple[nn.Parameter, float, float]] = {}
    if backbone is not None:
        optim = OptimConfig(layer_decay=layer_decay, patch_embed_lr=1.0)
        for name, parameter in backbone.named_parameters():
            rule = update_rule(f"backbone.{name}", optim, backbone.depth)
            rates[f"backbone.{name}"] = (parameter, backbone_lr * rule.lr_factor, decay if rule.decays else 0.0)
    for name, parameter in head.named_parameters():
        rates[f"head.{name}"] = (parameter, head_lr, decay if parameter.ndim > 1 else 0.0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, (parameter, rate, weight_decay) in rates.items():
        fresh = {"params": [], "names": [], "lr": rate, "peak": rate, "weight_decay": weight_decay}
        group = groups.setdefault((rate, weight_decay), fresh)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_rates(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Give every group the same part of its own peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor


def warm_cosine(step: int, warmup: float, steps: int) -> float:
    """Part of the peak at a step: up from 0 over the first `warmup` of the steps, then half a cosine to 0."""
    return learning_rate(step, peak=1.0, end=0.0, warmup=int(warmup * steps), length=steps, batch=1)


def warm_poly(step: int, warmup: float, steps: int) -> float:
    """Part of the peak at a step: up from 0 over the first `warmup` of the steps, then (1 - progress) ^ 0.9 to 0."""
    rising = int(warmup * steps)
    if step < rising:
        return linear(step, start=0.0, end=1.0, length=rising, batch=1)
    return float((1 - (step - rising) / (steps - rising)) ** POLY_POWER)


class BestState:
    """Weights of the moment that was best on validation: the highest score, the first of equals."""

    def __init__(self, *modules: nn.Module) -> None:
        self.candidates: dict[str, float] = {}
        self._modules = modules
        self._states: list[dict[str, Tensor]] = []
        self._of = ""

    def offer(self, name: str, score: float) -> None:
        """A moment with its validation score; its weights are copied where it is the best so far."""
        self.candidates[name] = score
        if best(self.candidates) == name:
            self._states = [copy.deepcopy(dict(module.state_dict())) for module in self._modules]
            self._of = name

    def restore(self) -> str:
        """Put the best weights back; returns the name of their moment."""
        assert self._of == best(self.candidates)
        for module, state in zip(self._modules, self._states, strict=True):
            module.load_state_dict(state, strict=True)
        return self._of


def seed_of(seed: int, draw: int) -> int:
    """The seed, below 2^31, of one of several draws or trainings."""
    return int(draws.raw(1, seed, _SEED, draw)[0] >> np.uint64(33))


def in_batches(rows: Sequence[int] | Ints) -> Iterator[list[int]]:
    """Rows in batches for a pass without gradient."""
    for start in range(0, len(rows), EVALUATION_BATCH):
        yield [int(row) for row in rows[start : start + EVALUATION_BATCH]]


def seeded(seed: int, make: Callable[[], Made]) -> Made:
    """What `make` builds, with initial weights that follow from the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
