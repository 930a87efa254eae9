"""Faults of an evaluation that its user can repair. Messages hold counts and keyed hashes, never keys or names."""

from __future__ import annotations


class EvaluationDataError(ValueError):
    """The evaluation set or the checkpoint cannot be used: it leaks, lacks a split, or is damaged."""


class EvaluationConfigError(ValueError):
    """The request does not fit the data set or the model."""
