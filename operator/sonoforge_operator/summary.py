"""From a status to the summary that the report page is made from."""

from __future__ import annotations

from sonoforge_operator.api import JobFile
from sonoforge_operator.status import JobStatus, requests_of
from sonoforge_trainer.contract import CheckpointSummary, RunEvent, RunSummary, Score


def summarise(file: JobFile, status: JobStatus, events: tuple[RunEvent, ...]) -> RunSummary:
    """What a run came to."""
    spec = file.job.spec
    checkpoints = []
    for checkpoint in status.checkpoints:
        uris = {r.id: r.result_uri for _, r in requests_of(checkpoint.ref, file.evaluations)}
        scores: dict[str, Score] = {}
        for evaluation in checkpoint.evaluations:
            scores |= evaluation.scores
        checkpoints.append(
            CheckpointSummary(
                ref=checkpoint.ref,
                scores=scores,
                results=tuple(uris[e.id] for e in checkpoint.evaluations if e.phase == "Succeeded" and e.id in uris),
                failed=tuple(f"{e.name}: {e.reason}" for e in checkpoint.evaluations if e.phase == "Failed"),
                best=checkpoint.best,
            )
        )
    return RunSummary(
        job=file.job.metadata.name,
        uid=status.uid,
        phase=status.phase,
        message=status.outcome.message if status.outcome else "",
        training=spec.training,
        checkpoints_uri=spec.checkpoints.uri,
        best_by=spec.evaluation.best_by,
        checkpoints=tuple(checkpoints),
        floors={name: score for floor in status.floors for name, score in floor.scores.items()},
        events=events,
        restarts=status.restarts,
        lost_steps=status.lost_steps,
        started=status.started,
        finished=status.finished,
    )
