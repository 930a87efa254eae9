"""Logistic regression by L-BFGS on standardised features, its C chosen on validation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from sonoforge_trainer.evaluate.metrics import Floats, Ints
from sonoforge_trainer.evaluate.problem import Finding, Problem, best, report

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse strengths of the L2 penalty on features of unit variance, weakest model first."""

_ITERATIONS = 300


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


class Regression:
    """Multinomial logistic regression with class probabilities for all K classes, also those without training rows."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._model = LogisticRegression(max_iter=_ITERATIONS, warm_start=True)
        self._only: int | None = None

    def fit(self, features_nd: Floats, targets_n: Ints, c: float, weights_n: Floats | None = None) -> Regression:
        """Fit with a penalty, starting from the coefficients of the last fit."""
        present = np.unique(targets_n)
        self._only = int(present[0]) if len(present) == 1 else None
        if self._only is None:
            self._model.set_params(C=c)
            with warnings.catch_warnings():
                # A weak penalty on separable features has its optimum at infinity; validation judges what was reached.
                warnings.simplefilter("ignore", ConvergenceWarning)
                self._model.fit(features_nd, targets_n, sample_weight=weights_n)
        return self

    def probabilities(self, features_nd: Floats) -> Floats:
        """Class probabilities [n, K]."""
        probabilities = np.zeros((len(features_nd), self._classes))
        if self._only is None:
            found: Any = self._model.predict_proba(features_nd)
            probabilities[:, self._model.classes_] = found
        else:
            probabilities[:, self._only] = 1
        return probabilities


def logreg(problem: Problem, *, resamples: int, seed: int, grid: Sequence[float] = C_GRID) -> Finding:
    """Select input and C by balanced accuracy on validation, report on test."""
    candidates, test = {}, {}
    for name, features in problem.inputs.items():
        scale = Standardiser(features["train"])
        train, val, held_out = (scale(features[split]) for split in ("train", "val", "test"))
        model = Regression(len(problem.classes))
        for c in grid:
            model.fit(train, problem.targets["train"], c)
            candidate = f"{name} C={c:g}"
            candidates[candidate] = problem.predictions("val", model.probabilities(val)).balanced_accuracy()
            test[candidate] = model.probabilities(held_out)
    chosen = best(candidates)
    return report(problem, test[chosen], chosen=chosen, candidates=candidates, resamples=resamples, seed=seed)
