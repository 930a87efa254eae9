"""From what the operator knows of a job to what a person sees of it: the status of a PretrainJob and a Checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from sonoforge_operator.api import JobFile
from sonoforge_operator.children import worker_facts
from sonoforge_operator.cluster.desired import ClusterJob
from sonoforge_operator.cluster.names import LABEL_PART, LABEL_UID
from sonoforge_operator.cluster.record import remember
from sonoforge_operator.limits import queue_of
from sonoforge_operator.observed import Observed
from sonoforge_operator.resources import (
    BestCheckpoint,
    CheckpointCounts,
    CheckpointObjectStatus,
    DatasetStatus,
    Goodput,
    Health,
    KubeCondition,
    LastCheckpoint,
    NodeCounts,
    PretrainJobStatus,
)
from sonoforge_operator.status import CheckpointStatus, Condition, ConditionType, JobStatus
from sonoforge_trainer.contract import Progress, split_score

Document = dict[str, Any]

_SHOWN_SCORES = 3
_LONGEST_ETA_SECONDS = 10 * 365 * 86400


def job_document(job: ClusterJob, status: JobStatus, observed: Observed) -> Document:
    """The status of a PretrainJob."""
    file, names = job.file, job.names
    spec, progress = file.job.spec, status.progress
    workers = worker_facts(file, status, observed)
    ready = sum(fact.works for _, fact in workers) if not status.terminal else 0
    wanted = spec.workers.max_nodes
    steps = spec.training.recipe.steps
    step = progress.step if progress else 0
    share = 100.0 * step / steps if steps else 0.0
    training = status.condition("Training")
    # What was last said of a run that stands still or is silent is no rate of the present.
    rate = progress.samples_per_second if progress and training and training.status == "True" else 0.0
    newest = max(status.sound, key=lambda c: c.ref.step, default=None)
    best = next((c for c in status.checkpoints if c.best), None)
    head = _headline(status)
    shown = PretrainJobStatus(
        observed_generation=job.generation,
        phase=status.phase,
        reason=head[0],
        message=head[1],
        conditions=tuple(_condition(c, job.generation) for c in status.conditions),
        nodes=NodeCounts(ready=ready, max=wanted),
        nodes_text=f"{ready}/{wanted}",
        queue=queue_of(file.job, job.runtime),
        selector=f"{LABEL_UID}={names.uid},{LABEL_PART}=worker",
        step=step,
        steps=steps,
        samples=progress.samples if progress else 0,
        percent=round(share, 1),
        progress_text=f"{share:.1f}%",
        eta=_eta(spec.training.recipe.budget_samples - (progress.samples if progress else 0), rate),
        throughput=round(rate, 1),
        throughput_text=f"{rate:.1f}/s" if rate else "",
        loss=progress.loss if progress else None,
        loss_text=f"{progress.loss:.4f}" if progress and progress.loss is not None else "",
        data_wait=round(progress.data_wait, 3) if progress else 0.0,
        world_size=progress.world_size if progress and ready else 0,
        last_checkpoint=LastCheckpoint(
            name=names.checkpoint(newest.ref.id),
            step=newest.ref.step,
            samples=newest.ref.samples,
            time=_as_rfc3339(newest.ref.created),
        )
        if newest
        else None,
        best=BestCheckpoint(name=names.checkpoint(best.ref.id), score=status.best_score or 0.0) if best else None,
        best_text=f"{status.best_score:.4f}@{best.ref.step}" if best and status.best_score is not None else "",
        attempt=status.attempt,
        restarts=dict(status.restarts),
        restarts_total=sum(status.restarts.values()),
        lost_steps=status.lost_steps,
        goodput=Goodput(
            productive_seconds=round(status.goodput.productive_seconds, 1),
            lost_seconds={cause: round(seconds, 1) for cause, seconds in status.goodput.lost_seconds.items()},
        ),
        dataset=_dataset(progress),
        health=Health(
            loss_finite=progress.loss_finite if progress else True,
            teacher_entropy=progress.teacher_entropy if progress else None,
            rank_me=_newest_score(status, "rankme"),
            corrupt_samples=progress.corrupt_samples if progress else 0,
        ),
        checkpoints=CheckpointCounts(
            total=len(status.checkpoints),
            evaluated=sum(all(e.phase == "Succeeded" for e in c.evaluations) for c in status.checkpoints),
            failed=sum(any(e.phase == "Failed" for e in c.evaluations) for c in status.checkpoints),
        ),
        start_time=rfc3339(status.started),
        completion_time=rfc3339(status.finished),
        record=remember(status),
    )
    return _without_nothing(shown.document())


def rejected_document(manifest: Mapping[str, Any], reason: str, message: str, now: float) -> Document:
    """The status of a PretrainJob that cannot run as it is: what was known, and why it goes no further.

    Nobody looks after it, so nothing but that is known of the present.
    """
    before = manifest.get("status")
    kept: Document = dict(before) if isinstance(before, Mapping) else {}
    generation = int(manifest["metadata"].get("generation") or 1)
    found = kept.get("conditions")
    known = {c.get("type"): c for c in found if isinstance(c, Mapping)} if isinstance(found, list) else {}

    def condition(kind: ConditionType) -> Document:
        value: Literal["False", "Unknown"] = "False" if kind == "Accepted" else "Unknown"
        earlier = known.get(kind, {})
        time = earlier.get("lastTransitionTime") if earlier.get("status") == value else None
        return KubeCondition(
            type=kind,
            status=value,
            reason=reason if kind == "Accepted" else "NotAccepted",
            message=message if kind == "Accepted" else "a job that is refused is not looked after",
            last_transition_time=time if isinstance(time, str) else rfc3339(now),
            observed_generation=generation,
        ).document()

    return _without_nothing(
        kept
        | {
            "observedGeneration": generation,
            "phase": "Invalid" if reason == "Invalid" else "Pending",
            "reason": reason,
            "message": message,
            "conditions": [condition(kind) for kind in get_args(ConditionType)],
            "eta": "",
            "throughput": 0.0,
            "throughputText": "",
        }
    )


def checkpoint_document(checkpoint: CheckpointStatus, status: JobStatus, file: JobFile) -> Document:
    """The status of a Checkpoint."""
    phases = {e.phase for e in checkpoint.evaluations}
    phase = (
        "Evaluated"
        if checkpoint.evaluated and "Failed" not in phases
        else "Failed"
        if checkpoint.evaluated
        else "Evaluating"
        if phases & {"Running", "Succeeded", "Failed"}
        else "Pending"
    )
    shown = CheckpointObjectStatus(
        phase=phase,
        evaluations=checkpoint.evaluations,
        scores_text=_scores(checkpoint, file.job.spec.evaluation.best_by),
        best=checkpoint.best,
        pruned=checkpoint.pruned,
        quarantined=checkpoint.ref.uri in status.quarantined,
    )
    return _without_nothing(shown.document())


def rfc3339(seconds: float) -> str:
    """Unix seconds as the API writes a time; empty for 0."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else ""


