"""Faults of an evaluation that its user can repair. Messages hold counts and keyed hashes, never keys or names."""

from __future__ import annotations

from sonoforge_trainer.contract.exits import Cause


class EvaluationDataError(ValueError):
    """The evaluation set cannot be used: it leaks, lacks a split, or is damaged."""

    termination_cause: Cause = "data"


class EvaluationConfigError(ValueError):
    """The request does not fit the data set or the model."""

    termination_cause: Cause = "config"
