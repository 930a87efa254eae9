"""A fixed set of the faults of `make chaos-cluster`: on real nodes a job gets over each of them without a hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import scenarios
import wrong_jobs
from real_site import RealSite

pytestmark = pytest.mark.timeout(1800)
SCENARIOS = {each.number: each for each in scenarios.SCENARIOS}
WRONG_JOBS = {wrong.number: wrong for wrong in wrong_jobs.WRONG_JOBS}


@pytest.fixture(scope="module")
def calm(real_site: RealSite, tmp_path_factory: pytest.TempPathFactory) -> scenarios.Undisturbed:
    """Jobs that are left alone."""
    return scenarios.Undisturbed(real_site, tmp_path_factory.mktemp("calm"))


@pytest.mark.parametrize("number", ["4", "6"])
def test_after_a_fault_the_job_ends_as_if_nothing_had_been(
    number: str, real_site: RealSite, calm: scenarios.Undisturbed, tmp_path: Path
) -> None:
    recovery, differs = scenarios.play(real_site, SCENARIOS[number], calm, tmp_path)
    assert differs == []
    assert recovery.lost_steps <= scenarios.EVERY + 1, "no step is lost beyond the last checkpoint plus one"


@pytest.mark.parametrize("number", ["12c", "12e"])
def test_a_job_that_cannot_train_says_why(number: str, real_site: RealSite) -> None:
    wrong = WRONG_JOBS[number]
    assert wrong_jobs.play(real_site, wrong).startswith(f"{wrong.reason}: ")
