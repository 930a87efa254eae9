"""Real runs of a tiny job: real agents, coordinator and evaluations. `calm` is the one to compare with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos import LocalRun, Outcome, make_data, write_job

STEPS, EVERY = 32, 16


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms to train on and to evaluate with."""
    path = tmp_path_factory.mktemp("local")
    make_data(path)
    return path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., LocalRun]]:
    """Start a run by name; whatever is left of it is stopped at the end."""
    runs: list[LocalRun] = []

    def make(name: str, *, nodes: int = 1, steps: int = STEPS, every: int = EVERY) -> LocalRun:
        runs.append(LocalRun(write_job(folder, name, steps=steps, nodes=nodes, every=every)))
        return runs[-1]

    yield make
    for run in runs:
        run.stop()


@pytest.fixture(scope="session")
def calm(folder: Path) -> Outcome:
    """An undisturbed run on one process."""
    run = LocalRun(write_job(folder, "calm", steps=STEPS, nodes=1, every=EVERY))
    try:
        assert run.finish(300) == 0, run.tail()
    finally:
        run.stop()
    return run.outcome()
