"""When a run saves, and when it waits for that. Every rank decides alike, because all decide on the same facts."""

from __future__ import annotations

import time
from collections.abc import Callable

from sonoforge_trainer.checkpoint import (
    CheckpointFailedError,
    CheckpointWriter,
    SaveResult,
    Snapshot,
    SupersededError,
)
from sonoforge_trainer.contract import CheckpointRef, RunConfig
from sonoforge_trainer.step import StepReport

_COMMIT_SECONDS = 3600.0
_FAILED_SAVES = 3


class Checkpointing:
    """Follows the schedule of a run's checkpoints.

    `snapshot` is the state where the run stands; `committed` and `failed` are told how saves ended. A failed save is
    made up for by the next one, until several fail in a row. `restored_step` is what the run continues from.
    """

    def __init__(
        self,
        config: RunConfig,
        writer: CheckpointWriter,
        snapshot: Callable[[], Snapshot],
        *,
        committed: Callable[[CheckpointRef, SaveResult], None],
        failed: Callable[[], None],
        restored_step: int | None,
    ) -> None:
        self._schedule, self._recipe = config.checkpoints, config.training.recipe
        self._writer, self._snapshot = writer, snapshot
        self._tell_committed, self._tell_failed = committed, failed
        self._committed_step = restored_step
        self._saved_time = time.monotonic()
        self._failures: list[CheckpointFailedError] = []  # in a row
        self.saved_step = -1
        """Steps done when this process group began its newest save; -1 before the first."""

    @property
    def restored(self) -> bool:
        """Whether there is a committed checkpoint that the run goes on from."""
        return self._committed_step is not None

    def overdue(self) -> bool:
        """Whether the clock asks for a checkpoint. Only one rank's clock may count."""
        seconds = self._schedule.interval_seconds
        return seconds is not None and time.monotonic() - self._saved_time >= seconds

    def follow(self, step: int, agreed: StepReport | None) -> None:
        """Save where the samples seen say so, or where the ranks agreed to. `step` steps are done.

        `agreed` is the report of an earlier step, and with it what every rank knows of the others: whether one asked
        for a checkpoint, and whether one still uploaded. Raises CheckpointFailedError after several failures in a row.
        """
        self._collect(self._writer.poll())
        if len(self._failures) >= _FAILED_SAVES:
            raise self._failures[-1]
        heard = agreed is not None and agreed.step >= self.saved_step  # it began after the newest save
        due = self._due(step)
        asked = heard and agreed is not None and agreed.checkpoint  # else the newest save is the answer
        if step == self._recipe.steps or not (due or asked):
            return
        if heard and agreed is not None and agreed.busy:
            if due:
                self._writer.skip(step)  # who asked goes on asking
            return
        if not heard and self.saved_step >= 0:
            self._collect(self._writer.wait(_COMMIT_SECONDS))  # nobody knows yet whether the others still upload it
        self.save(step)

    def save(self, step: int) -> None:
        """Begin to save. No rank may be uploading."""
        self._saved_time, self.saved_step = time.monotonic(), step
        begun = self._writer.save(self._snapshot())
        assert begun, "a save was begun while one was uploading"

    def complete(self, step: int) -> None:
        """Return once the checkpoint of this very step is committed. Raises CheckpointError."""
        self._collect(self._writer.wait(_COMMIT_SECONDS))
        if self._committed_step == step:
            return
        self.save(step)
        self._collect(self._writer.wait(_COMMIT_SECONDS))
        if self._failures:
            raise self._failures[-1]

    def _due(self, step: int) -> bool:
        every, batch = self._schedule.every_samples, self._recipe.global_batch
        return every is not None and step * batch // every > (step - 1) * batch // every

    def _collect(self, result: SaveResult | None) -> None:
        if result is None:
            return
        if isinstance(result.error, SupersededError):
            raise result.error
        if result.ref is None:
            assert result.error is not None
            self._failures.append(result.error)
            self._tell_failed()
            return
        self._failures = []
        self._committed_step = result.ref.step
        self._tell_committed(result.ref, result)
