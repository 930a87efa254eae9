"""A run of three checkpoints on disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sonoforge_trainer.contract import RunSummary

sys.path.insert(0, str(Path(__file__).parent))  # for report_material.py; tests are no package

from report_material import summary_of_three


@pytest.fixture
def summary(tmp_path: Path) -> RunSummary:
    """A run of three checkpoints, with logs, results and pictures in the test's folder."""
    return summary_of_three(tmp_path)
