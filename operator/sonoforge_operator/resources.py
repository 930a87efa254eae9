"""What the operator writes into a cluster: the status of a PretrainJob, and Checkpoint objects. The CRDs show it.

Every field is optional, and texts ending in Text are made for `kubectl get`. Times are RFC 3339 in UTC.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field

from sonoforge_operator.status import EvaluationStatus, Phase
from sonoforge_trainer.contract import TEACHER, CheckpointRef, Part

Time = Annotated[str, Field(pattern=r"^([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?Z)?$")]
CheckpointPhase = Literal["Pending", "Evaluating", "Evaluated", "Failed"]


class KubeCondition(Part):
    """One fact about an object, as Kubernetes writes conditions."""

    type: str
    """What it is about."""
    status: Literal["True", "False", "Unknown"] = "Unknown"
    """Whether it holds."""
    reason: str = ""
    """Why, in one word."""
    message: str = ""
    """Why, in a sentence, with what to do next."""
    last_transition_time: Time = ""
    """When `status` last changed."""
    observed_generation: int = 0
    """Version of the spec that this was derived from."""


class NodeCounts(Part):
    """Nodes of a job."""

    ready: int = 0
    """Nodes whose worker runs."""
    max: int = 0
    """Nodes that are wanted."""


class LastCheckpoint(Part):
    """The newest durable checkpoint of a job."""

    name: str
    """Name of the Checkpoint object."""
    step: int
    """Optimiser steps done."""
    samples: int
    """Images seen."""
    time: Time
    """When it was made."""


class BestCheckpoint(Part):
    """The checkpoint with the best score of a job."""

    name: str
    """Name of the Checkpoint object."""
    score: float
    """The score that `evaluation.bestBy` names."""


class Goodput(Part):
    """Where the time of a job went."""

    productive_seconds: float = 0.0
    """Time in steps that were kept."""
    lost_seconds: dict[str, float] = {}
    """Other time by cause, for example queue, start, rendezvous, restore, checkpoint, lostWork, hang."""


class DatasetStatus(Part):
    """The data set of a job."""

    manifest_digest: str = ""
    """Digest of the shard manifest in use."""
    epoch: float = 0.0
    """How often every image was seen, on average."""


class Health(Part):
    """Signs of a run that learns nothing."""

    loss_finite: bool = True
    """False where the newest recorded loss is not finite."""
    teacher_entropy: float | None = None
    """Entropy of the teacher's targets in nats; near 0 or near log(prototypes) is collapse."""
    rank_me: float | None = None
    """Effective rank of the features (RankMe) of the newest checkpoint that a health protocol looked at."""
    corrupt_samples: int = 0
    """Samples that could not be decoded and were replaced."""


class CheckpointCounts(Part):
    """Checkpoints of a job."""

    total: int = 0
    """Durable checkpoints made, also those whose state was deleted by retention."""
    evaluated: int = 0
    """Those whose evaluations all succeeded."""
    failed: int = 0
    """Those with an evaluation that was given up."""


class PretrainJobStatus(Part):
    """What is known of a job. It is derived from facts and written by the operator only."""

    observed_generation: int = 0
    """Version of the spec that this status was derived from."""
    phase: Phase = "Pending"
    """One word for printing, derived from the conditions."""
    reason: str = ""
    """Why it is in this phase, in one word."""
    message: str = ""
    """Why it is in this phase, in a sentence, with what to do next."""
    conditions: tuple[KubeCondition, ...] = ()
    """All conditions; each is always present."""
    nodes: NodeCounts = NodeCounts()
    """Nodes."""
    nodes_text: str = ""
    """Nodes as READY/MAX."""
    queue: str = ""
    """Queue that its pods go through: its own, or else its runtime's."""
    selector: str = ""
    """Label selector of the worker pods, for the scale subresource."""
    step: int = 0
    """Optimiser steps done."""
    steps: int = 0
    """Optimiser steps of the whole run."""
    samples: int = 0
    """Images seen."""
    percent: float = 0.0
    """Part of the budget that is spent, 0..100."""
    progress_text: str = ""
    """`percent` for printing."""
    eta: str = ""
    """Time to the end at the present throughput, for example 3h20m."""
    throughput: float = 0.0
    """Images a second."""
    throughput_text: str = ""
    """`throughput` for printing."""
    loss: float | None = None
    """Total loss, averaged over the last record interval."""
    loss_text: str = ""
    """`loss` for printing."""
    data_wait: float = 0.0
    """Part of the step time spent waiting for data, 0..1."""
    world_size: int = 0
    """Processes that train together."""
    last_checkpoint: LastCheckpoint | None = None
    """The newest durable checkpoint."""
    best: BestCheckpoint | None = None
    """The checkpoint with the best score."""
    best_text: str = ""
    """`best` for printing."""
    attempt: int = 1
    """Number of the process group; it is in labels, logs and checkpoints. A full restart and a resize raise it."""
    restarts: dict[str, int] = {}
    """Restarts by cause, over the life of the job."""
    restarts_total: int = 0
    """Restarts of every cause."""
    lost_steps: int = 0
    """Steps that had to be done again."""
    goodput: Goodput = Goodput()
    """Where the time of a job went."""
    dataset: DatasetStatus = DatasetStatus()
    """The data set."""
    health: Health = Health()
    """Signs of a run that learns nothing."""
    start_time: Time = ""
    """When the job was accepted."""
    completion_time: Time = ""
    """When the job ended."""
    checkpoints: CheckpointCounts = CheckpointCounts()
    """Checkpoints made and evaluated."""
    record: dict[str, Any] = {}
    """The operator's own memory: budgets, attempts and names that survive its restart. Do not edit or rely on it."""


class CheckpointSpec(Part):
    """One durable checkpoint. The operator makes these objects; nobody edits them."""

    job: str
    """Name of the PretrainJob."""
    job_uid: str
    """Identity of the PretrainJob."""
    id: str
    """Short name of the checkpoint: its step and the start of its digest."""
    step: Annotated[int, Field(ge=0)]
    """Optimiser steps done."""
    samples: Annotated[int, Field(ge=0)]
    """Images seen."""
    uri: str
    """Prefix of its objects in storage."""
    manifest_digest: str
    """Digest of its manifest: its identity."""
    teacher_uri: str
    """The backbone to use: safetensors, beside a model card."""
    created: str
    """UTC time at which it was made, ISO 8601."""

    @classmethod
    def of(cls, ref: CheckpointRef, *, job: str, job_uid: str) -> Self:
        """The object of a checkpoint that a run reported."""
        return cls(
            job=job, job_uid=job_uid, id=ref.id, teacher_uri=f"{ref.uri.rstrip('/')}/{TEACHER}", **ref.model_dump()
        )

    @property
    def ref(self) -> CheckpointRef:
        """The checkpoint as a run reports it. Raises pydantic's ValidationError where somebody edited the digest."""
        return CheckpointRef(**{name: getattr(self, name) for name in CheckpointRef.model_fields})


class CheckpointObjectStatus(Part):
    """Scores of a checkpoint and what became of it."""

    phase: CheckpointPhase = "Pending"
    """Where its evaluations stand. Failed: one of them was given up; the others have their scores."""
    evaluations: tuple[EvaluationStatus, ...] = ()
    """Every evaluation of the suite."""
    scores_text: str = ""
    """Scores for printing."""
    best: bool = False
    """Whether it has the best score of its job so far."""
    pruned: bool = False
    """Whether its training state was deleted by retention. Its scores stay."""
    quarantined: bool = False
    """Whether it was found damaged. It is not used again, and nothing of it is deleted."""
