"""What is there: the facts a plan is made from, and the children a plan asks for. Plain values, no clocks, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sonoforge_operator.api import Workers
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import EvaluationRequest, Progress, Request, Termination

ChildKind = Literal["coordinator", "worker", "evaluation", "floor", "retention", "inventory"]


@dataclass(frozen=True)
class Child:
    """A child that should exist. Equal names mean the same child: creating it twice does nothing."""

    name: str
    """Deterministic name."""
    kind: ChildKind
    """What it does."""
    attempt: int = 0
    """Attempt it belongs to, for a worker."""
    index: int = 0
    """Number of the node, for a worker."""
    workers: Workers = field(default_factory=Workers)
    """Size of its attempt, for a worker."""
    request: EvaluationRequest | None = None
    """What to evaluate, for an evaluation; for a floor, what to run without any learning or on a
    baseline."""
    prune: tuple[str, ...] = ()
    """Ids of the checkpoints to delete, for retention."""
    known: tuple[str, ...] = ()
    """Ids of the checkpoints that an inventory leaves out, because they are known."""


@dataclass(frozen=True)
class ChildFact:
    """A child that exists or existed."""

    name: str
    """Its name."""
    running: bool
    """Whether it still runs."""
    exit_code: int | None = None
    """Exit code; None while it runs and where nobody saw it end. A signal is its negative number."""
    termination: Termination | None = None
    """What it said at its end."""
    started: float = 0.0
    """Unix time of its start; of its creation, while it waits."""
    waiting: str = ""
    """Why it exists and does not run yet, in one word; empty for one that runs or ended."""
    waiting_message: str = ""
    """The same in a sentence."""
    disruption: str = ""
    """Why the platform took it away; empty where it did not."""
    reason: str = ""
    """What the platform says of its end, in one word."""
    node: str = ""
    """The machine it is or was on."""
    identity: str = ""
    """What tells it from another one of the same name, where names can be used again."""
    created: float = 0.0
    """Unix time of its creation, where it has an identity."""

    @property
    def works(self) -> bool:
        """Whether it runs, and waits for nothing to do so."""
        return self.running and not self.waiting


@dataclass(frozen=True)
class Observed:
    """Everything a plan may know."""

    status: JobStatus
    """The status as last written."""
    children: Mapping[str, ChildFact] = field(default_factory=dict)
    """Children by name."""
    progress: Progress | None = None
    """What the coordinator answered just now; None where it did not."""
    heard: str = ""
    """Id of the newest request that the coordinator took; empty where none is known."""
    refused: str = ""
    """Why the children that were asked for last could not be made; empty where they could."""


@dataclass(frozen=True)
class Event:
    """Something worth telling a person."""

    reason: str
    """One word."""
    message: str
    """One sentence."""
    warning: bool = False
    """Whether something is wrong."""


@dataclass(frozen=True)
class Plan:
    """What should be: the port makes it so. Children that exist and are not named here are stopped and removed."""

    children: tuple[Child, ...]
    """Every child that should exist."""
    status: JobStatus
    """The status to write, before any child is touched."""
    kill: frozenset[str] = frozenset()
    """Children that are stopped without time to save."""
    requests: tuple[Request, ...] = ()
    """What to ask the coordinator for."""
    events: tuple[Event, ...] = ()
    """What to tell."""
    wake_after: float = 1.0
    """Seconds until the next pass, if nothing happens before."""
