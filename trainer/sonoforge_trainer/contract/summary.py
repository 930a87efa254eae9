"""What a run came to: the input of the report page."""

from __future__ import annotations

from sonoforge_trainer.contract.base import Part
from sonoforge_trainer.contract.checkpoint import CheckpointRef
from sonoforge_trainer.contract.config import TrainConfig
from sonoforge_trainer.contract.evaluation import Score


class CheckpointSummary(Part):
    """One checkpoint with what it scored."""

    ref: CheckpointRef
    """The checkpoint."""
    scores: dict[str, Score] = {}
    """NAME-PROTOCOL/METRIC to score."""
    results: tuple[str, ...] = ()
    """URIs of the complete results."""
    failed: tuple[str, ...] = ()
    """Evaluations that failed, with their reasons."""
    best: bool = False
    """Whether it is the best one, compared on validation."""


class RunEvent(Part):
    """Something that happened to the run."""

    time: float
    """Unix time."""
    reason: str
    """One word."""
    message: str
    """One sentence."""
    warning: bool = False
    """Whether something was wrong."""
    step: int = 0
    """Newest step known at that time."""
    world_size: int = 0
    """Processes at that time."""


class RunSummary(Part):
    """A run, its checkpoints and what happened to it."""

    job: str
    """Name of the job."""
    uid: str
    """Identity of the job."""
    phase: str
    """Where it stands."""
    message: str = ""
    """Why."""
    training: TrainConfig | None = None
    """What the result depends on; None where only the checkpoints are at hand, which hold its digest alone."""
    checkpoints_uri: str
    """Prefix of the run's checkpoints."""
    best_by: str | None = None
    """Score to be best by; checkpoints are compared by its validation counterpart."""
    checkpoints: tuple[CheckpointSummary, ...] = ()
    """Every checkpoint, oldest first."""
    floors: dict[str, Score] = {}
    """Scores without any learning, as FLOOR:NAME-PROTOCOL/METRIC, for example raw-pixels:planes-knn/f1_macro."""
    events: tuple[RunEvent, ...] = ()
    """What happened, oldest first."""
    restarts: dict[str, int] = {}
    """Restarts by cause."""
    lost_steps: int = 0
    """Steps that had to be done again."""
    started: float = 0.0
    """Unix time of the start."""
    finished: float = 0.0
    """Unix time of the end."""
