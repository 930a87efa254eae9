"""The process group of a job: its size, its losses, its failures, and whether it steps."""

from __future__ import annotations

from sonoforge_operator import rules
from sonoforge_operator.api import seconds
from sonoforge_operator.children import (
    coordinator_name,
    coordinator_wanted,
    held_up,
    last_checkpoint_is_known,
    newest_start,
    node_deaths,
    size_of,
    training_wanted,
    worker_facts,
)
from sonoforge_operator.observed import ChildFact, Event
from sonoforge_operator.status import Backoff, ExcludedNode, JobStatus, Saving
from sonoforge_operator.turn import Turn
from sonoforge_trainer.contract import Progress, Request

_USEFUL_SECONDS = 60.0
_EXCLUDED_SECONDS = 24 * 3600.0


def suspend(at: Turn) -> Turn:
    """Where the job asks for it, have the nodes save and leave, then release them; a new attempt begins on its return.

    Whoever was asked to leave leaves, though the wish may be taken back: the next attempt begins once they are gone.
    """
    saving = at.status.saving
    if at.status.outcome:
        return at.update(saving=None) if saving else at
    if at.status.suspended:
        if at.spec.suspend:
            return at
        event = Event("Resumed", "going on from the newest checkpoint")
        return _next_attempt(at.update(event, suspended=False, workers=at.spec.workers))
    if not at.spec.suspend and not (saving and saving.asked):
        return at.update(saving=None) if saving else at
    saving = saving or Saving(since=at.now)
    workers = [f for _, f in worker_facts(at.job, at.status, at.observed)]
    if any(map(_left, workers)):
        return _released(at, Event("Suspended", "the nodes saved a checkpoint and left"))
    answer, known = at.observed.progress, at.status.progress
    answered = answer is not None and answer.updated > 0
    if (
        not any(f.works for f in workers)
        or known is None
        or (answered and known.step_time <= at.status.attempt_started)
    ):
        return _released(at, Event("Suspended", "no node made a step that is not saved"))
    if answer is not None and answered and saving.group != answer.attempt:
        saving = Saving(since=saving.since, group=answer.attempt)
    request = Request(kind="stop", attempt=saving.group, id=f"suspend-{saving.since:.3f}-{saving.group}")
    if saving.group and not saving.asked and at.observed.heard == request.id:
        saving = saving.model_copy(update={"asked": at.now})
    limit = rules.leaving_after_seconds(known)
    if at.now - (saving.asked or saving.since) > limit:
        if not at.spec.suspend:
            return at.update(saving=None)  # nobody wants it any more, and they do not do it
        message = f"the nodes did not save and leave within {limit:.0f} s, and are taken away"
        return _released(at, Event("Suspended", message, warning=True))
    if saving != at.status.saving:
        told = () if at.status.saving else (Event("Suspending", "the nodes are asked to save and leave"),)
        at = at.update(*told, saving=saving)
    if answer is None or not saving.group:
        return at  # nobody would hear it
    # Asked at every pass, as a coordinator that is replaced knows nothing; by its id it is carried out once.
    return at.ask(request)


def resize(at: Turn) -> Turn:
    """Start a new attempt where the spec asks for another size. The old one saves a checkpoint on leaving."""
    wanted = at.spec.workers
    if at.status.workers == wanted or at.status.saving:
        return at  # who saves and leaves is not hurried; the next attempt has the new size
    if at.status.workers is None:
        return at.update(workers=wanted)
    if not training_wanted(at.status):
        return at
    if at.status.attempt != at.observed.status.attempt:
        return at.update(workers=wanted)  # one begins in this pass, and may have any size
    event = Event("Resized", f"{wanted.min_nodes} to {wanted.max_nodes} nodes of {wanted.gpus_per_node} processes")
    return _next_attempt(at.update(event, workers=wanted))


