"""Intervals over patients, of one number and of a mean over draws."""

import numpy as np
import pytest

from sonoforge_trainer.evaluate.bootstrap import interval, resample_weights, summarised
from sonoforge_trainer.evaluate.metrics import Predictions, confusion_matrix, scores_over_draws
from sonoforge_trainer.evaluate.overlap import dice, overlap_resampled, overlap_scores_over_draws


def test_a_resample_draws_as_many_patients_as_there_are_and_follows_from_the_seed():
    weights = resample_weights(7, 1000, 3)
    assert (weights.sum(1) == 7).all()
    assert weights.mean(0) == pytest.approx([1] * 7, abs=0.15)
    assert (weights == resample_weights(7, 1000, 3)).all()
    assert not (weights == resample_weights(7, 1000, 4)).all()


def test_the_interval_is_the_central_95_percent_of_what_is_defined():
    low, high = interval(np.r_[np.arange(1001.0), np.nan])
    assert (low, high) == (25, 975)
    assert interval(np.array([np.nan])) == (None, None)


def test_the_interval_of_an_accuracy_has_the_width_of_a_binomial():
    """400 patients of one image each, 300 right: 0.75 with a standard error of sqrt(.75 * .25 / 400) = 0.0217."""
    targets = np.zeros(400, np.int64)
    probabilities = np.eye(2)[(np.arange(400) >= 300).astype(int)]
    score = Predictions(probabilities, targets, np.arange(400)).scores(resamples=1000, seed=0)["accuracy"]
    assert score.value == 0.75
    assert (score.low, score.high) == (pytest.approx(0.75 - 1.96 * 0.0217, abs=0.006), pytest.approx(0.7925, abs=0.006))


def test_several_draws_have_their_mean_their_deviation_and_the_interval_of_the_mean():
    values = [{"a": 0.2, "b": 1.0}, {"a": 0.6}]
    resampled = [{"a": np.array([0.0, 0.4]), "b": np.array([1.0, 1.0])}, {"a": np.array([0.5, 0.7])}]
    scores = summarised(values, resampled)
    assert scores["a"].value == pytest.approx(0.4)
    assert scores["a"].deviation == pytest.approx(np.sqrt(0.08))
    assert [scores["a"].low, scores["a"].high] == pytest.approx(np.quantile([0.25, 0.55], [0.025, 0.975]))
    assert (scores["b"].value, scores["b"].deviation) == (1.0, None)
    assert summarised(values, None)["a"].low is None


def test_patients_are_drawn_alike_for_every_draw():
    """Two draws that are wrong on opposite images: in each resample of patients the errors cancel exactly."""
    targets, groups = np.zeros(20, np.int64), np.arange(20)
    odd = np.arange(20) % 2
    draws = [Predictions(np.eye(2)[wrong], targets, groups) for wrong in (odd, 1 - odd)]
    score = scores_over_draws(draws, resamples=200, seed=0)["accuracy"]
    assert (score.value, score.low, score.high) == (0.5, 0.5, 0.5)
    assert score.deviation == 0


def test_resampled_overlaps_equal_those_of_images_repeated_by_hand():
    random = np.random.default_rng(0)
    confusion = np.stack([confusion_matrix(*random.integers(0, 3, (2, 50)), 3) for _ in range(12)])
    groups = np.arange(12) // 3
    found = overlap_resampled(confusion, groups, 30, 5)
    for resample, weights in enumerate(resample_weights(4, 30, 5).astype(int)):
        rows = np.concatenate([np.repeat(np.flatnonzero(groups == g), weights[g]) for g in range(4)])
        repeated = confusion[rows]
        assert found["dice_foreground"][resample] == pytest.approx(dice(repeated.sum(0))[1:].mean())
        assert found["dice_mean_per_image"][resample] == pytest.approx(dice(repeated).mean())


def test_overlaps_of_several_draws_are_their_mean():
    right = confusion_matrix(np.array([0, 1, 1]), np.array([0, 1, 1]), 2)[None]
    wrong = confusion_matrix(np.array([0, 1, 1]), np.array([0, 0, 0]), 2)[None]
    scores = overlap_scores_over_draws([right, wrong], np.array([0]), resamples=10, seed=0)
    assert scores["dice_foreground"].value == 0.5
    assert scores["dice_foreground"].deviation == pytest.approx(np.sqrt(0.5))