def _as_rfc3339(text: str) -> str:
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return ""


def _dataset(progress: Progress | None) -> DatasetStatus:
    if progress is None:
        return DatasetStatus()
    size = progress.dataset_samples
    return DatasetStatus(manifest_digest=progress.data_digest, epoch=round(progress.samples / size, 3) if size else 0.0)


def _headline(status: JobStatus) -> tuple[str, str]:
    """Reason and message of the condition that gives the phase."""
    of_phase = {"Running": "Training", "Pending": "Scheduled"}
    condition = status.condition(of_phase.get(status.phase, status.phase))
    return (condition.reason, condition.message) if condition else ("", "")


def _condition(condition: Condition, generation: int) -> KubeCondition:
    return KubeCondition(
        type=condition.type,
        status=condition.status,
        reason=condition.reason or "Unknown",
        message=condition.message,
        last_transition_time=rfc3339(condition.since),
        observed_generation=generation,
    )


def _eta(samples: int, rate: float) -> str:
    if rate <= 0 or samples / rate > _LONGEST_ETA_SECONDS:
        return ""
    left = int(samples / rate)
    days, hours, minutes = left // 86400, left // 3600 % 24, left // 60 % 60
    if days:
        return f"{days}d{hours}h"
    return f"{hours}h{minutes}m" if hours else f"{minutes}m{left % 60}s"


def _scores(checkpoint: CheckpointStatus, best_by: str | None) -> str:
    """The scores worth a column: the one that decides, then one of each evaluation."""
    values = {name: score.value for e in checkpoint.evaluations for name, score in e.scores.items()}
    names = [best_by] if best_by and best_by in values else []
    names += [n for n in sorted(values) if n not in names and split_score(n)[2] in ("f1_macro", "dice_foreground")]
    return ", ".join(f"{name}={values[name]:.4f}" for name in names[:_SHOWN_SCORES])


def _newest_score(status: JobStatus, metric: str) -> float | None:
    for checkpoint in reversed(status.checkpoints):
        for evaluation in checkpoint.evaluations:
            for name, score in evaluation.scores.items():
                if split_score(name)[2] == metric:
                    return score.value
    return None


def _without_nothing(document: Document) -> Document:
    """Without null fields, which the API server would drop."""
    return {
        name: _without_nothing(value)
        if isinstance(value, dict)
        else [_without_nothing(v) if isinstance(v, dict) else v for v in value]
        if isinstance(value, list)
        else value
        for name, value in document.items()
        if value is not None
    }
