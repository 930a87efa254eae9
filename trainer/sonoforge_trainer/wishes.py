"""What the operator asks of a run while it trains, as rank 0 hears it."""

from __future__ import annotations

from typing import ClassVar

from sonoforge_trainer.contract import Request
from sonoforge_trainer.contract.exits import Cause
from sonoforge_trainer.coordinator_client import ProgressPublisher


class StopRequestedError(Exception):
    """The run was asked to stop, has saved and leaves. No agent starts its worker again."""

    termination_cause: ClassVar[Cause] = "terminated"
    termination_final: ClassVar[bool] = True


class Wishes:
    """Requests that were heard and are not carried out yet.

    They are acknowledged once they are carried out, so that what a lost rank 0 did not get to comes to the next one.
    Without a publisher (no coordinator, or another rank) there are none. `attempt` is the identity of this group.
    """

    def __init__(self, publisher: ProgressPublisher | None, attempt: str) -> None:
        self._publisher, self._attempt = publisher, attempt
        self._stops: list[Request] = []
        self._checkpoints: list[tuple[int, Request]] = []  # with the steps done when it was heard

    def hear(self, step: int) -> None:
        """Take over what arrived until now, when `step` steps are done."""
        for request in self._publisher.requests() if self._publisher else ():
            if request.attempt not in ("", self._attempt):
                self._acknowledge([request])  # that group is gone, and its wish with it
                continue
            if request.kind == "stop":
                self._stops.append(request)
            if request.kind == "checkpoint":
                self._checkpoints.append((step, request))

    @property
    def stop(self) -> bool:
        """Whether the run was asked to stop."""
        return bool(self._stops)

    def checkpoint_since(self, step: int) -> bool:
        """Whether a checkpoint was asked for since one was begun after `step` steps."""
        return any(heard >= step for heard, _ in self._checkpoints)

    def ask_again(self, step: int) -> None:
        """The checkpoint that was begun failed: what it was asked for is asked for anew."""
        self._checkpoints = [(step, request) for _, request in self._checkpoints]

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is committed: acknowledge who asked before it was begun."""
        self._acknowledge([request for heard, request in self._checkpoints if heard < step])
        self._checkpoints = [(heard, request) for heard, request in self._checkpoints if heard >= step]

    def stopped(self) -> None:
        """The run has saved and leaves: acknowledge who asked for it."""
        self._acknowledge(self._stops)
        self._stops = []

    def _acknowledge(self, requests: list[Request]) -> None:
        for request in requests:
            assert self._publisher is not None
            self._publisher.acknowledge(request)
