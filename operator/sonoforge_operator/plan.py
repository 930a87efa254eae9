"""`plan(job, observed, now)`: what should be, as a pure function of what is. The one place that knows the whole story.

The status is written before any child is touched, and every child's name follows from the status, so a pass that is cut
anywhere is finished by the next one and nothing is counted or started twice.
"""

from __future__ import annotations

from sonoforge_operator import rules
from sonoforge_operator.accounting import account
from sonoforge_operator.api import JobFile
from sonoforge_operator.children import (
    any_worker_runs,
    attempt_of,
    last_checkpoint_is_known,
    wanted_children,
    worker_facts,
)
from sonoforge_operator.conditions import conditions, phase
from sonoforge_operator.group import count_coordinator, count_workers, resize, suspend, watch_for_stalls
from sonoforge_operator.observed import Event, Observed, Plan
from sonoforge_operator.scoring import choose_best, follow_suite, score_checkpoints, settled_scores
from sonoforge_operator.status import JobStatus, Outcome
from sonoforge_operator.turn import Turn
from sonoforge_operator.upkeep import add_checkpoints, retire_checkpoints, take_inventory
from sonoforge_trainer.contract import Activity, Progress, selection_score

_POLL_SECONDS = 1.0
_LEAVING_SECONDS = 60.0


def plan(job: JobFile, observed: Observed, now: float) -> Plan:
    """What the children and the status of a job should be at time `now` (Unix seconds)."""
    if observed.status.terminal:
        return Plan(children=(), status=observed.status, wake_after=float("inf"))
    turn = Turn(job, observed, now, observed.status)
    for part in (
        _accept,
        follow_suite,
        _read_progress,
        count_coordinator,
        count_workers,
        watch_for_stalls,
        take_inventory,
        score_checkpoints,
        choose_best,
        _decide_outcome,
        suspend,
        resize,
        account,
        retire_checkpoints,
        _finish,
    ):
        turn = part(turn)
    status = _with_conditions(turn)
    return Plan(
        children=() if status.terminal else tuple(wanted_children(job, status, observed, now)),
        kill=frozenset(n for n in observed.children if 0 < attempt_of(n) <= status.failed_attempt),
        status=status,
        requests=turn.requests,
        events=turn.events,
        wake_after=_POLL_SECONDS,
    )


def _accept(at: Turn) -> Turn:
    if at.status.started:
        return at
    message = f"{at.spec.training.recipe.steps} steps of {at.spec.training.recipe.global_batch} images"
    return at.update(Event("Accepted", message), started=at.now, attempt_started=at.now)


def _read_progress(at: Turn) -> Turn:
    """Take over what the run says: progress, and every checkpoint it committed."""
    progress = at.observed.progress
    before = at.status.progress
    if progress is None or progress.updated <= (before.updated if before else 0.0):
        return at  # a new coordinator knows nothing yet
    at = add_checkpoints(_count_lost_steps(at, progress), progress.checkpoints)
    damaged = tuple(uri for uri in progress.quarantined if uri not in at.status.quarantined)
    events = [Event("CheckpointQuarantined", f"{uri} is damaged and was set aside", warning=True) for uri in damaged]
    return at.update(*events, progress=progress, quarantined=at.status.quarantined + damaged)


def _count_lost_steps(at: Turn, progress: Progress) -> Turn:
    """Steps that a new process group has to do again, once it says where it stands."""
    if progress.activity in (Activity.WAITING, Activity.STARTING):
        return at
    lost = 0
    if progress.attempt != at.status.reached_by:
        lost = max(0, at.status.reached_step - (progress.restored_step or 0))
    return at.update(reached_step=progress.step, reached_by=progress.attempt, lost_steps=at.status.lost_steps + lost)


def _decide_outcome(at: Turn) -> Turn:
    """Training is over when the last checkpoint is there and its group has left, or when scores stop rising."""
    if at.status.outcome:
        return at
    policy = at.spec.evaluation
    if last_checkpoint_is_known(at.job, at.status):
        facts = worker_facts(at.job, at.status, at.observed)
        said = at.status.progress.updated if at.status.progress else 0.0
        if any(f.running for _, f in facts) and at.now - said < _LEAVING_SECONDS:
            return at  # they leave by themselves
        message = f"{at.spec.training.recipe.steps} steps done"
        outcome = Outcome(result="Succeeded", reason="BudgetSpent", message=message)
        return at.update(Event("Trained", message), outcome=outcome)
    scores = settled_scores(at.status, policy.best_by) if policy.best_by else []
    if rules.no_gain(scores, policy.stop_after_no_gain, highest=policy.best_is == "highest"):
        assert policy.best_by is not None, "there are no scores without one"
        name = selection_score(policy.best_by)
        message = f"{policy.stop_after_no_gain} checkpoints in a row without a better {name}"
        outcome = Outcome(result="Succeeded", reason="NoGain", message=message)
        return at.update(Event("StoppedEarly", message), outcome=outcome)
    return at


def _finish(at: Turn) -> Turn:
    """A job ends when training is over, its processes are gone, and every checkpoint in storage has its scores."""
    outcome = at.status.outcome
    if outcome is None or not at.status.listed or any_worker_runs(at.observed) or at.status.pruning:
        return at
    floors = at.status.floors if at.status.checkpoints else ()
    if not all(c.evaluated for c in at.status.checkpoints) or not all(f.ended for f in floors):
        return at
    return at.update(Event(outcome.result, outcome.message, outcome.result == "Failed"), finished=at.now)


def _with_conditions(at: Turn) -> JobStatus:
    found = conditions(at.job, at.status, at.observed, at.stall, at.now)
    return at.status.model_copy(update={"conditions": found, "phase": phase(found)})
