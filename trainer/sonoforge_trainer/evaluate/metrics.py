"""Classification metrics, from confusion counts and class probabilities.

Definitions, equal to scikit-learn's where it has them:

* accuracy: correct / all (top-1).
* balanced_accuracy: mean recall over the classes that occur in the split.
* f1_macro: mean F1 over the classes that occur in the split. A class that only occurs among the predictions has no F1
  of its own, but its false positives cost the others their recall.
* auroc_macro: mean one-vs-rest area under the ROC curve (Mann-Whitney, ties count half) over the classes that occur in
  the split and are not the whole of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sonoforge_trainer.contract import Score
from sonoforge_trainer.evaluate.bootstrap import Floats as Floats  # the arrays of all metrics
from sonoforge_trainer.evaluate.bootstrap import resample_weights, summarised

Ints = npt.NDArray[np.int64]

_CHUNK_ELEMENTS = 4_000_000
"""Elements of one temporary array of the bootstrap."""


def confusion_matrix(targets_n: Ints, predictions_n: Ints, classes: int) -> Ints:
    """Counts [classes, classes]: rows are true classes, columns predictions."""
    flat = np.bincount(targets_n * classes + predictions_n, minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.int64)


def accuracy(confusion: npt.NDArray[Any]) -> Floats:
    """Correct / all, of confusion counts [..., K, K]."""
    correct = np.trace(confusion, axis1=-2, axis2=-1)
    return ratio(correct, confusion.sum((-2, -1)))


def balanced_accuracy(confusion: npt.NDArray[Any]) -> Floats:
    """Mean recall over the classes with a true sample, of confusion counts [..., K, K]."""
    return mean_of_known(recalls(confusion))


def recalls(confusion: npt.NDArray[Any]) -> Floats:
    """Recall of each class [..., K]; NaN where the class has no true sample."""
    return ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1))


def f1_scores(confusion: npt.NDArray[Any]) -> Floats:
    """F1 of each class [..., K]; NaN where the class has no true sample."""
    truth = confusion.sum(-1)
    correct = np.diagonal(confusion, axis1=-2, axis2=-1)
    f1 = ratio(2 * correct, truth + confusion.sum(-2))
    return np.where(truth > 0, f1, np.nan)


def f1_macro(confusion: npt.NDArray[Any]) -> Floats:
    """Mean F1 over the classes with a true sample, of confusion counts [..., K, K]."""
    return mean_of_known(f1_scores(confusion))


def auroc(scores_n: Floats, positive_n: npt.NDArray[np.bool_], weights_rn: Floats | None = None) -> Floats:
    """Area under the ROC curve for R weightings of the samples [R]; NaN where one side has no weight.

    The weighted Mann-Whitney statistic: P(score of a positive > score of a negative) + P(equal) / 2.
    """
    weights = np.ones((1, len(scores_n))) if weights_rn is None else weights_rn
    order = np.argsort(scores_n, kind="stable")
    ordered = scores_n[order]
    # The first index of every run of equal scores.
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    weights = weights[:, order]
    positives = np.add.reduceat(weights * positive_n[order], starts, axis=1)
    negatives = np.add.reduceat(weights * ~positive_n[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + negatives / 2)).sum(1)
    return ratio(wins, positives.sum(1) * negatives.sum(1))


def auroc_macro(probabilities_nk: Floats, targets_n: Ints, weights_rn: Floats | None = None) -> Floats:
    """Mean one-vs-rest AUROC for R weightings [R], over the classes that have positives and negatives."""
    return mean_of_known(
        np.stack(
            [auroc(probabilities_nk[:, k], targets_n == k, weights_rn) for k in range(probabilities_nk.shape[1])],
            axis=1,
        )
    )


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of one split with the truth. Groups are patients; a sample of no known patient is its own."""

    probabilities_nk: Floats
    targets_n: Ints
    groups_n: Ints

    @property
    def predicted_n(self) -> Ints:
        """The most probable class; the first of equals."""
        predicted: Ints = self.probabilities_nk.argmax(1).astype(np.int64)
        return predicted

    @property
    def confusion(self) -> Ints:
        """Confusion counts [K, K]."""
        return confusion_matrix(self.targets_n, self.predicted_n, self.probabilities_nk.shape[1])

    def balanced_accuracy(self) -> float:
        """The number that every selection on the validation split uses."""
        return float(balanced_accuracy(self.confusion))

    def values(self) -> dict[str, float]:
        """Every metric that is defined."""
        confusion = self.confusion
        values = {
            "accuracy": float(accuracy(confusion)),
            "balanced_accuracy": float(balanced_accuracy(confusion)),
            "f1_macro": float(f1_macro(confusion)),
            "auroc_macro": float(auroc_macro(self.probabilities_nk, self.targets_n)[0]),
        }
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def scores(self, *, resamples: int, seed: int) -> dict[str, Score]:
        """Every metric with its 95 % interval from a bootstrap over the groups."""
        return scores_over_draws([self], resamples=resamples, seed=seed)

    def resampled(self, resamples: int, seed: int) -> Mapping[str, Floats]:
        """Every metric for resamples of the groups [R]; NaN in a resample where it is not defined."""
        samples, classes = self.probabilities_nk.shape
        names, groups_n = np.unique(self.groups_n, return_inverse=True)
        counts = np.zeros((len(names), classes * classes))
        np.add.at(counts, (groups_n, self.targets_n * classes + self.predicted_n), 1)
        weights = resample_weights(len(names), resamples, seed)
        confusion = (weights @ counts).reshape(-1, classes, classes)
        rows = max(1, _CHUNK_ELEMENTS // samples)
        areas = [
            auroc_macro(self.probabilities_nk, self.targets_n, weights[start : start + rows][:, groups_n])
            for start in range(0, resamples, rows)
        ]
        return {
            "accuracy": accuracy(confusion),
            "balanced_accuracy": balanced_accuracy(confusion),
            "f1_macro": f1_macro(confusion),
            "auroc_macro": np.concatenate(areas),
        }

    def details(self, classes: tuple[str, ...]) -> dict[str, object]:
        """Per-class numbers by class name, the confusion counts, and the classes that do not occur."""
        confusion = self.confusion
        recall, f1 = recalls(confusion), f1_scores(confusion)
        occurs = confusion.sum(1) > 0
        return {
            "recall": {name: float(recall[k]) for k, name in enumerate(classes) if occurs[k]},
            "f1": {name: float(f1[k]) for k, name in enumerate(classes) if occurs[k]},
            "confusion": {name: confusion[k].tolist() for k, name in enumerate(classes)},
            "absent_from_test": [name for k, name in enumerate(classes) if not occurs[k]],
        }


def scores_over_draws(draws: Sequence[Predictions], *, resamples: int, seed: int) -> dict[str, Score]:
    """Mean of every metric over several predictions of one split, with deviation and interval; see `summarised`."""
    resampled = [draw.resampled(resamples, seed) for draw in draws] if resamples else None
    return summarised([draw.values() for draw in draws], resampled)


def ratio(numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> Floats:
    """Quotient, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    quotient: Floats = np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)
    return quotient


def mean_of_known(values: Floats) -> Floats:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0).sum(-1), known.sum(-1))
