"""Outcomes of single test samples, for comparisons of two models sample by sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sonoforge_trainer.contract import Evaluation, Evidence, SampleConfusions
from sonoforge_trainer.evaluate.metrics import Ints

MAX_NUMBERS = 2_000_000
"""Numbers that one protocol may leave: about 4 MB of JSON. What is larger is left out."""


def classified(classes: tuple[str, ...], groups_n: Ints, targets_n: Ints, predicted_n: Ints) -> SampleConfusions | None:
    """Outcomes of a classification; None where there are too many samples."""
    if 3 * len(targets_n) > MAX_NUMBERS:
        return None
    truth, predicted = tuple(targets_n.tolist()), tuple(predicted_n.tolist())
    return SampleConfusions(classes=classes, groups=_renumbered(groups_n), truth=truth, predicted=predicted)


def segmented(classes: tuple[str, ...], groups_n: Ints, confusion_nkk: Ints) -> SampleConfusions | None:
    """Outcomes of a segmentation, from pixel counts [n, K, K]; None where there are too many numbers."""
    if confusion_nkk.size > MAX_NUMBERS:
        return None
    counts = tuple(tuple(row) for row in confusion_nkk.reshape(len(confusion_nkk), -1).tolist())
    return SampleConfusions(classes=classes, groups=_renumbered(groups_n), counts=counts)


def evidence_of(
    evaluation: Evaluation, dataset_digest: str, samples: Mapping[str, SampleConfusions | None]
) -> Evidence:
    """The document of one evaluation, of its protocols that left outcomes."""
    return Evidence(
        dataset_digest=dataset_digest,
        label=evaluation.label,
        where=evaluation.where,
        protocols={protocol: found for protocol, found in samples.items() if found is not None},
    )


def _renumbered(groups_n: Ints) -> tuple[int, ...]:
    # The numbers that come in are in the order of the patients' hashes; these say nothing about them.
    _, first, inverse = np.unique(groups_n, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return tuple(order[inverse].tolist())
