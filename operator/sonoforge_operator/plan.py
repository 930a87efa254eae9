"""`plan(job, observed, now)`: what should be, as a pure function of what is. The one place that knows the whole story.

The status is written before any child is touched, and every child's name follows from the status, so a pass that is cut
anywhere is finished by the next one and nothing is counted or started twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sonoforge_operator import rules
from sonoforge_operator.api import JobFile, seconds
from sonoforge_operator.conditions import conditions, phase
from sonoforge_operator.observed import Child, ChildFact, Event, Observed, Plan
from sonoforge_operator.retention import prunable
from sonoforge_operator.status import (
    CheckpointStatus,
    EvaluationStatus,
    JobStatus,
    Outcome,
    requests_of,
)
from sonoforge_trainer.contract import Progress, Request, Score

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class _Pass:
    """One pass over one job: the facts, and the status as it stands after the parts that ran."""

    job: JobFile
    observed: Observed
    now: float
    status: JobStatus
    events: tuple[Event, ...] = ()
    requests: tuple[Request, ...] = ()
    stall: rules.Stall | None = None

    def update(self, *events: Event, **changes: object) -> _Pass:
        status = self.status.model_copy(update=changes)
        return _Pass(self.job, self.observed, self.now, status, self.events + events, self.requests, self.stall)


def plan(job: JobFile, observed: Observed, now: float) -> Plan:
    """What the children and the status of a job should be at time `now` (Unix seconds)."""
    if observed.status.terminal:
        return Plan(children=(), status=observed.status, wake_after=float("inf"))
    current = _Pass(job, observed, now, observed.status)
    for part in (
        _accept,
        _resize,
        _read_progress,
        _count_coordinator,
        _count_workers,
        _watch_for_stalls,
        _score_checkpoints,
    ):
        current = part(current)
    for part in (_choose_best, _decide_outcome, _retire_checkpoints, _finish):
        current = part(current)
    status = _with_conditions(current)
    return Plan(
        children=() if status.terminal else tuple(_children(job, status, observed)),
        kill=frozenset(n for n in observed.children if _attempt_of(n) and _attempt_of(n) <= status.failed_attempt),
        status=status,
        requests=current.requests,
        events=current.events,
        wake_after=_POLL_SECONDS,
    )


def _accept(at: _Pass) -> _Pass:
    if at.status.started:
        return at
    spec = at.job.job.spec
    message = f"{spec.training.recipe.steps} steps of {spec.training.recipe.global_batch} images"
    return at.update(Event("Accepted", message), started=at.now, attempt_started=at.now)


def _resize(at: _Pass) -> _Pass:
    """Start a new attempt where the spec asks for another size. The old one saves a checkpoint on leaving."""
    wanted = at.job.job.spec.workers
    if at.status.workers == wanted:
        return at
    if at.status.workers is None:
        return at.update(workers=wanted)
    event = Event("Resized", f"{wanted.min_nodes} to {wanted.max_nodes} nodes of {wanted.gpus_per_node} processes")
    return _next_attempt(at.update(event, workers=wanted))


def _next_attempt(at: _Pass) -> _Pass:
    return at.update(attempt=at.status.attempt + 1, worker_deaths=(), attempt_started=at.now, replaced=at.now)


def _read_progress(at: _Pass) -> _Pass:
    """Take over what the run says: progress, and every checkpoint it committed."""
    progress = at.observed.progress
    if progress is None:
        return at
    before = at.status.progress
    if before and progress.updated < before.updated:
        return at
    known = {c.ref.id for c in at.status.checkpoints}
    fresh = [ref for ref in progress.checkpoints if ref.id not in known]
    evaluations = at.job.evaluations
    added = tuple(
        CheckpointStatus(
            ref=ref,
            evaluations=tuple(EvaluationStatus(name=e.name, id=r.id) for e, r in requests_of(ref, evaluations)),
        )
        for ref in fresh
    )
    events = [Event("CheckpointCommitted", f"step {ref.step}, {ref.samples} samples: {ref.id}") for ref in fresh]
    quarantined = set(progress.quarantined) - set(before.quarantined if before else ())
    events += [
        Event("CheckpointQuarantined", f"{uri} is damaged and was set aside", warning=True) for uri in quarantined
    ]
    checkpoints = tuple(sorted(at.status.checkpoints + added, key=lambda c: (c.ref.step, c.ref.created)))
    return at.update(
        *events, progress=progress, checkpoints=checkpoints, lost_steps=at.status.lost_steps + _lost(before, progress)
    )


def _lost(before: Progress | None, now: Progress) -> int:
    """Steps that a new process group has to do again."""
    if before is None or before.attempt == now.attempt:
        return 0
    return max(0, before.step - (now.restored_step or 0)) if now.restored_step is not None or before.step else 0


def _count_coordinator(at: _Pass) -> _Pass:
    fact = at.observed.children.get(_coordinator_name(at.status))
    if fact is None or fact.running:
        return at
    return at.update(
        Event("CoordinatorReplaced", "the coordinator ended; training goes on", warning=True),
        coordinator_deaths=at.status.coordinator_deaths + 1,
        restarts=_raised(at.status, "coordinator"),
    )


def _count_workers(at: _Pass) -> _Pass:
    """Replace lost nodes one by one; start a new attempt, or give up, for anything else."""
    if not _training_wanted(at):
        return at
    ended = [(i, f) for i, f in _worker_facts(at) if not f.running]
    failures = [(i, f, rules.classify(f)) for i, f in ended]
    real = [f for _, _, f in failures if f.cause not in ("finished", "infrastructure")]
    if real:
        # Where one node fails, the others end because of it: theirs is never the cause while another is known.
        return _restart(at, min(real, key=lambda f: f.cause == "collective"))
    lost = [(i, f) for i, f, failure in failures if failure.cause == "infrastructure"]
    if lost:
        at = _replace(at, lost)
    finished = [f for _, f, failure in failures if failure.cause == "finished"]
    if finished and len(finished) == len(_worker_facts(at)) and not _last_checkpoint_is_known(at):
        # They ended well, but nobody saw the last report: a fresh group reads it back from storage and reports again.
        return _next_attempt(at)
    return at


def _replace(at: _Pass, lost: list[tuple[int, ChildFact]]) -> _Pass:
    deaths = list(_deaths(at.status, at.job))
    restarts = dict(at.status.restarts)
    events = []
    for index, _ in lost:
        deaths[index] += 1
        restarts["infrastructure"] = restarts.get("infrastructure", 0) + 1
        events.append(Event("WorkerReplaced", f"node {index} was lost; a new one is started", warning=True))
    current = at.update(*events, worker_deaths=tuple(deaths), restarts=restarts, replaced=at.now)
    requests = tuple(Request(kind="lost", node=str(index), id=fact.name) for index, fact in lost)
    return _Pass(at.job, at.observed, at.now, current.status, current.events, at.requests + requests, at.stall)


def _restart(at: _Pass, failure: rules.Failure) -> _Pass:
    """Count a failure of the whole group, then start a new attempt or give up."""
    policy = at.job.job.spec.restart_policy
    durable = at.status.durable_step
    moved = durable > at.status.durable_step_at_restart
    window = at.now - seconds(policy.application.window)
    applications = [t for t in at.status.application_failures if t > window]
    if failure.cause == "application":
        applications.append(at.now)
    # A group that lost its nodes did nothing wrong; every other restart has to bring the run forward.
    stuck = 1 if moved else at.status.restarts_without_progress + (failure.cause != "collective")
    counted = at.update(
        restarts=_raised(at.status, failure.cause),
        application_failures=tuple(applications),
        restarts_without_progress=stuck,
        durable_step_at_restart=durable,
    )
    outcome = rules.give_up(rules.GiveUpFacts(failure, counted.status, policy))
    if outcome:
        return counted.update(Event(outcome.reason, outcome.message, warning=True), outcome=outcome)
    event = Event(
        "Restarted", f"attempt {at.status.attempt + 1} after {failure.cause}: {failure.message}", warning=True
    )
    return _next_attempt(counted.update(event, failed_attempt=at.status.attempt))


def _watch_for_stalls(at: _Pass) -> _Pass:
    if not _training_wanted(at):
        return at
    facts = rules.StallFacts(
        progress=at.observed.progress,
        running=sum(f.running for _, f in _worker_facts(at)),
        min_nodes=at.job.job.spec.workers.min_nodes,
        policy=at.job.job.spec.restart_policy,
        since=max(at.status.attempt_started, at.status.replaced),
        now=at.now,
    )
    found = rules.stalled(facts)
    if found is None:
        return at
    if found.restart:
        at = _restart(at, rules.Failure("stall", f"{found.reason}: {found.message}"))
    return _Pass(at.job, at.observed, at.now, at.status, at.events, at.requests, found)


def _score_checkpoints(at: _Pass) -> _Pass:
    """Take over ended evaluations and start waiting ones, oldest checkpoint first."""
    policy = at.job.job.spec.evaluation
    events: list[Event] = []
    checkpoints: list[CheckpointStatus] = []
    for checkpoint in at.status.checkpoints:
        evaluations = []
        for evaluation in checkpoint.evaluations:
            after, event = _advance(evaluation, at.observed.children.get(_evaluation_name(evaluation)), policy.retries)
            evaluations.append(after)
            if event:
                events.append(
                    Event(event[0], f"{checkpoint.ref.id}, {after.name}: {event[1]}", event[0].endswith("Failed"))
                )
        checkpoints.append(checkpoint.model_copy(update={"evaluations": tuple(evaluations)}))
    running = sum(e.phase == "Running" for c in checkpoints for e in c.evaluations)
    for number, checkpoint in enumerate(checkpoints):
        started = []
        for evaluation in checkpoint.evaluations:
            if evaluation.phase == "Pending" and running < policy.parallel:
                evaluation = evaluation.model_copy(update={"phase": "Running"})
                running += 1
            started.append(evaluation)
        checkpoints[number] = checkpoint.model_copy(update={"evaluations": tuple(started)})
    return at.update(*events, checkpoints=tuple(checkpoints))


def _advance(
    evaluation: EvaluationStatus, fact: ChildFact | None, retries: int
) -> tuple[EvaluationStatus, tuple[str, str] | None]:
    """An evaluation after what its process did. A process that was killed does not count against the retries."""
    if evaluation.phase != "Running" or fact is None or fact.running:
        return evaluation, None
    said = fact.termination
    if fact.exit_code in (0, None) and said and said.result is not None:
        scores = {f"{evaluation.name}-{name}": Score.parse(value) for name, value in said.result.items()}
        return evaluation.model_copy(update={"phase": "Succeeded", "scores": scores}), ("Evaluated", _summary(scores))
    failure = rules.classify(fact)
    failures = evaluation.failures + 1
    killed = failure.cause in ("infrastructure", "finished")
    if killed or (failures <= retries and failure.cause != "config"):
        return evaluation.model_copy(update={"phase": "Pending", "failures": failures}), None
    reason = failure.message or failure.cause
    return (
        evaluation.model_copy(update={"phase": "Failed", "failures": failures, "reason": reason}),
        ("EvaluationFailed", reason),
    )


def _choose_best(at: _Pass) -> _Pass:
    policy = at.job.job.spec.evaluation
    if policy.best_by is None:
        return at
    scored = [(s, c.ref.id) for c in at.status.checkpoints if (s := c.score(policy.best_by)) is not None]
    if not scored:
        return at
    sign = 1 if policy.best_is == "highest" else -1
    score, best = max(scored, key=lambda pair: sign * pair[0])
    if best == at.status.best:
        return at
    checkpoints = tuple(c.model_copy(update={"best": c.ref.id == best}) for c in at.status.checkpoints)
    event = Event("NewBest", f"{best}: {policy.best_by} {score:.4f}")
    return at.update(event, checkpoints=checkpoints, best=best, best_score=score)


def _decide_outcome(at: _Pass) -> _Pass:
    """Training is over when the last checkpoint is there and its group has left, or when scores stop rising."""
    if at.status.outcome:
        return at
    policy = at.job.job.spec.evaluation
    steps = at.job.job.spec.training.recipe.steps
    facts = [f for _, f in _worker_facts(at)]
    if _last_checkpoint_is_known(at) and not any(f.running for f in facts):
        return at.update(
            Event("Trained", f"{steps} steps done"),
            outcome=Outcome(result="Succeeded", reason="BudgetSpent", message=f"{steps} steps done"),
        )
    scores = [c.score(policy.best_by) for c in at.status.checkpoints] if policy.best_by else []
    if rules.no_gain(scores, policy.stop_after_no_gain, highest=policy.best_is == "highest"):
        message = f"{policy.stop_after_no_gain} checkpoints in a row without a better {policy.best_by}"
        outcome = Outcome(result="Succeeded", reason="NoGain", message=message)
        return at.update(Event("StoppedEarly", message), outcome=outcome)
    return at


def _retire_checkpoints(at: _Pass) -> _Pass:
    """Mark what a finished retention process deleted."""
    prune = _prunable(at.job, at.status)
    fact = at.observed.children.get(_retention_name(prune)) if prune else None
    if fact is None or fact.running or fact.exit_code != 0:
        return at
    checkpoints = tuple(
        c.model_copy(update={"pruned": True}) if c.ref.id in prune else c for c in at.status.checkpoints
    )
    return at.update(Event("CheckpointsDeleted", ", ".join(prune)), checkpoints=checkpoints)


def _finish(at: _Pass) -> _Pass:
    """A job ends when training is over, its processes are gone and every checkpoint has its scores."""
    outcome = at.status.outcome
    if outcome is None or _any_worker_runs(at.observed) or at.observed.progress is None:
        # Facts about children are older than the progress beside them: a progress seen with no worker running is
        # their last word, and holds the checkpoint they made on leaving.
        return at
    if not all(c.evaluated for c in at.status.checkpoints) or _prunable(at.job, at.status):
        return at
    return at.update(Event(outcome.result, outcome.message, outcome.result == "Failed"), finished=at.now)


def _with_conditions(at: _Pass) -> JobStatus:
    found = conditions(at.job, at.status, at.observed, at.stall, at.now)
    return at.status.model_copy(update={"conditions": found, "phase": phase(found)})


# --- children: every name follows from the status ---------------------------------------------------------------------


def _children(job: JobFile, status: JobStatus, observed: Observed) -> Iterable[Child]:
    training = status.outcome is None and not job.job.spec.suspend
    if _any_worker_runs(observed) or not job.job.spec.suspend:
        # It outlives the workers, so that their last report, with the last checkpoint, is still read.
        yield Child(_coordinator_name(status), "coordinator")
    older = any(f.running and 0 < _attempt_of(name) < status.attempt for name, f in observed.children.items())
    if training and not older:  # the older group may still be saving the checkpoint to start from
        for index, deaths in enumerate(_deaths(status, job)):
            yield Child(_worker_name(status.attempt, index, deaths), "worker", attempt=status.attempt, index=index)
    for checkpoint in status.checkpoints:
        requests = {r.id: r for _, r in requests_of(checkpoint.ref, job.evaluations)}
        for evaluation in checkpoint.evaluations:
            if evaluation.phase == "Running":
                yield Child(_evaluation_name(evaluation), "evaluation", request=requests[evaluation.id])
    prune = _prunable(job, status)
    if prune:
        yield Child(_retention_name(prune), "retention", prune=prune)


def _coordinator_name(status: JobStatus) -> str:
    return f"coordinator-{status.coordinator_deaths:03d}"


def _worker_name(attempt: int, index: int, deaths: int) -> str:
    return f"worker-{attempt:03d}-{index:04d}-{deaths:03d}"


def _attempt_of(name: str) -> int:
    """Attempt of a worker by its name; 0 for other children."""
    return int(name.split("-")[1]) if name.startswith("worker-") else 0


def _evaluation_name(evaluation: EvaluationStatus) -> str:
    return f"eval-{evaluation.id}-{evaluation.failures:03d}"


def _retention_name(prune: tuple[str, ...]) -> str:
    return f"retention-{prune[-1]}-{len(prune)}"


def _deaths(status: JobStatus, job: JobFile) -> tuple[int, ...]:
    wanted = job.job.spec.workers.max_nodes
    return (status.worker_deaths + (0,) * wanted)[:wanted]


def _worker_facts(at: _Pass) -> list[tuple[int, ChildFact]]:
    """The current process of each node, where it was started."""
    names = [(i, _worker_name(at.status.attempt, i, d)) for i, d in enumerate(_deaths(at.status, at.job))]
    return [(i, at.observed.children[name]) for i, name in names if name in at.observed.children]


def _prunable(job: JobFile, status: JobStatus) -> tuple[str, ...]:
    spec = job.job.spec
    return prunable(
        status.checkpoints,
        spec.checkpoints,
        spec.evaluation.best_by,
        highest=spec.evaluation.best_is == "highest",
    )


def _any_worker_runs(observed: Observed) -> bool:
    return any(f.running for name, f in observed.children.items() if name.startswith("worker-"))


def _training_wanted(at: _Pass) -> bool:
    return at.status.outcome is None and not at.job.job.spec.suspend


def _last_checkpoint_is_known(at: _Pass) -> bool:
    return at.status.durable_step >= at.job.job.spec.training.recipe.steps


def _raised(status: JobStatus, cause: str) -> dict[str, int]:
    return {**status.restarts, cause: status.restarts.get(cause, 0) + 1}


def _summary(scores: dict[str, Score]) -> str:
    return ", ".join(f"{name} {score.value:.4f}" for name, score in sorted(scores.items())[:4])
