"""Conditions and phase: derived from the facts in one place, each condition always present."""

from __future__ import annotations

from sonoforge_operator.api import JobFile
from sonoforge_operator.observed import Observed
from sonoforge_operator.rules import Stall
from sonoforge_operator.status import Condition, JobStatus, Phase
from sonoforge_trainer.contract import Activity, Progress


def conditions(
    job: JobFile, status: JobStatus, observed: Observed, stall: Stall | None, now: float
) -> tuple[Condition, ...]:
    """All conditions of a job. `since` moves only where the status of a condition changes."""
    progress = observed.progress
    workers = [f for name, f in observed.children.items() if name.startswith("worker-")]
    running = sum(f.running for f in workers)
    outcome = status.outcome
    waiting = [e for c in status.checkpoints for e in c.evaluations if e.phase in ("Pending", "Running")]
    suspended = job.job.spec.suspend and not running and outcome is None
    # A run trains when a step ended since its newest process started: what it says of itself is not enough.
    stepping = bool(
        progress
        and running
        and not stall
        and progress.activity in (Activity.TRAINING, Activity.CHECKPOINTING)
        and progress.step_time > status.attempt_started
    )
    facts = [
        ("Accepted", True, "Valid", "the job can run"),
        ("Rendezvoused", bool(progress and progress.world_size and running), _rendezvous_reason(progress, running), ""),
        (
            "Training",
            stepping,
            _training_reason(progress, running, outcome is not None),
            _training_message(progress, stepping),
        ),
        ("Stalled", stall is not None, stall.reason if stall else "Stepping", stall.message if stall else ""),
        ("Evaluating", bool(waiting), "Backlog" if waiting else "UpToDate", f"{len(waiting)} evaluations to do"),
        ("Suspended", suspended, "Asked" if suspended else "NotAsked", ""),
        _end("Succeeded", status, "NotYet"),
        _end("Failed", status, "NoFailure"),
    ]
    made = []
    for kind, holds, reason, message in facts:
        before = status.condition(kind)
        value = "True" if holds else "False"
        since = before.since if before and before.status == value else now
        made.append(
            Condition.parse({"type": kind, "status": value, "reason": reason, "message": message, "since": since})
        )
    return tuple(made)


def phase(found: tuple[Condition, ...]) -> Phase:
    """One word for printing: the first condition of this order that holds."""
    holds = {c.type for c in found if c.status == "True"}
    for condition, word in _PHASES:
        if condition in holds:
            return word
    return "Pending"


def _end(result: str, status: JobStatus, otherwise: str) -> tuple[str, bool, str, str]:
    outcome = status.outcome
    if outcome is None or outcome.result != result:
        return result, False, otherwise, ""
    return result, status.terminal, outcome.reason, outcome.message


_PHASES: tuple[tuple[str, Phase], ...] = (
    ("Succeeded", "Succeeded"),
    ("Failed", "Failed"),
    ("Stalled", "Stalled"),
    ("Training", "Running"),
    ("Suspended", "Suspended"),
    ("Evaluating", "Evaluating"),
)


def _rendezvous_reason(progress: Progress | None, running: int) -> str:
    if not running:
        return "NoWorkers"
    if progress is None:
        return "Unreachable"
    return "Formed" if progress.world_size else "Waiting"


def _training_reason(progress: Progress | None, running: int, training_over: bool) -> str:
    if training_over:
        return "Over"
    if not running:
        return "NoWorkers"
    return str(progress.activity) if progress else "Unreachable"


def _training_message(progress: Progress | None, stepping: bool) -> str:
    if not progress or not stepping:
        return ""
    return f"step {progress.step} of {progress.steps} on {progress.world_size} processes"
