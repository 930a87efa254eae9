"""Dice and IoU: pooled and per image, with and without the background."""

import numpy as np
import pytest

from sonoforge_trainer.evaluate.metrics import confusion_matrix
from sonoforge_trainer.evaluate.overlap import dice, foreground_dice, iou, overlap_details, overlap_scores


def counts(*pairs, classes=2):
    return np.stack([confusion_matrix(np.array(t), np.array(p), classes) for t, p in pairs])


LARGE_RIGHT = ([0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1])
SMALL_WRONG = ([0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0])


def test_a_worked_example_has_the_numbers_worked_by_hand():
    """Truth 0 0 1 1, prediction 0 1 1 1: Dice of 1 = 4/5, IoU 2/3; of the background 2/3 and 1/2."""
    confusion = counts(([0, 0, 1, 1], [0, 1, 1, 1]))[0]
    assert dice(confusion) == pytest.approx([2 / 3, 4 / 5])
    assert iou(confusion) == pytest.approx([1 / 2, 2 / 3])


def test_the_background_is_in_the_mean_and_not_in_the_foreground():
    scores = overlap_scores(counts(SMALL_WRONG), np.array([0]), resamples=0, seed=0)
    assert scores["dice_foreground"].value == 0
    assert scores["dice_mean"].value == pytest.approx(0.4)
    assert scores["iou_foreground"].value == 0
    assert foreground_dice(counts(SMALL_WRONG)) == 0


def test_pooled_and_per_image_means_differ_where_images_differ_in_size():
    scores = overlap_scores(counts(LARGE_RIGHT, SMALL_WRONG), np.array([0, 1]), resamples=0, seed=0)
    assert scores["dice_foreground"].value == pytest.approx(8 / 10)
    assert scores["dice_foreground_per_image"].value == pytest.approx(0.5)


def test_a_class_that_is_in_no_mask_and_no_prediction_is_left_out():
    confusion = counts(([0, 0, 1], [0, 0, 1]), ([0, 0, 0], [0, 0, 0]), classes=3)
    scores = overlap_scores(confusion, np.array([0, 1]), resamples=0, seed=0)
    assert scores["dice_foreground"].value == 1
    assert scores["dice_foreground_per_image"].value == 1
    assert overlap_details(confusion, ("background", "head", "nerve"))["dice"] == {"background": 1, "head": 1}


def test_the_interval_contains_the_number_and_is_the_same_each_time():
    random = np.random.default_rng(0)
    pairs = [(random.integers(0, 2, 40), random.integers(0, 2, 40)) for _ in range(20)]
    confusion = counts(*pairs)
    first = overlap_scores(confusion, np.arange(20) // 2, resamples=200, seed=1)
    assert first == overlap_scores(confusion, np.arange(20) // 2, resamples=200, seed=1)
    for score in first.values():
        assert score.low < score.value < score.high
