"""Tiny runs, in this process and over real gloo."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("runs.py")


@pytest.fixture(scope="session")
def runs():
    """The module with tiny configurations, micro-batches and runs."""
    spec = importlib.util.spec_from_file_location("step_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def worlds(runs, tmp_path_factory):
    """What every process of every world recorded: {world: [tensors of rank 0, of rank 1, ...]}."""
    folder = tmp_path_factory.mktemp("worlds")
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=environ, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return {
        world: [load_file(folder / f"{world}-{rank}.safetensors") for rank in range(size)]
        for world, size in runs.WORLDS.items()
    }
