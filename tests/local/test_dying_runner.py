"""The runner is killed before every kind of write it makes, again and again, and nothing comes of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from chaos import LocalRun, write_job

DYING = Path(__file__).with_name("dying_runner.py")


def test_a_runner_that_dies_before_each_of_its_writes_loses_nothing_and_starts_nothing_twice(folder):
    job = write_job(folder, "dying", steps=8, nodes=1, every=4)
    state = folder / "state" / "dying"
    deaths, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL and deaths < 200:
        command = [sys.executable, str(DYING), str(1 + deaths), "run", str(job), "--state", str(state), "--quiet"]
        with (state / "runner.log").open("ab") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        deaths += code == -signal.SIGKILL
    run = LocalRun(job)  # a finished job is left as it is
    try:
        assert code == 0, run.tail()
        assert run.finish(60) == 0
    finally:
        run.stop()
    assert deaths >= 10
    outcome = run.outcome()
    assert outcome.status.restarts == {}
    assert [c.ref.step for c in outcome.status.checkpoints] == [0, 4, 8]
    evaluations = [e for c in outcome.status.checkpoints for e in c.evaluations]
    assert [(e.phase, e.failures, e.lost) for e in evaluations] == [("Succeeded", 0, 0)] * 3
    assert [f.phase for f in outcome.status.floors] == ["Succeeded"]
    starts = sorted(p.stem for p in (state / "logs").glob("*.log"))
    assert [n for n in starts if n.startswith("worker-")] == ["worker-001-0000-000"]
    assert len([n for n in starts if n.startswith("eval-")]) == 3
    assert sorted(outcome.metrics) == list(range(1, 9))
