"""When a run counts as diverged."""

from __future__ import annotations

from sonoforge_trainer.step import StepReport

NOT_FINITE_STEPS = 50
"""Steps in a row without a finite gradient after which a run is given up."""


class DivergedError(FloatingPointError):
    """No finite gradient for many steps in a row."""


class Divergence:
    """Counts steps in a row that changed nothing, alike on every rank."""

    def __init__(self) -> None:
        self._steps = 0

    def watch(self, report: StepReport) -> None:
        """Take in an ended step. Raises DivergedError."""
        self._steps = 0 if report.finite else self._steps + 1
        if self._steps >= NOT_FINITE_STEPS:
            raise DivergedError(
                f"no finite gradient in {NOT_FINITE_STEPS} steps in a row, the last is {report.step}; "
                "lower recipe.optim.baseLr or lengthen recipe.schedule.warmupSamples"
            )
