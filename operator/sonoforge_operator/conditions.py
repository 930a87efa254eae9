"""Conditions and phase: derived from the facts in one place, each condition always present."""

from __future__ import annotations

from sonoforge_operator.api import JobFile
from sonoforge_operator.children import (
    evaluation_name,
    floor_name,
    has_stepped,
    held_up,
    inventory_name,
    inventory_wanted,
    newest_start,
    retention_name,
    size_of,
)
from sonoforge_operator.observed import ChildFact, Observed
from sonoforge_operator.rules import Stall, collapse
from sonoforge_operator.status import Condition, JobStatus, Outcome, Phase
from sonoforge_trainer.contract import Activity, Progress, split_score

_NEWS_SECONDS = 30.0
"""How long the last news holds while a coordinator is replaced."""
_LEAVING = (Activity.STOPPED, Activity.FINISHED)
_STEPPING = (Activity.TRAINING, Activity.CHECKPOINTING, *_LEAVING)


def conditions(
    job: JobFile, status: JobStatus, observed: Observed, stall: Stall | None, now: float
) -> tuple[Condition, ...]:
    """All conditions of a job. `since` moves only where the status of a condition changes."""
    workers = [f for name, f in observed.children.items() if name.startswith("worker-")]
    running = sum(f.works for f in workers)
    waiting_for_queue = any(f.waiting == "WaitingForQueue" for f in workers)
    outcome = status.outcome
    suspended = status.suspended and not any(f.running for f in workers) and outcome is None
    facts: list[_Fact] = [
        ("Accepted", True, "Valid", "the job can run"),
        ("Queued", waiting_for_queue, "WaitingForQueue" if waiting_for_queue else "NotWaiting", ""),
        _scheduled(job, status, workers, observed.refused),
        _rendezvoused(observed.progress, running),
        _training(job, status, observed, stall, now) if running and outcome is None else _not_training(outcome),
        ("Stalled", stall is not None, stall.reason if stall else "Stepping", stall.message if stall else ""),
        _evaluating(status, observed),
        _collapsed(job, status),
        _suspended(status, suspended),
        _end("Succeeded", status, "NotYet"),
        _end("Failed", status, "NoFailure"),
    ]
    made = []
    for kind, holds, reason, message in facts:
        before = status.condition(kind)
        value = "Unknown" if holds is None else "True" if holds else "False"
        since = before.since if before and before.status == value else now
        made.append(
            Condition.parse({"type": kind, "status": value, "reason": reason, "message": message, "since": since})
        )
    return tuple(made)


def phase(found: tuple[Condition, ...]) -> Phase:
    """One word for printing: the first condition of this order that holds."""
    holds = {c.type for c in found if c.status == "True"}
    if any(c.type == "Training" and c.status == "Unknown" for c in found):
        holds.add("Training")  # the last that was known; silence that lasts is a stall
    over = any(c.type == "Training" and c.reason == "Over" for c in found)
    if not over:
        holds.discard("Evaluating")  # it goes on beside the training, which is what the job waits for
    # After the training nothing is pending: workers leave, storage is listed and put in order, scores come.
    return next((word for condition, word in _PHASES if condition in holds), "Evaluating" if over else "Pending")


_Fact = tuple[str, bool | None, str, str]
"""Type, whether it holds (None: not known), reason, message."""


def _end(result: str, status: JobStatus, otherwise: str) -> _Fact:
    outcome = status.outcome
    if outcome is None or outcome.result != result:
        return result, False, otherwise, ""
    return result, status.terminal, outcome.reason, outcome.message


def _scheduled(job: JobFile, status: JobStatus, workers: list[ChildFact], refused: str) -> _Fact:
    working, wanted = sum(f.works for f in workers), size_of(job, status)
    message = f"{working} nodes run, {wanted.min_nodes} to {wanted.max_nodes} are wanted"
    if working >= wanted.min_nodes:
        return "Scheduled", True, "Running", message
    if status.outcome is not None:
        return "Scheduled", False, "Over", f"{working} nodes run, none is wanted any more"
    waiting = held_up(workers)
    if waiting:
        return "Scheduled", False, waiting.waiting, f"{message}: {waiting.waiting_message}".rstrip(": ")
    if refused:
        return "Scheduled", False, "Refused", f"{message}; the API server refused what they need: {refused}"
    return "Scheduled", False, "Starting" if workers else "NoWorkers", message


