"""Scores: which evaluations each checkpoint has, what became of them, and which checkpoint is best."""

from __future__ import annotations

import hashlib

from sonoforge_operator import rules
from sonoforge_operator.api import JobFile
from sonoforge_operator.children import evaluation_name, floor_name
from sonoforge_operator.observed import ChildFact, Event
from sonoforge_operator.status import CheckpointStatus, EvaluationStatus, JobStatus, Tries, named_scores, requests_of
from sonoforge_operator.turn import Turn
from sonoforge_trainer.contract import (
    CheckpointRef,
    Evaluation,
    Score,
    baseline_evaluation,
    baseline_request_id,
    canonical_json,
    is_validation_score,
    selection_score,
    split_score,
)


def checkpoint_status(ref: CheckpointRef, job: JobFile) -> CheckpointStatus:
    """A new checkpoint, with everything still to do."""
    evaluations = tuple(EvaluationStatus(name=e.name, id=r.id) for e, r in requests_of(ref, job.evaluations))
    return CheckpointStatus(ref=ref, evaluations=evaluations)


def follow_suite(at: Turn) -> Turn:
    """Give every checkpoint the evaluations that the job asks for now. What was scored before is kept."""
    suite = _suite_digest(at.job)
    fresh = [EvaluationStatus(name=e.name, id=e.digest().removeprefix("sha256:")[:16]) for e in _with_floors(at.job)]
    fresh += _of_baselines(at.job)
    # Compared each time: what is remembered may have been edited, and a floor that nobody asks for has no request.
    if at.status.suite == suite and [_asked(f) for f in at.status.floors] == [_asked(f) for f in fresh]:
        return at
    checkpoints = tuple(
        c.model_copy(update={"evaluations": tuple(_evaluations_of(c, at.job))}) for c in at.status.checkpoints
    )
    known = {_asked(f): f for f in at.status.floors}
    return at.update(suite=suite, checkpoints=checkpoints, floors=tuple(known.get(_asked(f), f) for f in fresh))


def score_checkpoints(at: Turn) -> Turn:
    """Take over ended evaluations and start waiting ones: oldest checkpoint first, floors and baselines last."""
    policy = at.spec.evaluation
    events: list[Event] = []
    checkpoints: list[CheckpointStatus] = []
    for checkpoint in at.status.checkpoints:
        evaluations = []
        for evaluation in checkpoint.evaluations:
            fact = at.observed.children.get(evaluation_name(evaluation))
            after = _advance(evaluation, fact, at, prefix=f"{evaluation.name}-")
            evaluations.append(after)
            events += _told(f"{checkpoint.ref.id}, {after.name}", evaluation, after, policy.best_by)
        checkpoints.append(checkpoint.model_copy(update={"evaluations": tuple(evaluations)}))
    floors = []
    for floor in at.status.floors:
        prefix = f"{floor.baseline}:{floor.name}-" if floor.baseline else ""
        after = _advance(floor, at.observed.children.get(floor_name(floor)), at, prefix=prefix)
        floors.append(after)
        who = f"baseline {after.baseline}, {after.name}" if after.baseline else f"floors of {after.name}"
        events += _told(who, floor, after, None)
    if not checkpoints:
        # A floor names a checkpoint in its request: where all were deleted, it waits for the next.
        floors = [_waiting(floor) for floor in floors]
    running = sum(e.phase == "Running" for e in [*floors, *(e for c in checkpoints for e in c.evaluations)])
    for number, checkpoint in enumerate(checkpoints):
        started = _started(checkpoint.evaluations, policy.parallel - running)
        running += sum(e.phase == "Running" for e in started) - sum(
            e.phase == "Running" for e in checkpoint.evaluations
        )
        checkpoints[number] = checkpoint.model_copy(update={"evaluations": started})
    if checkpoints and not any(e.phase == "Pending" for c in checkpoints for e in c.evaluations):
        floors = list(_started(tuple(floors), policy.parallel - running))
    return at.update(*events, checkpoints=tuple(checkpoints), floors=tuple(floors))


def choose_best(at: Turn) -> Turn:
    """Name the sound checkpoint that is best on validation; of equal ones the oldest. Test scores are not looked at."""
    policy = at.spec.evaluation
    name = policy.best_by
    scored = [(s, c) for c in at.status.sound if name and (s := c.compared(name)) is not None]
    if name is None or not scored:
        return _mark_best(at, None, None, None) if at.status.best else at
    sign = 1 if policy.best_is == "highest" else -1
    compared, best = max(scored, key=lambda pair: sign * pair[0])
    score = best.score(name)
    before = (at.status.best, at.status.best_score, at.status.best_compared)
    if (best.ref.id, score, compared) == before:
        return at
    told = f"{best.ref.id}: {selection_score(name)} {compared:.4f}"
    if selection_score(name) != name and score is not None:
        told += f"; on test {score:.4f}"
    return _mark_best(at, best.ref.id, score, compared).update(Event("NewBest", told))


def settled_scores(status: JobStatus, best_by: str) -> list[float | None]:
    """What decides, by checkpoint, up to the first that may still get it; None where it never comes."""
    scores: list[float | None] = []
    for checkpoint in status.sound:
        score = checkpoint.compared(best_by)
        if score is None and not checkpoint.evaluated:
            break
        scores.append(score)
    return scores


