"""Dice and IoU of segmentations, from per-image confusion counts.

Four means of every overlap, because a single one hides something: over all classes (`mean`) or without the background
(`foreground`), of counts pooled over the whole split or of each image first (`_per_image`). A class that is neither in
the mask nor in the prediction of an image has no overlap there and is left out of that image's mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sonoforge_trainer.contract import Score
from sonoforge_trainer.evaluate.bootstrap import Floats, resample_weights, summarised
from sonoforge_trainer.evaluate.metrics import Ints, mean_of_known, ratio

OVERLAPS = ("dice", "iou")
"""The two overlaps."""

_KINDS = (("mean", 0), ("foreground", 1))
"""The means over classes, and the first class of each: class 0 is the background."""


def dice(confusion: npt.NDArray[Any]) -> Floats:
    """2 |A and B| / (|A| + |B|) of each class [..., K]; NaN where both are empty."""
    both = np.diagonal(confusion, axis1=-2, axis2=-1)
    return ratio(2.0 * both, confusion.sum(-1) + confusion.sum(-2))


def iou(confusion: npt.NDArray[Any]) -> Floats:
    """|A and B| / |A or B| of each class [..., K]; NaN where both are empty."""
    both = np.diagonal(confusion, axis1=-2, axis2=-1)
    return ratio(1.0 * both, confusion.sum(-1) + confusion.sum(-2) - both)


def foreground_dice(confusion_ikk: Ints) -> float:
    """Mean Dice of the classes without the background, pooled over images: what selection on validation uses."""
    return float(np.nan_to_num(mean_of_known(dice(confusion_ikk.sum(0))[1:])))


def overlap_scores(confusion_ikk: Ints, groups_i: Ints, *, resamples: int, seed: int) -> dict[str, Score]:
    """All means of Dice and IoU, with 95 % intervals from a bootstrap over the groups of images."""
    return overlap_scores_over_draws([confusion_ikk], groups_i, resamples=resamples, seed=seed)


def overlap_scores_over_draws(draws: Sequence[Ints], groups_i: Ints, *, resamples: int, seed: int) -> dict[str, Score]:
    """Mean of every overlap over several segmentations of the same images, with deviation and interval."""
    resampled = [overlap_resampled(counts, groups_i, resamples, seed) for counts in draws] if resamples else None
    return summarised([overlap_values(counts) for counts in draws], resampled)


def overlap_values(confusion_ikk: Ints) -> dict[str, float]:
    """All means of Dice and IoU that are defined."""
    values = {}
    for name, function in zip(OVERLAPS, (dice, iou), strict=True):
        value_k, value_ik = function(confusion_ikk.sum(0)), function(confusion_ikk)
        for kind, first in _KINDS:
            values[f"{name}_{kind}"] = float(mean_of_known(value_k[first:]))
            values[f"{name}_{kind}_per_image"] = float(mean_of_known(mean_of_known(value_ik[:, first:])))
    return {name: value for name, value in values.items() if np.isfinite(value)}


def overlap_resampled(confusion_ikk: Ints, groups_i: Ints, resamples: int, seed: int) -> dict[str, Floats]:
    """The same means for resamples of the groups of images [R]; NaN in a resample where one is not defined."""
    names, groups = np.unique(groups_i, return_inverse=True)
    weights_rg = resample_weights(len(names), resamples, seed)
    counts_gkk = np.zeros((len(names), *confusion_ikk.shape[1:]))
    np.add.at(counts_gkk, groups, confusion_ikk)
    pooled_rkk = np.einsum("rg,gkl->rkl", weights_rg, counts_gkk, optimize=True)
    weights_ri = weights_rg[:, groups]
    values: dict[str, Floats] = {}
    for name, function in zip(OVERLAPS, (dice, iou), strict=True):
        value_rk, value_ik = function(pooled_rkk), function(confusion_ikk)
        for kind, first in _KINDS:
            image_i = mean_of_known(value_ik[:, first:])
            known = np.isfinite(image_i)
            values[f"{name}_{kind}"] = mean_of_known(value_rk[:, first:])
            values[f"{name}_{kind}_per_image"] = ratio(weights_ri @ np.where(known, image_i, 0), weights_ri @ known)
    return values


def overlap_details(confusion_ikk: Ints, classes: tuple[str, ...]) -> dict[str, object]:
    """Dice and IoU of each class by name, pooled and as a mean over the images where it occurs."""
    details: dict[str, object] = {}
    for name, function in zip(OVERLAPS, (dice, iou), strict=True):
        value_k, value_ik = function(confusion_ikk.sum(0)), function(confusion_ikk)
        for suffix, values in (("", value_k), ("_per_image", mean_of_known(value_ik.T))):
            details[f"{name}{suffix}"] = {c: float(v) for c, v in zip(classes, values, strict=True) if np.isfinite(v)}
    return details