def count_coordinator(at: Turn) -> Turn:
    """Replace a coordinator that ended."""
    fact = at.observed.children.get(coordinator_name(at.status))
    if fact is None or fact.running or not coordinator_wanted(at.status, at.observed):
        return at
    # One that lived long was of use, and one that a step was told to: only what dies at its start is waited for.
    told = at.status.progress is not None and at.status.progress.step_time > fact.started
    useful = told or at.now - fact.started > _USEFUL_SECONDS
    return at.update(
        Event("CoordinatorReplaced", "the coordinator ended; training goes on", warning=True),
        coordinator_deaths=at.status.coordinator_deaths + 1,
        coordinator_backoff=rules.backoff(at.status.coordinator_backoff, at.now, useful=useful),
        restarts=_raised(at.status, "coordinator"),
    )


def count_workers(at: Turn) -> Turn:
    """Replace lost nodes one by one; start a new attempt, or give up, for anything else."""
    if not training_wanted(at.status) or last_checkpoint_is_known(at.job, at.status):
        return at  # what was committed decides, not how the processes end after it
    facts = worker_facts(at.job, at.status, at.observed)
    at = _count_unseen(at, facts)
    failures = [(i, f, rules.classify(f)) for i, f in facts if not f.running]
    at = _exclude(at, {f.node for _, f, failure in failures if failure.cause == "hardware" and f.node})
    left = [f for _, f, _ in failures if _left(f)]
    if left and not at.status.saving:
        event = Event("Restarted", "the nodes left, as an earlier request asked them to", warning=True)
        return _next_attempt(at.update(event), _node_backoff(at))
    # Where some left as they were asked, the others have saved too, however they end.
    passing = ("finished", "infrastructure", "collective") if left else ("finished", "infrastructure")
    real = [f for _, _, f in failures if f.cause not in passing]
    if real:
        # Where one node fails, the others end because of it: theirs is never the cause while another is known.
        return _restart(at, min(real, key=lambda f: f.cause == "collective"))
    lost = [(i, f) for i, f, failure in failures if failure.cause == "infrastructure"]
    if lost and not left:
        at = _replace(at, lost)
    finished = [f for _, f, failure in failures if failure.cause == "finished"]
    if finished and len(finished) == len(facts) and at.observed.progress is not None:
        # They ended well, but nobody saw the last report: a fresh group reads it back from storage and reports again.
        return _next_attempt(at)
    return at


def watch_for_stalls(at: Turn) -> Turn:
    """Start over a group that does not step."""
    if not training_wanted(at.status) or last_checkpoint_is_known(at.job, at.status):
        return at
    coordinator = at.observed.children.get(coordinator_name(at.status))
    workers = worker_facts(at.job, at.status, at.observed)
    waiting = held_up(f for _, f in workers)
    facts = rules.StallFacts(
        progress=at.status.progress or Progress(),
        answered=at.observed.progress is not None,
        running=sum(f.works for _, f in workers),
        min_nodes=size_of(at.job, at.status).min_nodes,
        policy=at.spec.restart_policy,
        since=newest_start(at.job, at.status, at.observed),
        coordinator_since=coordinator.started if coordinator else at.now,
        now=at.now,
        waiting=waiting.waiting if waiting else "",
        waiting_message=waiting.waiting_message if waiting else "",
        coordinator_waiting=coordinator.waiting if coordinator else "",
        coordinator_message=coordinator.waiting_message if coordinator else "",
    )
    found = rules.stalled(facts)
    if found is None:
        return at
    if found.restart:
        at = _restart(at, rules.Failure("stall", f"{found.reason}: {found.message}"))
    return at.stalled(found)


def _left(fact: ChildFact) -> bool:
    """Whether a process ended because its group was asked to save and leave."""
    return not fact.running and fact.termination is not None and fact.termination.final


def _released(at: Turn, event: Event) -> Turn:
    return at.update(event, suspended=True, saving=None)


def _next_attempt(at: Turn, backoff: Backoff | None = None) -> Turn:
    return at.update(
        attempt=at.status.attempt + 1,
        worker_deaths=(),
        worker_lost=(),
        worker_lost_created=(),
        worker_seen=(),
        attempt_started=at.now,
        replaced=at.now,
        node_backoff=backoff or Backoff(),
    )


