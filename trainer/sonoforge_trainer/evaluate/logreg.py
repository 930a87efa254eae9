"""Logistic regression by L-BFGS on standardised features, its C chosen on validation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # comes with scikit-learn, without types

from sonoforge_trainer.evaluate.bootstrap import Floats
from sonoforge_trainer.evaluate.metrics import Ints
from sonoforge_trainer.evaluate.problem import Finding, Problem, best, report

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse strengths of the L2 penalty on features of unit variance, weakest model first."""

_ITERATIONS = 100


class Standardiser:
    """Subtracts the mean of each feature of the training rows and divides by its standard deviation."""

    def __init__(self, train_nd: Floats) -> None:
        self._mean = train_nd.mean(0, dtype=np.float64)
        deviation = train_nd.std(0, dtype=np.float64)
        # A feature that does not vary says nothing; dividing its rounding noise by itself would let it shout.
        self._scale = np.where(deviation > 1e-6 * max(1.0, float(deviation.max())), deviation, np.inf)

    def __call__(self, features_nd: Floats) -> Floats:
        """Standardised float64 features."""
        scaled: Floats = (features_nd - self._mean) / self._scale
        return scaled


@dataclass(frozen=True)
class LinearModel:
    """A fitted multinomial model: probabilities are the softmax of features times weights plus biases."""

    weights_dk: Floats
    biases_k: Floats

    def probabilities(self, features_nd: Floats) -> Floats:
        """Class probabilities [n, K]; 0 for a class that had no training rows."""
        logits = features_nd @ self.weights_dk + self.biases_k
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities: Floats = exponentials / exponentials.sum(1, keepdims=True)
        return probabilities


def fit_path(
    features_nd: Floats, targets_n: Ints, classes: int, grid: Sequence[float], weights_n: Floats | None = None
) -> Iterator[tuple[float, LinearModel]]:
    """A model for every C of the grid in its order, each started from the one before."""
    present = np.unique(targets_n)
    if len(present) == 1:
        for c in grid:
            yield c, _spread(np.zeros((features_nd.shape[1], 1)), np.zeros(1), present, classes)
        return
    model = LogisticRegression(max_iter=_ITERATIONS, warm_start=True)
    for c in grid:
        model.set_params(C=c)
        # One thread: a path that is cut before its optimum shows in which order sums were taken, and numbers must not
        # depend on a machine's CPUs. At these sizes more threads cost more than they save.
        with threadpool_limits(1), warnings.catch_warnings():
            # A weak penalty on separable features has its optimum at infinity; validation judges what was reached.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features_nd, targets_n, sample_weight=weights_n)
        weights, biases = model.coef_.T, model.intercept_
        if len(present) == 2:  # scikit-learn keeps the difference of the two only
            weights, biases = np.c_[np.zeros_like(weights), weights], np.r_[0.0, biases]
        yield c, _spread(weights, biases, present, classes)


def _spread(weights: Floats, biases: Floats, present: Ints, classes: int) -> LinearModel:
    """The model of the classes that are present as one of all classes."""
    all_weights = np.zeros((len(weights), classes), weights.dtype)
    all_biases = np.full(classes, -np.inf, weights.dtype)
    all_weights[:, present], all_biases[present] = weights, biases
    return LinearModel(all_weights, all_biases)


def logreg(problem: Problem, *, resamples: int, seed: int, grid: Sequence[float] = C_GRID) -> Finding:
    """Select input and C by balanced accuracy on validation, report on both."""
    candidates, on_val, on_test = {}, {}, {}
    for name, features in problem.inputs.items():
        scale = Standardiser(features["train"])
        train, val, held_out = (scale(features[split]) for split in ("train", "val", "test"))
        for c, model in fit_path(train, problem.targets["train"], len(problem.classes), grid):
            candidate = f"{name} C={c:g}"
            on_val[candidate], on_test[candidate] = model.probabilities(val), model.probabilities(held_out)
            candidates[candidate] = problem.predictions("val", on_val[candidate]).balanced_accuracy()
    chosen = best(candidates)
    return report(
        problem, on_val[chosen], on_test[chosen], chosen=chosen, candidates=candidates, resamples=resamples, seed=seed
    )
