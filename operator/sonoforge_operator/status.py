"""What is known of a job: the `status` of a PretrainJob. It is derived, written once a pass, and never a guess."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator

from sonoforge_operator.api import Workers
from sonoforge_trainer.contract import (
    CheckpointRef,
    Evaluation,
    EvaluationRequest,
    Part,
    Progress,
    Score,
    UnixTime,
    selection_score,
    split_score,
)

Phase = Literal["Invalid", "Pending", "Queued", "Running", "Stalled", "Evaluating", "Suspended", "Succeeded", "Failed"]
EvaluationPhase = Literal["Invalid", "Pending", "Running", "Succeeded", "Failed"]
ConditionType = Literal[
    "Accepted",
    "Queued",
    "Scheduled",
    "Rendezvoused",
    "Training",
    "Stalled",
    "Evaluating",
    "Collapsed",
    "Suspended",
    "Succeeded",
    "Failed",
]
RestartCause = Literal[
    "infrastructure",
    "hardware",
    "application",
    "data",
    "storage",
    "memory",
    "not-finite",
    "collective",
    "stall",
    "coordinator",
]


class Condition(Part):
    """One fact about the job, always present."""

    type: ConditionType
    """What it is about."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str
    """Why, in one word."""
    message: str = ""
    """Why, in a sentence, with what to do next."""
    since: UnixTime = 0.0
    """Unix time of the last change of `status`."""


class Tries(Part):
    """How often a process was tried. Its next name has their number, so that no name is used twice."""

    failures: int = 0
    """Times it failed by itself."""
    lost: int = 0
    """Times it was killed from outside, which does not count as failing."""

    @property
    def number(self) -> int:
        """Number of the next try."""
        return self.failures + self.lost


class Backoff(Part):
    """Processes that end again and again without any use are started again later and later."""

    deaths: int = 0
    """Ends in a row without any use in between."""
    until: UnixTime = 0.0
    """Unix time of the next start."""


class Saving(Part):
    """How a job that is to be suspended leaves its nodes."""

    since: UnixTime
    """Unix time at which the wish was first seen."""
    asked: UnixTime = 0.0
    """Unix time at which the process group was known to have heard that it is to save and leave; 0 before."""
    group: str = ""
    """Identity of that process group. Another one has to be asked again."""


class ExcludedNode(Part):
    """A machine that the job avoids where it can."""

    name: str
    """Name of the machine."""
    until: UnixTime
    """Unix time after which it is used again."""


class Goodput(Part):
    """Where the time of a job went, from its acceptance to the end of its training."""

    productive_seconds: float = 0.0
    """Time in which steps were made that were not lost later."""
    lost_seconds: dict[str, float] = {}
    """Time without such steps, by cause."""
    until: UnixTime = 0.0
    """Unix time up to which this was counted."""

    @property
    def share(self) -> float | None:
        """Productive part of the time, 0..1; None before there is any."""
        total = self.productive_seconds + sum(self.lost_seconds.values())
        return self.productive_seconds / total if total else None


def named_scores(scores: dict[str, Score]) -> dict[str, Score]:
    """The scores. Raises ValueError for a name that is not NAME-PROTOCOL/METRIC: an image may know other protocols."""
    for name in scores:
        split_score(name)
    return scores


class EvaluationStatus(Part):
    """One evaluation of one checkpoint or baseline, or the floors of one evaluation."""

    name: str
    """Name of the evaluation in the suite."""
    id: str
    """Identity: the digest of model and evaluation."""
    baseline: str = ""
    """Name of the suite's baseline that is measured. Empty: a checkpoint, or the floors."""
    phase: EvaluationPhase = "Pending"
    """Where it stands."""
    failures: int = 0
    """Times it failed by itself."""
    lost: int = 0
    """Times it was killed from outside, which does not count as failing."""
    scores: Annotated[dict[str, Score], AfterValidator(named_scores)] = {}
    """NAME-PROTOCOL/METRIC to score, NAME-PROTOCOL/val_METRIC on validation; floors and baselines:
    MODEL:NAME-PROTOCOL/METRIC."""
    reason: str = ""
    """Why it failed."""

    @property
    def ended(self) -> bool:
        """Whether it is over, well or not."""
        return self.phase in ("Succeeded", "Failed")


class CheckpointStatus(Part):
    """One checkpoint with its scores."""

    ref: CheckpointRef
    """The checkpoint."""
    evaluations: tuple[EvaluationStatus, ...] = ()
    """Every evaluation of the suite."""
    best: bool = False
    """Whether it is the best so far, compared on validation."""
    pruned: bool = False
    """Whether its training state was deleted by retention. Its scores stay."""

    @property
    def evaluated(self) -> bool:
        """Whether every evaluation has ended, well or not."""
        return all(e.ended for e in self.evaluations)

    def score(self, name: str) -> float | None:
        """A score by its full name, where it is known."""
        for evaluation in self.evaluations:
            if name in evaluation.scores:
                return evaluation.scores[name].value
        return None

    def compared(self, best_by: str) -> float | None:
        """What decides between checkpoints where `best_by` is to be best: its counterpart on validation, where known.

        Every choice reads this and never `score`, or it would be made on test data.
        """
        return self.score(selection_score(best_by))


class Outcome(Part):
    """The decision that training is over. The job ends once every checkpoint has its scores."""

    result: Literal["Succeeded", "Failed"]
    """How."""
    reason: str
    """Why, in one word."""
    message: str
    """Why, in a sentence."""


