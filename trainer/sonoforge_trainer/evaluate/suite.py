"""A whole suite on one machine: a checkpoint and the baselines beside it, one after the other.

Every evaluation is the same as in a cluster, where each is a process of its own: its result object is written once,
and features are kept by (model, data set, resolution), so an interrupted suite goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import structlog
import torch

from sonoforge_trainer.contract import EvalSuiteSpec, EvaluationRequest, EvaluationResult, suite_requests
from sonoforge_trainer.evaluate.errors import EvaluationConfigError, EvaluationDataError
from sonoforge_trainer.evaluate.run import evaluate, existing_result
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.weights.errors import WeightsError

CHECKPOINT = "checkpoint"
"""Name of the model that is no baseline."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """One evaluation of one model in a suite."""

    model: str
    """Name of the baseline, or CHECKPOINT."""
    request: EvaluationRequest
    """What was asked."""
    result: EvaluationResult | None
    """What was found; None where it failed."""
    made: bool
    """Whether it was made now, and not found."""
    fault: str = ""
    """Why it failed."""

    @property
    def passes(self) -> int:
        """Passes over the images that were made now."""
        return self.result.feature_passes if self.result and self.made else 0


@dataclass(frozen=True)
class Tally:
    """What a model's part of a suite cost."""

    model: str
    """Name of the baseline, or CHECKPOINT."""
    evaluations: int
    """Evaluations that have a result."""
    sets: int
    """Different (data set, resolution) among them: what a pass is needed for."""
    passes: int
    """Passes over the images that were made now."""
    failed: int
    """Evaluations without a result."""

    def __str__(self) -> str:
        """One line for people."""
        failed = f", {self.failed} failed" if self.failed else ""
        done, sets = _counted(self.evaluations, "evaluation"), _counted(self.sets, "data set")
        return f"{self.model}: {done} over {sets}, {_counted(self.passes, 'feature pass', 'feature passes')}{failed}"


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def run_suite(
    suite: EvalSuiteSpec, checkpoint_uri: str, checkpoint_digest: str, storage: Storage, device: torch.device
) -> list[Entry]:
    """Evaluate a checkpoint and the suite's baselines.

    What is wrong with one data set or one baseline does not hold up the others: its entry says what. Raises
    DamagedCheckpointError, StorageError.
    """
    entries = []
    for name, request in suite_requests(suite, checkpoint_uri, checkpoint_digest):
        model = name or CHECKPOINT
        made = existing_result(request, storage) is None
        try:
            result, fault = evaluate(request, storage, device), ""
        except (EvaluationDataError, EvaluationConfigError, WeightsError) as error:
            _log.error("evaluation failed", model=model, evaluation=request.evaluation.name, reason=str(error))
            result, fault = None, str(error)
        entries.append(Entry(model, request, result, made, fault))
    return entries


def tallies(entries: Iterable[Entry]) -> list[Tally]:
    """What each model cost, in the order of the suite."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.model, []).append(entry)
    return [_tally(model, mine) for model, mine in found.items()]


def _tally(model: str, entries: list[Entry]) -> Tally:
    done = [entry for entry in entries if entry.result is not None]
    sets = {(entry.request.evaluation.shards, entry.request.evaluation.resolution) for entry in done}
    return Tally(model, len(done), len(sets), sum(entry.passes for entry in done), len(entries) - len(done))
