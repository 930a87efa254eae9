"""The bootstrap over patients (Efron, 1979): 95 % intervals of every metric, by its percentiles.

Images of one patient resemble each other, so patients are drawn, with all their images. A resample is a weight for each
patient, the same for all metrics and draws of one split, and metrics are computed for all resamples at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sonoforge_trainer.contract import Score

Floats = npt.NDArray[np.floating[Any]]


def resample_weights(groups: int, resamples: int, seed: int) -> Floats:
    """How often each of the groups is drawn in each bootstrap resample [R, groups]."""
    random = np.random.default_rng([seed, groups])
    return random.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float64)


def interval(values_r: Floats) -> tuple[float | None, float | None]:
    """Central 95 % of the resampled values, those that are defined; (None, None) where there are none."""
    known = values_r[np.isfinite(values_r)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def summarised(
    values: Sequence[Mapping[str, float]], resampled: Sequence[Mapping[str, Floats]] | None
) -> dict[str, Score]:
    """Scores of one or several draws of a protocol on one split.

    `values` are the metrics of each draw; one that is not defined in a draw is left out of it. `resampled` are the same
    metrics for R resamples of the patients [R]; None for no intervals. The score of several draws is their mean, with
    the standard deviation over draws and the interval of the mean: the patients are drawn, the trainings are not.
    """
    scores: dict[str, Score] = {}
    for name in dict.fromkeys(name for of_draw in values for name in of_draw):
        draws = [draw for draw, of_draw in enumerate(values) if name in of_draw]
        found = np.array([values[draw][name] for draw in draws])
        low, high = (None, None) if resampled is None else interval(_mean([resampled[draw][name] for draw in draws]))
        deviation = float(found.std(ddof=1)) if len(found) > 1 else None
        scores[name] = Score(value=float(found.mean()), low=low, high=high, deviation=deviation)
    return scores


def _mean(values: Sequence[Floats]) -> Floats:
    """Mean over draws; NaN where one of them is not defined, so that no resample is of fewer draws than another."""
    mean: Floats = np.stack(values).mean(0)
    return mean