class JobStatus(Part):
    """The status of a PretrainJob."""

    uid: str = ""
    """Identity of the job."""
    phase: Phase = "Pending"
    """One word for printing, derived from the conditions."""
    conditions: tuple[Condition, ...] = ()
    """All conditions."""
    attempt: int = 1
    """Number of the process group; a full restart raises it. It is in child names, logs and checkpoints."""
    workers: Workers | None = None
    """Size of the attempt; where the spec asks for another, a new attempt starts from a checkpoint made on leaving."""
    failed_attempt: int = 0
    """Newest attempt that was given up after a failure; what is left of it is killed and not asked to save."""
    worker_deaths: tuple[int, ...] = ()
    """For each node, how often its process ended and was replaced in this attempt."""
    worker_lost: tuple[str, ...] = ()
    """For each node, the identity of its process that ended last and was counted."""
    worker_lost_created: tuple[UnixTime, ...] = ()
    """For each node, the Unix time of that one's creation: what is older was counted before it."""
    worker_seen: tuple[str, ...] = ()
    """For each node, the identity of its process that was seen last."""
    excluded: tuple[ExcludedNode, ...] = ()
    """Machines whose hardware failed under this job."""
    suspended: bool = False
    """Whether the nodes were released because the job asks for it; a new attempt follows."""
    saving: Saving | None = None
    """Set while nodes that are to be released are asked to save and leave."""
    coordinator_deaths: int = 0
    """How often the coordinator ended and was replaced."""
    restarts: dict[str, int] = {}
    """Restarts by cause, over the life of the job."""
    application_failures: tuple[UnixTime, ...] = ()
    """Unix times of application errors inside the budget's window."""
    restarts_without_progress: int = 0
    """Restarts in a row in which the durable step did not rise."""
    durable_step_at_restart: int = -1
    """Durable step at the last restart."""
    attempt_started: UnixTime = 0.0
    """Unix time at which the attempt's first process was wanted."""
    replaced: UnixTime = 0.0
    """Unix time at which a process was last replaced; it then has the startup deadline for its first step."""
    node_backoff: Backoff = Backoff()
    """When nodes that end without a step are started again."""
    coordinator_backoff: Backoff = Backoff()
    """When a coordinator that ends soon after its start is started again."""
    progress: Progress | None = None
    """The newest progress seen."""
    reached_step: int = 0
    """Newest step seen of the process group that trains."""
    reached_by: str = ""
    """Identity of that process group."""
    lost_steps: int = 0
    """Steps that had to be done again."""
    goodput: Goodput = Goodput()
    """Where the time went."""
    checkpoints: tuple[CheckpointStatus, ...] = ()
    """Every committed checkpoint, oldest first."""
    quarantined: tuple[str, ...] = ()
    """URIs of checkpoints found damaged."""
    suite: str = ""
    """Digest of the evaluations that the checkpoints have; where the job asks for others, they follow."""
    floors: tuple[EvaluationStatus, ...] = ()
    """For each evaluation, the same protocols without any learning, and on each baseline of the suite."""
    pruning: tuple[str, ...] = ()
    """Ids of the checkpoints whose training state is being deleted."""
    retention: Tries = Tries()
    """Tries to delete them."""
    retention_left: tuple[str, ...] = ()
    """The newest set that could not be deleted; it is left alone until there is more to delete."""
    inventory: Tries = Tries()
    """Tries of the listing at the end."""
    inventories: int = 0
    """Listings that found checkpoints nobody had reported."""
    listed: bool = False
    """Whether storage was asked, after the last process left, for checkpoints that nobody reported."""
    best: str = ""
    """Id of the best checkpoint."""
    best_score: float | None = None
    """Its score, on the test split. It did not decide."""
    best_compared: float | None = None
    """What decided: the same on the validation split, or the score itself where it needs no labels."""
    outcome: Outcome | None = None
    """Set once training is over."""
    started: UnixTime = 0.0
    """Unix time of acceptance."""
    finished: UnixTime = 0.0
    """Unix time of the end."""

    @property
    def terminal(self) -> bool:
        """Whether nothing will change any more."""
        return self.finished > 0

    @property
    def durable_step(self) -> int:
        """Step of the newest sound checkpoint, -1 before the first."""
        return max((c.ref.step for c in self.sound), default=-1)

    @property
    def sound(self) -> tuple[CheckpointStatus, ...]:
        """The checkpoints that were not found damaged."""
        return tuple(c for c in self.checkpoints if c.ref.uri not in self.quarantined)

    def condition(self, kind: str) -> Condition | None:
        """A condition by type."""
        return next((c for c in self.conditions if c.type == kind), None)


def requests_of(
    checkpoint: CheckpointRef, evaluations: tuple[Evaluation, ...]
) -> Iterator[tuple[Evaluation, EvaluationRequest]]:
    """The evaluation requests of a checkpoint, in the order of the suite."""
    for evaluation in evaluations:
        yield (
            evaluation,
            EvaluationRequest(
                checkpoint_uri=checkpoint.uri, checkpoint_digest=checkpoint.manifest_digest, evaluation=evaluation
            ),
        )


def request_of(checkpoint: CheckpointRef, evaluations: tuple[Evaluation, ...], id_: str) -> EvaluationRequest:
    """The request with an id, which the suite must hold."""
    return next(request for _, request in requests_of(checkpoint, evaluations) if request.id == id_)