def _mark_best(at: Turn, best: str | None, score: float | None, compared: float | None) -> Turn:
    checkpoints = tuple(c.model_copy(update={"best": c.ref.id == best}) for c in at.status.checkpoints)
    return at.update(checkpoints=checkpoints, best=best or "", best_score=score, best_compared=compared)


def _suite_digest(job: JobFile) -> str:
    asked = [[e.document() for e in job.evaluations], job.job.spec.evaluation.floors]
    asked += [[b.document() for b in job.baselines]] if job.baselines else []
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:16]


def _evaluations_of(checkpoint: CheckpointStatus, job: JobFile) -> list[EvaluationStatus]:
    known = {e.id: e for e in checkpoint.evaluations}
    found = []
    for fresh in checkpoint_status(checkpoint.ref, job).evaluations:
        evaluation = known.get(fresh.id, fresh)
        if checkpoint.pruned and not evaluation.ended:
            reason = "the checkpoint was deleted by retention before this evaluation was asked for"
            evaluation = evaluation.model_copy(update={"phase": "Failed", "reason": reason})
        found.append(evaluation)
    return found


def _with_floors(job: JobFile) -> list[Evaluation]:
    if not job.job.spec.evaluation.floors:
        return []
    return [e for e in job.evaluations if set(e.protocols) != {"health"}]


def _of_baselines(job: JobFile) -> list[EvaluationStatus]:
    """Every evaluation that a baseline of the suite can do."""
    return [
        EvaluationStatus(name=e.name, id=baseline_request_id(baseline, asked), baseline=baseline.name)
        for baseline in job.baselines
        for e in job.evaluations
        if (asked := baseline_evaluation(baseline, e)) is not None
    ]


def _asked(floor: EvaluationStatus) -> tuple[str, str, str]:
    """What tells floors and baselines apart."""
    return floor.id, floor.name, floor.baseline


def _waiting(floor: EvaluationStatus) -> EvaluationStatus:
    return floor.model_copy(update={"phase": "Pending"}) if floor.phase == "Running" else floor


def _started(evaluations: tuple[EvaluationStatus, ...], free: int) -> tuple[EvaluationStatus, ...]:
    """With as many of the waiting ones started as there are free places."""
    found = []
    for evaluation in evaluations:
        if evaluation.phase == "Pending" and free > 0:
            free -= 1
            evaluation = evaluation.model_copy(update={"phase": "Running"})
        found.append(evaluation)
    return tuple(found)


def _advance(evaluation: EvaluationStatus, fact: ChildFact | None, at: Turn, *, prefix: str) -> EvaluationStatus:
    """An evaluation after what its process did. One that waits again gets a new name."""
    # While the run trains, somebody may put right what cannot start: it keeps its place until then.
    patience = at.startup_deadline if at.status.outcome else float("inf")
    failure = rules.end_of(fact, at.now, patience) if fact else None
    if evaluation.phase != "Running" or fact is None or failure is None:
        return evaluation
    said = fact.termination
    if fact.exit_code in (0, None) and said and said.result is not None:
        try:
            scores = {f"{prefix}{name}": Score.parse(value) for name, value in said.result.items()}
            return evaluation.model_copy(update={"phase": "Succeeded", "scores": named_scores(scores), "reason": ""})
        except ValueError:
            failure = rules.Failure("application", "its scores cannot be read")
    before = Tries(failures=evaluation.failures, lost=evaluation.lost)
    tries, again = rules.tried(before, failure, at.spec.evaluation.retries)
    counted = evaluation.model_copy(update={"failures": tries.failures, "lost": tries.lost})
    if again:
        return counted.model_copy(update={"phase": "Pending"})
    reason = failure.message or str(failure.cause)
    if tries.lost > before.lost:
        reason = f"killed {tries.lost} times without an answer; is there enough memory?"
    return counted.model_copy(update={"phase": "Failed", "reason": reason})


def _told(what: str, before: EvaluationStatus, after: EvaluationStatus, best_by: str | None) -> list[Event]:
    """What to tell about an evaluation that ended or has to be done again."""
    if after.phase == "Failed" and not before.ended:
        return [Event("EvaluationFailed", f"{what}: {after.reason}", warning=True)]
    if after.failures > before.failures:
        return [Event("EvaluationRetried", f"{what}: it failed and is done again", warning=True)]
    if after.phase != "Succeeded" or before.ended:
        return []
    events = [Event("Evaluated", f"{what}: {_summary(after.scores)}")]
    if best_by and split_score(best_by)[0] == after.name and (fault := _fault(best_by, after.scores)):
        events.append(Event("BestByUnknown", f"{what}: bestBy {fault}", warning=True))
    return events


def _fault(best_by: str, scores: dict[str, Score]) -> str:
    """Why checkpoints cannot be compared by a score; empty where they can."""
    if selection_score(best_by) in scores:
        return ""
    if best_by in scores:
        return f"{best_by!r} has no validation score here, so this checkpoint cannot become best; name another metric"
    protocol = best_by.partition("/")[0]
    known = sorted(n for n in scores if n.startswith(f"{protocol}/") and not is_validation_score(n))
    return f"{best_by!r} is not among its scores. Allowed: {', '.join(known) or 'none'}"


def _summary(scores: dict[str, Score]) -> str:
    on_test = [(name, score) for name, score in sorted(scores.items()) if not is_validation_score(name)]
    return ", ".join(f"{name} {score.value:.4f}" for name, score in on_test[:4])
