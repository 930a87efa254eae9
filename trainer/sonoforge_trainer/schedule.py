"""Schedules of DINOv2 as pure functions of samples seen.

Convention: the values of step i (counted from 0) are those at `samples = i * global_batch`, the images seen *before*
it. Where every length is a multiple of the global batch this gives exactly entry i of the reference's per-iteration
arrays: a warm-up of w steps is `linspace(start, peak, w)`, so it starts at `start`, reaches the peak at step w - 1, and
the cosine begins at the peak again at step w; the cosine over n steps is `cos(pi * k / n)`, so its end value belongs to
the step after the last. A changed batch keeps the same curves over samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sonoforge_trainer.contract.config import TrainConfig

LR_BATCH = 1024
"""Global batch at which the learning rate is `base_lr`; it grows with the square root of the batch."""


@dataclass(frozen=True)
class ScheduleValues:
    """What the schedules say for one step."""

    lr: float
    """Learning rate before the factors of layers."""
    last_layer_lr: float
    """Learning rate of the prototype layer: 0 while it is frozen, then `lr`."""
    backbone_lr: float
    """Learning rate of the backbone: 0 while it is frozen, then a ramp to `lr`. `lr` where no weights are given."""
    weight_decay: float
    """AdamW weight decay."""
    teacher_momentum: float
    """Part of the teacher that an update keeps."""
    teacher_temperature: float
    """Temperature of the teacher's softmax."""


def linear(samples: int, *, start: float, end: float, length: int, batch: int) -> float:
    """Line from `start` at 0 samples to `end` at the last batch within `length` samples, then `end`."""
    if samples >= length:
        return end
    return start + (end - start) * min(1.0, samples / (length - batch)) if length > batch else start


def cosine(samples: int, *, start: float, end: float, length: int) -> float:
    """Half a cosine from `start` at 0 samples to `end` at `length` samples and after."""
    if samples >= length:
        return end
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * samples / length))


def learning_rate(samples: int, *, peak: float, end: float, warmup: int, length: int, batch: int) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine to `end` at `length` samples."""
    if samples < warmup:
        return linear(samples, start=0.0, end=peak, length=warmup, batch=batch)
    return cosine(samples - warmup, start=peak, end=end, length=length - warmup)


def thaw(samples: int, *, frozen: int, ramp: int) -> float:
    """Factor of the backbone's learning rate in continued pretraining: 0 for `frozen` samples, then a line to 1."""
    if samples < frozen:
        return 0.0
    return min(1.0, (samples - frozen) / ramp) if ramp else 1.0


class Schedules:
    """All schedules of a run."""

    def __init__(self, training: TrainConfig) -> None:
        """Take the lengths and end points from the recipe."""
        recipe = training.recipe
        self._batch = recipe.global_batch
        self._length = recipe.budget_samples
        self._schedule = recipe.schedule
        init, budget = training.init, recipe.budget_samples
        self._frozen = init.frozen_samples(budget) if init else 0
        self._ramp = init.ramp_samples(budget) if init else 0
        self._min_lr = recipe.optim.min_lr
        self._peak_lr = recipe.optim.base_lr * math.sqrt(recipe.global_batch / LR_BATCH)

    def at(self, step: int) -> ScheduleValues:
        """The values of step `step`, counted from 0."""
        samples, schedule = step * self._batch, self._schedule
        lr = learning_rate(
            samples,
            peak=self._peak_lr,
            end=self._min_lr,
            warmup=schedule.warmup_samples,
            length=self._length,
            batch=self._batch,
        )
        temperature_start, temperature_end = schedule.teacher_temperature
        momentum_start, momentum_end = schedule.teacher_momentum
        decay_start, decay_end = schedule.weight_decay
        return ScheduleValues(
            lr=lr,
            last_layer_lr=0.0 if samples < schedule.freeze_last_layer_samples else lr,
            backbone_lr=lr * thaw(samples, frozen=self._frozen, ramp=self._ramp),
            weight_decay=cosine(samples, start=decay_start, end=decay_end, length=self._length),
            teacher_momentum=cosine(samples, start=momentum_start, end=momentum_end, length=self._length),
            teacher_temperature=linear(
                samples,
                start=temperature_start,
                end=temperature_end,
                length=schedule.teacher_temperature_samples,
                batch=self._batch,
            ),
        )
