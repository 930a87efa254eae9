"""Classification metrics and the patient bootstrap."""

import numpy as np
import pytest
from sklearn import metrics as reference

from sonoforge_trainer.evaluate.bootstrap import resample_weights
from sonoforge_trainer.evaluate.metrics import (
    Predictions,
    accuracy,
    auroc,
    balanced_accuracy,
    confusion_matrix,
    f1_macro,
)


def predictions(targets, predicted, classes=3, groups=None):
    targets = np.array(targets)
    return Predictions(np.eye(classes)[predicted], targets, np.arange(len(targets)) if groups is None else groups)


def test_a_worked_example_has_the_numbers_worked_by_hand():
    """Truth aaab bc, predictions aabb bc: recalls 2/3, 1, 1; F1 of a = 4/5, of b = 4/5, of c = 1."""
    found = predictions([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 2]).values()
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert found["f1_macro"] == pytest.approx((0.8 + 0.8 + 1) / 3)


@pytest.mark.parametrize("seed", range(3))
def test_every_metric_equals_scikit_learn(seed):
    random = np.random.default_rng(seed)
    targets = random.integers(0, 4, 200)
    # Two decimals, so that scores are tied.
    probabilities = random.dirichlet(np.ones(4), 200).round(2) + 0.5 * np.eye(4)[targets]
    probabilities /= probabilities.sum(1, keepdims=True)
    found = Predictions(probabilities, targets, np.arange(200)).values()
    predicted = probabilities.argmax(1)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(targets, predicted))
    assert found["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(targets, predicted))
    assert found["f1_macro"] == pytest.approx(reference.f1_score(targets, predicted, average="macro"))
    assert found["auroc_macro"] == pytest.approx(reference.roc_auc_score(targets, probabilities, multi_class="ovr"))


def test_tied_scores_count_half_in_the_area_under_the_curve():
    assert auroc(np.array([0.5, 0.5, 0.5, 0.5]), np.array([True, False, True, False]))[0] == 0.5
    assert auroc(np.array([0.1, 0.5, 0.5, 0.9]), np.array([False, True, False, True]))[0] == 0.875


def test_a_weighted_area_equals_the_area_of_repeated_samples():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.8, 0.3]), np.array([False, True, False, True, True])
    weights = np.array([2, 1, 3, 0, 2])
    repeated = auroc(np.repeat(scores, weights), np.repeat(positive, weights))
    assert auroc(scores, positive, weights[None].astype(float)) == pytest.approx(repeated)


def test_a_class_that_is_absent_from_the_test_split_is_left_out_of_the_means_and_named():
    found = predictions([0, 0, 1, 1], [0, 2, 1, 1])
    assert found.values()["balanced_accuracy"] == pytest.approx(0.75)
    assert found.values()["f1_macro"] == pytest.approx((2 / 3 + 1) / 2)
    details = found.details(("a", "b", "c"))
    assert details["absent_from_test"] == ["c"]
    assert details["confusion"] == {"a": [1, 0, 1], "b": [0, 2, 0], "c": [0, 0, 0]}


def test_a_split_of_one_class_has_no_area_under_the_curve_and_no_invented_one():
    assert "auroc_macro" not in predictions([1, 1], [1, 0]).values()


def test_the_interval_of_a_bootstrap_over_patients_is_wider_than_one_over_images():
    """Twelve patients of twenty equal images each hold the information of twelve images."""
    random = np.random.default_rng(1)
    right = np.repeat(random.random(12) < 0.6, 20)
    targets = np.zeros(240, np.int64)
    by_image = predictions(targets, np.where(right, 0, 1), 2).scores(resamples=500, seed=0)["accuracy"]
    by_patient = predictions(targets, np.where(right, 0, 1), 2, np.repeat(np.arange(12), 20)).scores(
        resamples=500, seed=0
    )["accuracy"]
    assert by_patient.value == by_image.value
    assert by_patient.high - by_patient.low > 3 * (by_image.high - by_image.low)


def test_the_interval_of_the_bootstrap_agrees_with_one_made_by_drawing_patients_one_after_the_other():
    random = np.random.default_rng(2)
    targets, groups = random.integers(0, 3, 90), np.arange(90) // 3
    probabilities = random.dirichlet(np.ones(3), 90) + np.eye(3)[targets]
    found = Predictions(probabilities, targets, groups).scores(resamples=400, seed=3)
    slow = []
    for weights in resample_weights(30, 400, 3).astype(int):
        rows = np.concatenate([np.repeat(np.flatnonzero(groups == g), weights[g]) for g in range(30)])
        slow.append(reference.f1_score(targets[rows], probabilities[rows].argmax(1), average="macro"))
    assert [found["f1_macro"].low, found["f1_macro"].high] == pytest.approx(np.quantile(slow, [0.025, 0.975]))


def test_stacked_confusions_are_scored_one_by_one():
    first = confusion_matrix(np.array([0, 1, 1]), np.array([0, 1, 0]), 2)
    second = confusion_matrix(np.array([0, 1, 1]), np.array([0, 1, 1]), 2)
    stacked = np.stack([first, second])
    assert accuracy(stacked) == pytest.approx([2 / 3, 1])
    assert balanced_accuracy(stacked) == pytest.approx([0.75, 1])
    assert f1_macro(stacked) == pytest.approx([2 / 3, 1])
