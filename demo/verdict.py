"""Whether a run learned anything: its last checkpoint against the random initialisation, by the score of `bestBy`."""

from __future__ import annotations

from typing import NamedTuple

from sonoforge_operator.api import JobFile
from sonoforge_trainer.contract import RunSummary


class Verdict(NamedTuple):
    """What the comparison came to."""

    learned: bool
    """Whether the last checkpoint is better than the random initialisation."""
    sentence: str
    """The scores and the margin between them, or what is missing."""


def verdict(file: JobFile, summary: RunSummary) -> Verdict:
    """Compare the last checkpoint of a job with its first one, which has to be the random initialisation."""
    policy = file.job.spec.evaluation
    name = policy.best_by
    if name is None:
        return Verdict(False, "not shown to have learned: the job names no score in spec.evaluation.bestBy")
    by_step = {checkpoint.ref.step: checkpoint for checkpoint in summary.checkpoints}
    assert summary.training is not None  # `sonoforge run` writes it
    last = summary.training.recipe.steps
    for step, what in ((0, "random initialisation"), (last, "last step")):
        if step not in by_step or name not in by_step[step].scores:
            return Verdict(False, f"not shown to have learned: the {what} (step {step}) has no score {name}")
    before, after = (by_step[step].scores[name].value for step in (0, last))
    margin = after - before if policy.best_is == "highest" else before - after
    scores = f"{name} {before:.4f} at random initialisation, {after:.4f} at step {last}"
    if margin > 0:
        return Verdict(True, f"learned: {scores}; better by {margin:.4f}")
    return Verdict(False, f"NOT learned: {scores}; not better (margin {margin:.4f})")
