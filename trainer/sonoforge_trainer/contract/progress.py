"""What a run says about itself: the coordinator serves `Progress` and accepts a `Request`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from sonoforge_trainer.contract.base import Part
from sonoforge_trainer.contract.checkpoint import CheckpointRef

UnixTime = Annotated[float, Field(ge=0, le=253402300799)]
"""Seconds since 1970, up to the year 9999, so that every one can be written as a date."""


class Activity(StrEnum):
    """What the workers are doing."""

    WAITING = "Waiting"
    """No process group yet."""
    STARTING = "Starting"
    """Processes run; model, data and checkpoint are being loaded."""
    TRAINING = "Training"
    """Stepping."""
    CHECKPOINTING = "Checkpointing"
    """The step is held up by a checkpoint."""
    STOPPED = "Stopped"
    """Saved and left, because it was asked to."""
    FINISHED = "Finished"
    """The budget is spent and the last checkpoint is committed."""


class Progress(Part):
    """The state of a run, written by rank 0 about once a second."""

    attempt: str = ""
    """Identity of the process group."""
    activity: Activity = Activity.WAITING
    """What the workers are doing."""
    updated: UnixTime = 0.0
    """Unix time of this record."""
    step: int = 0
    """Optimiser steps done."""
    steps: int = 0
    """Optimiser steps of the whole run."""
    step_time: UnixTime = 0.0
    """Unix time at which the newest step ended. A run whose step time does not move is stalled, whatever it says."""
    samples: int = 0
    """Images seen."""
    budget_samples: int = 0
    """Images to see."""
    world_size: int = 0
    """Processes."""
    nodes: int = 0
    """Nodes (agents)."""
    virtual_ranks: int = 0
    """Virtual ranks."""
    samples_per_second: float = 0.0
    """Throughput over the last records."""
    data_wait: float = 0.0
    """Part of the step time spent waiting for data, 0..1."""
    loss: float | None = None
    """Total loss, averaged over the last record interval; None before the first record."""
    losses: dict[str, float] = {}
    """Loss parts."""
    loss_finite: bool = True
    """False where the newest recorded loss is not finite."""
    skipped_steps: int = 0
    """Steps that changed nothing because a gradient was not finite."""
    teacher_entropy: float | None = None
    """Entropy of the teacher's targets in nats; near 0 or near log K is collapse."""
    corrupt_samples: int = 0
    """Samples that this process group could not decode and replaced. Records of the log add up to the run's,
    but for intervals that a restart cut off."""
    median_step_seconds: float = 0.0
    """Median step time."""
    restored_step: int | None = None
    """Step of the checkpoint that this attempt started from; None for a fresh start."""
    data_digest: str = ""
    """Data set in use."""
    dataset_samples: int = 0
    """Images of the data set."""
    config_digest: str = ""
    """TrainConfig in use."""
    checkpoints: tuple[CheckpointRef, ...] = ()
    """Every committed and valid checkpoint of the run, oldest first."""
    checkpoint_seconds: float = 0.0
    """Time from the beginning of the newest checkpoint to its commit."""
    checkpoint_stall_seconds: float = 0.0
    """Time the newest checkpoint held up training."""
    checkpoints_skipped: int = 0
    """Checkpoints left out because the one before was still uploading."""
    quarantined: tuple[str, ...] = ()
    """URIs of checkpoints found damaged."""


class Request(Part):
    """Something the operator asks of a run."""

    kind: Literal["checkpoint", "stop", "lost"]
    """`checkpoint`: save at the next agreed step. `stop`: save, then leave. `lost`: a node is gone; re-form now."""
    node: str = ""
    """For `lost`: the node's address as torchrun knows it (`--local-addr`)."""
    id: str = ""
    """Identity, so that a request sent twice counts once."""
    attempt: str = ""
    """Identity of the process group that is meant, as in Progress; another one ignores it. Empty: whichever trains."""
