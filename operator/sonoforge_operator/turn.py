"""One pass over one job: the facts, and the status as it stands after the parts of the pass that ran."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sonoforge_operator.api import JobFile, PretrainJobSpec, seconds
from sonoforge_operator.observed import Event, Observed
from sonoforge_operator.rules import Stall
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import Request


@dataclass(frozen=True)
class Turn:
    """What the parts of a pass hand on to one another."""

    job: JobFile
    """What is wanted."""
    observed: Observed
    """What is there."""
    now: float
    """Unix time of the pass."""
    status: JobStatus
    """The status so far."""
    events: tuple[Event, ...] = ()
    """What to tell so far."""
    requests: tuple[Request, ...] = ()
    """What to ask the coordinator for so far."""
    stall: Stall | None = None
    """Why the run does not step."""

    @property
    def spec(self) -> PretrainJobSpec:
        """What is wanted of the job itself."""
        return self.job.job.spec

    @property
    def startup_deadline(self) -> float:
        """Seconds that a process has for its start."""
        return float(seconds(self.spec.restart_policy.startup_deadline))

    def update(self, *events: Event, **changes: object) -> Turn:
        """With changes of the status, and what to tell about them."""
        return replace(self, status=self.status.model_copy(update=changes), events=self.events + events)

    def ask(self, *requests: Request) -> Turn:
        """With requests to the coordinator."""
        return replace(self, requests=self.requests + requests)

    def stalled(self, stall: Stall) -> Turn:
        """With the reason why the run does not step."""
        return replace(self, stall=stall)
