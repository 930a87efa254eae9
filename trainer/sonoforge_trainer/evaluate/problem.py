"""What a classification protocol works on: features with targets, in three splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sonoforge_trainer.contract import VALIDATION_PREFIX, SampleConfusions, Score
from sonoforge_trainer.evaluate.bootstrap import Floats
from sonoforge_trainer.evaluate.evidence import classified
from sonoforge_trainer.evaluate.metrics import Ints, Predictions

SPLITS = ("train", "val", "test")
"""Fitted on the first, selected on the second, reported on the third."""


@dataclass(frozen=True)
class Problem:
    """Features and targets by split.

    `inputs` maps the name of an input (for example cls, or cls+mean_patch) to its features [n, d] of each split.
    Targets are indices into `classes`, which are label texts in sorted order. Groups number the patients.
    """

    classes: tuple[str, ...]
    inputs: Mapping[str, Mapping[str, Floats]]
    targets: Mapping[str, Ints]
    groups: Mapping[str, Ints]

    def predictions(self, split: str, probabilities_nk: Floats) -> Predictions:
        """Class probabilities of a split beside its truth."""
        return Predictions(probabilities_nk, self.targets[split], self.groups[split])

    def only(self, *names: str) -> Problem:
        """The same problem with the named inputs that it has."""
        inputs = {name: self.inputs[name] for name in names if name in self.inputs}
        return Problem(self.classes, inputs or self.inputs, self.targets, self.groups)

    def draw(self, train_rows: Ints) -> Problem:
        """The same problem with these rows as its training split."""
        inputs = {n: {**by_split, "train": by_split["train"][train_rows]} for n, by_split in self.inputs.items()}
        return Problem(
            self.classes,
            inputs,
            {**self.targets, "train": self.targets["train"][train_rows]},
            {**self.groups, "train": self.groups["train"][train_rows]},
        )


@dataclass(frozen=True)
class Finding:
    """What a protocol found: scores and details by metric, and what it selected on the validation split."""

    scores: dict[str, Score]
    """On the test split; those whose metric begins with val_ on the validation split."""
    chosen: str = ""
    details: dict[str, object] = field(default_factory=dict)
    samples: SampleConfusions | None = None
    """What became of each test sample; None where there are several draws, or nothing to predict."""
    masks: Callable[[Sequence[int]], list[Ints]] | None = field(default=None, compare=False)
    """Of a segmentation: predicted classes [H, W] of some test images, by their number among those with a mask."""


def report(
    problem: Problem,
    val_nk: Floats,
    test_nk: Floats,
    *,
    chosen: str,
    candidates: Mapping[str, float],
    resamples: int,
    seed: int,
) -> Finding:
    """The finding of a protocol that selected `chosen` among `candidates` by their validation scores.

    `val_nk` and `test_nk` are the class probabilities of `chosen`, which was fitted on the training split alone.
    """
    predictions = problem.predictions("test", test_nk)
    details = predictions.details(problem.classes)
    details["validation_balanced_accuracy"] = dict(candidates)
    details["images"] = {split: len(targets) for split, targets in problem.targets.items()}
    scores = predictions.scores(resamples=resamples, seed=seed)
    return Finding(
        scores | on_validation(problem.predictions("val", val_nk).values()),
        chosen,
        details,
        classified(problem.classes, predictions.groups_n, predictions.targets_n, predictions.predicted_n),
    )


def on_validation(values: Mapping[str, float]) -> dict[str, Score]:
    """Values of the validation split under the names of their own, without intervals: they compare checkpoints."""
    return {f"{VALIDATION_PREFIX}{metric}": Score(value=value) for metric, value in values.items()}


def best(candidates: Mapping[str, float]) -> str:
    """The candidate with the highest validation score; the first of equals. An undefined score is the lowest."""
    names = list(candidates)
    values = np.array([candidates[name] for name in names])
    return names[int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))]
