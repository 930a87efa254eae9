"""Health numbers of features with known spectra."""

import numpy as np
import pytest
import torch

from sonoforge_trainer.evaluate.health import effective_rank, feature_deviation, health, rankme, same_group_retrieval

CPU = torch.device("cpu")


def test_rankme_of_equal_singular_values_is_their_number():
    assert rankme(np.eye(8)) == pytest.approx(8, rel=1e-4)


def test_rankme_of_a_worked_example():
    """Singular values 3 and 1: exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 1.7548."""
    assert rankme(np.diag([3.0, 1.0])) == pytest.approx(1.7548, abs=1e-4)


def test_collapsed_features_have_rank_one_and_no_deviation():
    collapsed = np.ones((50, 16), np.float32)
    assert rankme(collapsed) == pytest.approx(1, abs=1e-3)
    assert effective_rank(collapsed) == 1
    assert feature_deviation(collapsed) == pytest.approx(0, abs=1e-6)


def test_features_on_the_whole_sphere_have_full_rank_and_a_deviation_of_one():
    features = np.random.default_rng(0).normal(size=(4000, 16))
    assert effective_rank(features) == pytest.approx(16, rel=0.01)
    assert feature_deviation(features) == pytest.approx(1, rel=0.02)


def test_retrieval_counts_images_whose_nearest_other_image_is_of_their_group():
    """The two of clip 1 find each other, the two of clip 2 lie apart and find clip 1 and 3; clip 3 has no companion."""
    features = np.array([[1, 0], [1, 0.01], [0.9, 0.3], [0, 1], [0.02, 1.0]])
    assert same_group_retrieval(features, [1, 1, 2, 2, 3], CPU) == 0.5
    assert same_group_retrieval(features, [1, 2, 3, 4, 5], CPU) is None


def test_the_entropy_of_the_teacher_is_among_the_numbers_where_training_logged_it():
    features = np.eye(4, dtype=np.float32)
    assert health(features, range(4), [""] * 4, CPU, teacher_entropy=3.5).scores["teacher_entropy"].value == 3.5
    assert "teacher_entropy" not in health(features, range(4), [""] * 4, CPU).scores


def test_images_of_unknown_patients_are_not_companions():
    finding = health(np.eye(4, dtype=np.float32), [0, 1, 2, 3], ["", "", "", ""], CPU)
    assert "same_patient_retrieval" not in finding.scores
    assert finding.details == {"images": 4, "dimensions": 4}
