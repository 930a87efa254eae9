"""Dice and IoU of segmentations, from per-image confusion counts.

Four means of every overlap, because a single one hides something: over all classes (`mean`) or without the background
(`foreground`), of counts pooled over the whole split or of each image first (`_per_image`). A class that is neither in
the mask nor in the prediction of an image has no overlap there and is left out of that image's mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sonoforge_trainer.contract import Score
from sonoforge_trainer.evaluate.metrics import Floats, Ints, interval, mean_of_known, ratio, resample_weights

OVERLAPS = ("dice", "iou")
"""The two overlaps."""


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
    names, groups = np.unique(groups_i, return_inverse=True)
    weights_rg = resample_weights(len(names), resamples, seed) if resamples else np.zeros((0, len(names)))
    counts_gkk = np.zeros((len(names), *confusion_ikk.shape[1:]))
    np.add.at(counts_gkk, groups, confusion_ikk)
    pooled_rkk = np.einsum("rg,gkl->rkl", weights_rg, counts_gkk, optimize=True)
    weights_ri = weights_rg[:, groups]
    scores = {}
    for name, function in zip(OVERLAPS, (dice, iou), strict=True):
        value_k, value_ik, resampled_rk = function(confusion_ikk.sum(0)), function(confusion_ikk), function(pooled_rkk)
        for kind, first in (("mean", 0), ("foreground", 1)):
            image_i = mean_of_known(value_ik[:, first:])
            known = np.isfinite(image_i)
            image_r = ratio(weights_ri @ np.where(known, image_i, 0), weights_ri @ known)
            for suffix, value, values_r in (
                ("", mean_of_known(value_k[first:]), mean_of_known(resampled_rk[:, first:])),
                ("_per_image", mean_of_known(image_i), image_r),
            ):
                if np.isfinite(value):
                    low, high = interval(values_r)
                    scores[f"{name}_{kind}{suffix}"] = Score(value=float(value), low=low, high=high)
    return scores


def overlap_details(confusion_ikk: Ints, classes: tuple[str, ...]) -> dict[str, object]:
    """Dice and IoU of each class by name, pooled and as a mean over the images where it occurs."""
    details: dict[str, object] = {}
    for name, function in zip(OVERLAPS, (dice, iou), strict=True):
        value_k, value_ik = function(confusion_ikk.sum(0)), function(confusion_ikk)
        for suffix, values in (("", value_k), ("_per_image", mean_of_known(value_ik.T))):
            details[f"{name}{suffix}"] = {c: float(v) for c, v in zip(classes, values, strict=True) if np.isfinite(v)}
    return details
