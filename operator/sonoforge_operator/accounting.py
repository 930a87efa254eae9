"""Goodput: where the time of a job went."""

from __future__ import annotations

from sonoforge_operator.children import has_stepped, size_of, worker_facts
from sonoforge_operator.status import Goodput
from sonoforge_operator.turn import Turn
from sonoforge_trainer.contract import Activity

PRODUCTIVE = "productive"


def account(at: Turn) -> Turn:
    """Book the time since the last pass on what the job does now, and lost steps on what they took."""
    before = at.status.goodput
    if at.status.outcome:
        return at
    passed = max(0.0, at.now - (before.until or at.status.started))
    lost = dict(before.lost_seconds)
    productive = before.productive_seconds
    cause = _cause(at)
    if cause == PRODUCTIVE:
        productive += passed
    else:
        lost[cause] = lost.get(cause, 0.0) + passed
    again = _seconds_of_lost_steps(at)
    moved = min(productive, again)
    if moved:
        lost["lostWork"] = lost.get("lostWork", 0.0) + moved
    return at.update(goodput=Goodput(productive_seconds=productive - moved, lost_seconds=lost, until=at.now))


def _cause(at: Turn) -> str:
    workers = [f for _, f in worker_facts(at.job, at.status, at.observed)]
    progress = at.status.progress
    if at.status.suspended:
        return "suspended"
    if any(f.waiting == "WaitingForQueue" for f in workers):
        return "queue"
    if sum(f.works for f in workers) < size_of(at.job, at.status).min_nodes:
        return "belowMinimum" if at.status.reached_step else "start"
    if at.stall is not None:
        return "hang"
    if progress is not None and has_stepped(at.job, at.status, at.observed):
        return "checkpoint" if progress.activity is Activity.CHECKPOINTING else PRODUCTIVE
    return "restore" if progress is not None and progress.activity is Activity.STARTING else "rendezvous"


def _seconds_of_lost_steps(at: Turn) -> float:
    progress = at.status.progress
    steps = at.status.lost_steps - at.observed.status.lost_steps
    return steps * progress.median_step_seconds if progress else 0.0
