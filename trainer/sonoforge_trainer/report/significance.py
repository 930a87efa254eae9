"""Whether one model is better than another on the same test samples.

Paired bootstrap over patients (Efron and Tibshirani, 1993, chapter 16): patients are drawn with replacement, both
models are scored on the same draw, and the difference counts where the central 95 % of its resampled values leave out
0. Where single outcomes are not at hand, the two intervals are compared as if they were independent, which finds less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sonoforge_trainer.contract import Evidence, SampleConfusions, Score
from sonoforge_trainer.evaluate.bootstrap import Floats, interval, resample_weights
from sonoforge_trainer.evaluate.metrics import accuracy, balanced_accuracy, f1_macro, mean_of_known, ratio
from sonoforge_trainer.evaluate.overlap import dice, iou

RESAMPLES, SEED = 1000, 0

_QUANTILE = 1.959964
"""Of the normal distribution, at 97.5 %."""

_POOLED: Mapping[str, Callable[[Floats], Floats]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1_macro": f1_macro,
    "dice_mean": lambda counts: mean_of_known(dice(counts)),
    "dice_foreground": lambda counts: mean_of_known(dice(counts)[..., 1:]),
    "iou_mean": lambda counts: mean_of_known(iou(counts)),
    "iou_foreground": lambda counts: mean_of_known(iou(counts)[..., 1:]),
}
_PER_IMAGE = "_per_image"


@dataclass(frozen=True)
class Verdict:
    """What a comparison with the best says."""

    relation: Literal["best", "tied", "worse", "unknown"]
    """`tied`: the difference may be chance. `unknown`: nothing is known of the spread."""
    paired: bool = False
    """Whether outcomes of single samples were compared."""


def compared(
    best: Score, other: Score, metric: str, outcomes: tuple[SampleConfusions, SampleConfusions] | None
) -> Verdict:
    """How `other` stands to `best`; `outcomes` are those of the best and the other on the same samples."""
    if outcomes is not None:
        difference = resampled_difference(*outcomes, metric)
        if difference is not None:
            low, high = interval(difference)
            if low is not None and high is not None:
                return Verdict("worse" if low > 0 else "tied", paired=True)
    deviations = [deviation_of(score) for score in (best, other)]
    if any(d is None for d in deviations):
        return Verdict("unknown")
    spread = math.hypot(*(d for d in deviations if d is not None))
    return Verdict("worse" if best.value - other.value > _QUANTILE * spread else "tied")


def deviation_of(score: Score) -> float | None:
    """Standard error that an interval stands for; None without an interval."""
    return None if score.low is None or score.high is None else (score.high - score.low) / (2 * _QUANTILE)


def resampled_difference(first: SampleConfusions, second: SampleConfusions, metric: str) -> Floats | None:
    """Values of `first` minus those of `second` in each resample [R]; None for a metric that needs more than counts."""
    groups = np.array(first.groups, np.int64)
    weights = resample_weights(int(groups.max()) + 1, RESAMPLES, SEED)
    values = [_resampled(one, metric, groups, weights) for one in (first, second)]
    if values[0] is None or values[1] is None:
        return None
    difference: Floats = values[0] - values[1]
    return difference


def same_samples(first: Evidence, second: Evidence, protocol: str) -> tuple[SampleConfusions, SampleConfusions] | None:
    """The outcomes of both where they are of the very same samples, else None."""
    if (first.dataset_digest, first.label, first.where) != (second.dataset_digest, second.label, second.where):
        return None
    one, other = first.protocols.get(protocol), second.protocols.get(protocol)
    if one is None or other is None or not one.groups:
        return None
    same = (one.groups, one.classes, one.truth) == (other.groups, other.classes, other.truth)
    return (one, other) if same else None


def _resampled(
    one: SampleConfusions, metric: str, groups: np.ndarray[tuple[int], np.dtype[np.int64]], weights_rg: Floats
) -> Floats | None:
    size = len(one.classes)
    counts_nk = np.zeros((len(groups), size * size))
    if one.counts:
        counts_nk[:] = np.array(one.counts)
    else:
        counts_nk[np.arange(len(groups)), np.array(one.truth) * size + np.array(one.predicted)] = 1
    function = _POOLED.get(metric.removesuffix(_PER_IMAGE))
    if function is None:
        return None
    if metric.endswith(_PER_IMAGE):
        value_n = function(counts_nk.reshape(-1, size, size))
        known = np.isfinite(value_n)
        total_rn = weights_rg[:, groups]
        return ratio(total_rn @ np.where(known, value_n, 0), total_rn @ known)
    by_group = np.zeros((weights_rg.shape[1], size * size))
    np.add.at(by_group, groups, counts_nk)
    return function((weights_rg @ by_group).reshape(-1, size, size))
