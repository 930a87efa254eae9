"""Planted features: what a protocol must find, and what it must not."""

from __future__ import annotations

import numpy as np
import pytest

from sonoforge_trainer.evaluate.problem import Problem

SIZES = {"train": 240, "val": 120, "test": 240}


@pytest.fixture
def planted():
    """A function that makes a problem of three classes whose class means lie `distance` noise deviations apart."""

    def make(distance: float, *, seed: int = 0, shuffled: bool = False, width: int = 24) -> Problem:
        random = np.random.default_rng(seed)
        means = random.normal(size=(3, width))
        means *= distance / np.linalg.norm(means, axis=1, keepdims=True)
        features, targets, groups = {}, {}, {}
        for split, size in SIZES.items():
            truth = np.arange(size) % 3
            features[split] = (means[truth] + random.normal(size=(size, width))).astype(np.float32)
            targets[split] = (random.permutation(truth) if shuffled else truth).astype(np.int64)
            groups[split] = (np.arange(size) // 6).astype(np.int64)
        return Problem(("a", "b", "c"), {"cls": features}, targets, groups)

    return make
