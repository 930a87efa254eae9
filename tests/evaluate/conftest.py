"""Planted features: what a protocol must find, and what it must not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sonoforge_trainer.evaluate.problem import Problem
from sonoforge_trainer.shards.phantoms import PhantomRule
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.shards.synth import build_phantoms
from sonoforge_trainer.storage import Storage

sys.path.insert(0, str(Path(__file__).parent))  # for evaluation_material.py; tests are no package

from evaluation_material import write_checkpoint

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


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def storage():
    return Storage()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """URI of a set of 144 phantoms of 48 pixels with classes, masks and patients in three splits."""
    output = tmp_path_factory.mktemp("phantoms").as_uri()
    rule = PhantomRule(144, size=48, frames=1, clips=6)
    build_phantoms(output, rule, PlanRule(100, 0, (0.5, 0.25, 0.25)), Storage())
    return f"{output}/shards.json"


@pytest.fixture
def checkpoint(tmp_path, storage):
    """(URI, manifest digest) of a checkpoint of a random backbone."""
    return write_checkpoint(storage, (tmp_path / "run").as_uri())