def _count_unseen(at: Turn, facts: list[tuple[int, ChildFact]]) -> Turn:
    """Count nodes whose process was replaced by the platform before anybody saw its end: they were lost."""
    size = len(node_deaths(at.status, at.job))
    seen = list((at.status.worker_seen + ("",) * size)[:size])
    lost_before = at.status.worker_lost
    events = []
    for index, fact in facts:
        before, counted = seen[index], lost_before[index] if index < len(lost_before) else ""
        if fact.identity and before not in ("", counted, fact.identity):
            events.append(
                Event("WorkerReplaced", f"node {index} was lost; the cluster started a new one", warning=True)
            )
        seen[index] = fact.identity
    if tuple(seen) == at.status.worker_seen or not any(seen):
        return at
    restarts = dict(at.status.restarts)
    if events:
        restarts["infrastructure"] = restarts.get("infrastructure", 0) + len(events)
    return at.update(*events, worker_seen=tuple(seen), restarts=restarts)


def _replace(at: Turn, lost: list[tuple[int, ChildFact]]) -> Turn:
    deaths = list(node_deaths(at.status, at.job))
    identities = list((at.status.worker_lost + ("",) * len(deaths))[: len(deaths)])
    created = list((at.status.worker_lost_created + (0.0,) * len(deaths))[: len(deaths)])
    restarts = dict(at.status.restarts)
    events = []
    for index, fact in lost:
        deaths[index] += 1
        identities[index], created[index] = fact.identity, fact.created
        restarts["infrastructure"] = restarts.get("infrastructure", 0) + 1
        events.append(Event("WorkerReplaced", f"node {index} was lost; a new one is started", warning=True))
    requests = (Request(kind="lost", node=str(index), id=fact.name) for index, fact in lost)
    return at.update(
        *events,
        worker_deaths=tuple(deaths),
        worker_lost=tuple(identities),
        worker_lost_created=tuple(created),
        restarts=restarts,
        replaced=at.now,
        node_backoff=_node_backoff(at),
    ).ask(*requests)


def _restart(at: Turn, failure: rules.Failure) -> Turn:
    """Count a failure of the whole group, then start a new attempt or give up."""
    policy = at.spec.restart_policy
    durable = at.status.durable_step
    moved = durable > at.status.durable_step_at_restart
    window = at.now - seconds(policy.application.window)
    applications = [t for t in at.status.application_failures if t > window]
    if failure.cause == "application":
        applications.append(at.now)
    stuck = (0 if moved else at.status.restarts_without_progress) + (failure.cause not in rules.INNOCENT)
    counted = at.update(
        restarts=_raised(at.status, failure.cause),
        application_failures=tuple(applications),
        restarts_without_progress=stuck,
        durable_step_at_restart=durable,
    )
    outcome = rules.give_up(rules.GiveUpFacts(failure, counted.status, policy))
    if outcome:
        return counted.update(Event(outcome.reason, outcome.message, warning=True), outcome=outcome)
    message = f"attempt {at.status.attempt + 1} after {failure.cause}: {failure.message}".rstrip(": ")
    event = Event("Restarted", message, warning=True)
    return _next_attempt(counted.update(event, failed_attempt=at.status.attempt), _node_backoff(at))


def _exclude(at: Turn, nodes: set[str]) -> Turn:
    """Avoid machines whose hardware failed, for a day. The next attempt does."""
    known = tuple(e for e in at.status.excluded if e.until > at.now and e.name not in nodes)
    fresh = tuple(ExcludedNode(name=name, until=at.now + _EXCLUDED_SECONDS) for name in sorted(nodes))
    return at.update(excluded=known + fresh) if fresh else at


def _node_backoff(at: Turn) -> Backoff:
    """Nodes were of use where a step ended since they were last started."""
    started = max(at.status.attempt_started, at.status.replaced)
    useful = at.status.progress is not None and at.status.progress.step_time > started
    return rules.backoff(at.status.node_backoff, at.now, useful=useful)


def _raised(status: JobStatus, cause: str) -> dict[str, int]:
    return {**status.restarts, cause: status.restarts.get(cause, 0) + 1}
