"""The children of a job: every name follows from the status, so that one child is never wanted under two names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from sonoforge_operator.api import JobFile, Workers
from sonoforge_operator.observed import Child, ChildFact, Observed
from sonoforge_operator.status import EvaluationStatus, JobStatus, request_of
from sonoforge_trainer.contract import EvaluationRequest, baseline_evaluation


def wanted_children(job: JobFile, status: JobStatus, observed: Observed, now: float) -> Iterator[Child]:
    """Every child that should exist at Unix time `now`, for a job that has not ended."""
    if training_wanted(status) or any_worker_runs(observed):
        # It outlives the workers, so that their last report is still read.
        yield from _unless_held(
            Child(coordinator_name(status), "coordinator"), status.coordinator_backoff.until, now, observed
        )
    older = any(f.running and 0 < attempt_of(name) < status.attempt for name, f in observed.children.items())
    if training_wanted(status) and not older:  # the older group may still be saving the checkpoint to start from
        for index, deaths in enumerate(node_deaths(status, job)):
            name, size = worker_name(status.attempt, index, deaths), size_of(job, status)
            worker = Child(name, "worker", attempt=status.attempt, index=index, workers=size)
            yield from _unless_held(worker, status.node_backoff.until, now, observed)
    for checkpoint in status.checkpoints:
        for evaluation in checkpoint.evaluations:
            if evaluation.phase == "Running":
                request = request_of(checkpoint.ref, job.evaluations, evaluation.id)
                yield Child(evaluation_name(evaluation), "evaluation", request=request)
    for floor in status.floors:
        if floor.phase == "Running":  # then there is a checkpoint; which one makes no difference
            yield Child(floor_name(floor), "floor", request=_floor_request(job, status, floor))
    if status.pruning:
        yield Child(retention_name(status), "retention", prune=status.pruning)
    if inventory_wanted(status, observed):
        # What was pruned is not listed, so naming what is left says all that is known, however long the run was.
        known = tuple(c.ref.id for c in status.checkpoints if not c.pruned)
        yield Child(inventory_name(status), "inventory", known=known)


def _floor_request(job: JobFile, status: JobStatus, floor: EvaluationStatus) -> EvaluationRequest:
    """What a model that does not change is asked; it is kept beside the checkpoints, so it names one of them."""
    # Random weights take their architecture from it, so its teacher should not have been deleted.
    ref = next((c.ref for c in status.sound if not c.pruned), status.checkpoints[0].ref)
    evaluation = next(e for e in job.evaluations if e.name == floor.name)
    baseline = next((b for b in job.baselines if b.name == floor.baseline), None)
    asked = baseline_evaluation(baseline, evaluation) if baseline else evaluation
    assert asked is not None, "what a baseline cannot do is not planned"
    return EvaluationRequest(
        checkpoint_uri=ref.uri, checkpoint_digest=ref.manifest_digest, evaluation=asked, baseline=baseline
    )


def _unless_held(child: Child, until: float, now: float, observed: Observed) -> Iterable[Child]:
    """A child, unless it was never started and has to wait."""
    return [child] if child.name in observed.children or now >= until else []


# --- names ------------------------------------------------------------------------------------------------------------


def coordinator_name(status: JobStatus) -> str:
    """Name of the current coordinator."""
    return f"coordinator-{status.coordinator_deaths:03d}"


def worker_name(attempt: int, index: int, deaths: int) -> str:
    """Name of the process of a node."""
    return f"worker-{attempt:03d}-{index:04d}-{deaths:03d}"


def attempt_of(name: str) -> int:
    """Attempt of a worker by its name; 0 for other children."""
    return int(name.split("-")[1]) if name.startswith("worker-") else 0


def evaluation_name(evaluation: EvaluationStatus) -> str:
    """Name of the current try of an evaluation."""
    return f"eval-{evaluation.id}-{evaluation.failures + evaluation.lost:03d}"


def floor_name(floor: EvaluationStatus) -> str:
    """Name of the current try of an evaluation without learning."""
    return f"floor-{floor.id}-{floor.failures + floor.lost:03d}"


def retention_name(status: JobStatus) -> str:
    """Name of the current try to delete checkpoints."""
    return f"retention-{set_digest(status.pruning)}-{status.retention.number:03d}"


def inventory_name(status: JobStatus) -> str:
    """Name of the current listing."""
    return f"inventory-{status.inventories:03d}-{status.inventory.number:03d}"


def set_digest(ids: tuple[str, ...]) -> str:
    """A short name of a set of checkpoints."""
    return hashlib.sha256(" ".join(ids).encode()).hexdigest()[:12]


# --- what the status and the facts mean -------------------------------------------------------------------------------


def training_wanted(status: JobStatus) -> bool:
    """Whether the nodes should exist. A job that is to be suspended keeps them until they have saved."""
    return status.outcome is None and not status.suspended


def coordinator_wanted(status: JobStatus, observed: Observed) -> bool:
    """Whether somebody needs the coordinator. It outlives the workers, so that their last report is still read."""
    return training_wanted(status) or any_worker_runs(observed)


def last_checkpoint_is_known(job: JobFile, status: JobStatus) -> bool:
    """Whether nothing is left to train."""
    return status.durable_step >= job.job.spec.training.recipe.steps


def any_worker_runs(observed: Observed) -> bool:
    """Whether a process of any attempt still runs."""
    return any(f.running for name, f in observed.children.items() if name.startswith("worker-"))


def inventory_wanted(status: JobStatus, observed: Observed) -> bool:
    """Whether the training is over, everybody has left, and nobody looked yet what they left behind."""
    return status.outcome is not None and not status.listed and not any_worker_runs(observed)


def size_of(job: JobFile, status: JobStatus) -> Workers:
    """Size of the attempt. Another one that the job asks for comes with the next attempt."""
    return status.workers or job.job.spec.workers


def node_deaths(status: JobStatus, job: JobFile) -> tuple[int, ...]:
    """For each node of the attempt, how often its process was replaced."""
    wanted = size_of(job, status).max_nodes
    return (status.worker_deaths + (0,) * wanted)[:wanted]


def worker_facts(job: JobFile, status: JobStatus, observed: Observed) -> list[tuple[int, ChildFact]]:
    """The current process of each node, where it was started."""
    names = [(i, worker_name(status.attempt, i, d)) for i, d in enumerate(node_deaths(status, job))]
    return [(i, observed.children[name]) for i, name in names if name in observed.children]


def held_up(facts: Iterable[ChildFact]) -> ChildFact | None:
    """The first of these that waits: what may wait for ever is told before what only starts."""
    waiting = [fact for fact in facts if fact.waiting]
    return min(waiting, key=lambda fact: fact.waiting == "Starting", default=None)


def has_stepped(job: JobFile, status: JobStatus, observed: Observed) -> bool:
    """Whether a step ended since the newest process of the group started: before, it has nothing storage has not."""
    return status.progress is not None and status.progress.step_time > newest_start(job, status, observed)


def newest_start(job: JobFile, status: JobStatus, observed: Observed) -> float:
    """Unix time at which the newest running process of the group started or was wanted."""
    started = [f.started for _, f in worker_facts(job, status, observed) if f.works]
    return max(status.attempt_started, status.replaced, *started)
