"""What the operator remembers of a job, in the objects of the cluster, and how it is read back.

The job's own memory is in the status of the PretrainJob, what belongs to a checkpoint in the status of its Checkpoint:
neither outgrows an object, and each is written in one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import structlog

from sonoforge_operator.api import JobFile
from sonoforge_operator.scoring import checkpoint_status
from sonoforge_operator.status import CheckpointStatus, EvaluationStatus, JobStatus
from sonoforge_trainer.contract import CheckpointRef, ContractError

Document = dict[str, Any]

log = structlog.get_logger(__name__)

_NOT_REMEMBERED = {"checkpoints"}
_PASSING = {"progress": None, "goodput": None, "reached_step": 0}
"""Fields whose newest value may be lost: the next answer of the coordinator has them again."""


def remember(status: JobStatus) -> Document:
    """The part of a status that the PretrainJob keeps."""
    slim = status.model_copy(
        update={"progress": status.progress.model_copy(update={"checkpoints": ()}) if status.progress else None}
    )
    document = slim.document()
    return {name: value for name, value in document.items() if name not in _NOT_REMEMBERED}


class UnreadableRecordError(Exception):
    """The memory of a job is not one that this version of the operator understands."""


def recall(manifest: Mapping[str, Any], checkpoints: Iterable[Mapping[str, Any]], file: JobFile) -> JobStatus:
    """The status of a job as it was last written.

    Raises UnreadableRecordError: to begin anew would be to count anew what was counted.
    """
    uid = str(manifest["metadata"].get("uid", ""))
    status = _job_status(manifest, uid)
    found = [known for c in checkpoints if (known := checkpoint_of(c, file)) is not None]
    found.sort(key=lambda c: (c.ref.step, c.ref.created))
    return status.model_copy(update={"uid": uid, "checkpoints": tuple(found)})


def checkpoint_of(manifest: Mapping[str, Any], file: JobFile) -> CheckpointStatus | None:
    """A Checkpoint object as it was last written; None where it is not one of ours."""
    spec, status = manifest.get("spec"), manifest.get("status")
    try:
        ref = CheckpointRef.parse(
            {name: spec.get(name) for name in _REF_FIELDS} if isinstance(spec, Mapping) else spec, where="Checkpoint"
        )
    except ContractError:
        log.warning("checkpoint-unreadable", name=str(manifest["metadata"].get("name")))
        return None
    fresh = checkpoint_status(ref, file)
    if not isinstance(status, Mapping):
        return fresh
    entries = status.get("evaluations")
    known: dict[str, EvaluationStatus] = {}
    for entry in entries if isinstance(entries, list) else ():
        try:
            evaluation = EvaluationStatus.parse(entry)
        except ContractError:
            continue  # it is done again, and finds its result beside the checkpoint
        known[evaluation.id] = evaluation
    evaluations = tuple(known.get(evaluation.id, evaluation) for evaluation in fresh.evaluations)
    return fresh.model_copy(
        update={
            "evaluations": evaluations,
            "best": status.get("best") is True,
            "pruned": status.get("pruned") is True,
        }
    )


def weighty(status: JobStatus) -> JobStatus:
    """A status without what passes: where two differ in it, the newer has to be written before anything is done."""
    conditions = tuple(c.model_copy(update={"message": ""}) for c in status.conditions)
    return status.model_copy(update={**_PASSING, "conditions": conditions, "checkpoints": ()})


_REF_FIELDS = ("step", "samples", "uri", "manifestDigest", "created")


def _job_status(manifest: Mapping[str, Any], uid: str) -> JobStatus:
    status = manifest.get("status")
    record = status.get("record") if isinstance(status, Mapping) else None
    if record is None:
        return JobStatus(uid=uid)
    try:
        return JobStatus.parse(record)
    except ContractError:
        raise UnreadableRecordError from None