def _rendezvoused(answer: Progress | None, running: int) -> _Fact:
    if not running:
        return "Rendezvoused", False, "NoWorkers", ""
    if answer is None or not answer.updated:
        return "Rendezvoused", None, "Unreachable", "the coordinator does not know yet"
    formed = bool(answer.world_size)
    return "Rendezvoused", formed, "Formed" if formed else "Waiting", f"{answer.world_size} processes"


def _training(job: JobFile, status: JobStatus, observed: Observed, stall: Stall | None, now: float) -> _Fact:
    """A run trains when a step ended since its newest process started: what it says of itself is not enough."""
    known = status.progress
    # A group that restored the last checkpoint has no step to do.
    leaves = known is not None and known.activity in _LEAVING and known.updated > newest_start(job, status, observed)
    if known is None or not (leaves or has_stepped(job, status, observed)):
        return "Training", False, str(known.activity) if known else "Waiting", "no step since the last start"
    if stall:
        return "Training", False, stall.reason, stall.message
    if known.activity not in _STEPPING:
        return "Training", False, str(known.activity), ""
    message = f"step {known.step} of {known.steps} on {known.world_size} processes"
    silent = observed.progress is None or not observed.progress.updated
    if silent and now - known.updated > _NEWS_SECONDS:
        return "Training", None, "Unreachable", f"last known: {message}"
    return "Training", True, str(known.activity), message


def _evaluating(status: JobStatus, observed: Observed) -> _Fact:
    """What is left to score; where it cannot go on, or what else a job waits for at its end, why."""
    evaluations = [e for c in status.checkpoints for e in c.evaluations if not e.ended]
    floors = [f for f in status.floors if not f.ended] if status.checkpoints else []
    left = len(evaluations) + len(floors)
    message = f"{left} evaluations to do"
    names = [*map(evaluation_name, evaluations), *map(floor_name, floors)]
    names += [retention_name(status)] if status.pruning else []
    names += [inventory_name(status)] if inventory_wanted(status, observed) else []
    held = held_up(observed.children[name] for name in names if name in observed.children)
    if held and held.waiting != "Starting":
        return "Evaluating", bool(left), held.waiting, f"{message}; {held.name}: {held.waiting_message}".rstrip(": ")
    if names and observed.refused:
        return "Evaluating", bool(left), "Refused", f"{message}; the API server refused a child: {observed.refused}"
    return "Evaluating", bool(left), "Backlog" if left else "UpToDate", message


def _collapsed(job: JobFile, status: JobStatus) -> _Fact:
    """Step 0 has not trained. Of several evaluations of a checkpoint the one that looks best counts."""
    ranks = []
    for checkpoint in sorted(status.checkpoints, key=lambda c: c.ref.step):
        scores = [(n, s.value) for e in checkpoint.evaluations for n, s in e.scores.items()]
        known = [value for name, value in scores if split_score(name)[2] == "rankme"]
        if known and checkpoint.ref.step:
            ranks.append(max(known))
    found = collapse(status.progress, ranks, job.job.spec.training.recipe.head.prototypes)
    if found is None:
        return "Collapsed", None, "NotMeasured", ""
    return "Collapsed", bool(found), "AllAlike" if found else "Varied", found


def _suspended(status: JobStatus, suspended: bool) -> _Fact:
    if status.saving:
        said = "were asked to save and leave" if status.saving.asked else "are to be asked to save and leave"
        return "Suspended", False, "Saving", f"the nodes {said}"
    if status.suspended and not suspended and not status.outcome:
        return "Suspended", False, "Leaving", "the nodes leave"
    return "Suspended", suspended, "Asked" if suspended else "NotAsked", ""


def _not_training(outcome: Outcome | None) -> _Fact:
    return "Training", False, "Over" if outcome else "NoWorkers", ""


_PHASES: tuple[tuple[str, Phase], ...] = (
    ("Succeeded", "Succeeded"),
    ("Failed", "Failed"),
    ("Queued", "Queued"),
    ("Stalled", "Stalled"),
    ("Training", "Running"),
    ("Suspended", "Suspended"),
    ("Evaluating", "Evaluating"),
)
