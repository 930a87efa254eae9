"""Classification protocols on planted features: they find what is there, and nothing where nothing is."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from sonoforge_trainer.evaluate.fewshot import draw_rows, fewshot
from sonoforge_trainer.evaluate.knn import fitting, knn, knn_probabilities
from sonoforge_trainer.evaluate.linear import BATCH, LEARNING_RATES, Heads, linear
from sonoforge_trainer.evaluate.logreg import Standardiser, fit_path, logreg
from sonoforge_trainer.evaluate.problem import Problem, best

CPU = torch.device("cpu")

PROTOCOLS = {
    "knn": lambda p: knn(p, (10, 20), temperature=0.07, resamples=0, seed=0, device=CPU),
    "linear": lambda p: linear(p, epochs=10, resamples=0, seed=0, device=CPU),
    "logreg": lambda p: logreg(p, resamples=0, seed=0),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_planted_class_means_are_found(planted, name):
    finding = PROTOCOLS[name](planted(6.0))
    assert finding.scores["balanced_accuracy"].value > 0.95
    assert finding.scores["auroc_macro"].value > 0.99
    assert finding.chosen in finding.details["validation_balanced_accuracy"]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_nothing_is_found_where_labels_are_shuffled(planted, name):
    """Chance is 1/3; the standard deviation of 240 fair guesses is 0.03."""
    finding = PROTOCOLS[name](planted(6.0, shuffled=True))
    assert finding.scores["balanced_accuracy"].value < 1 / 3 + 0.12
    assert abs(finding.scores["auroc_macro"].value - 0.5) < 0.1


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_numbers_are_the_same_each_time(planted, name):
    problem = planted(2.0)
    assert PROTOCOLS[name](problem) == PROTOCOLS[name](problem)


def conflicting() -> Problem:
    """Two inputs: `right` predicts the validation split and fails on test, `left` the reverse."""
    random = np.random.default_rng(0)
    truth = {split: np.arange(60, dtype=np.int64) % 2 for split in ("train", "val", "test")}
    clean = {s: np.eye(4)[t].astype(np.float32) + 0.1 * random.normal(size=(60, 4)) for s, t in truth.items()}
    noise = {s: random.normal(size=(60, 4)).astype(np.float32) for s in truth}
    return Problem(
        ("a", "b"),
        {
            "left": {"train": clean["train"], "val": noise["val"], "test": clean["test"]},
            "right": {"train": clean["train"], "val": clean["val"], "test": noise["test"]},
        },
        truth,
        {s: np.arange(60) for s in truth},
    )


@pytest.mark.parametrize("name", PROTOCOLS)
def test_selection_sees_validation_only(name):
    """The candidate that is best on test must lose to the one that is best on validation."""
    finding = PROTOCOLS[name](conflicting())
    assert finding.chosen.startswith("right ")
    assert finding.scores["balanced_accuracy"].value < 0.75


@pytest.mark.parametrize("name", PROTOCOLS)
def test_validation_scores_are_those_of_the_chosen_candidate_on_the_validation_split(name):
    finding = PROTOCOLS[name](conflicting())
    scores = {metric: score.value for metric, score in finding.scores.items()}
    assert scores["val_balanced_accuracy"] == finding.details["validation_balanced_accuracy"][finding.chosen]
    assert scores["val_balanced_accuracy"] > 0.95
    assert scores["val_auroc_macro"] > 0.95 > scores["auroc_macro"] + 0.2
    assert {m for m in scores if m.startswith("val_")} == {f"val_{m}" for m in scores if not m.startswith("val_")}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_is_fitted_sees_the_training_split_alone(name):
    """Other labels of validation and test may change which candidate is chosen, and none of the candidates."""
    problem = conflicting().only("right")
    flipped = Problem(
        problem.classes,
        problem.inputs,
        {**problem.targets, "val": 1 - problem.targets["val"], "test": 1 - problem.targets["test"]},
        problem.groups,
    )
    before, after = (PROTOCOLS[name](p).details["validation_balanced_accuracy"] for p in (problem, flipped))
    assert after == pytest.approx({candidate: 1 - value for candidate, value in before.items()})


def test_the_best_candidate_has_the_highest_score_and_not_the_lowest():
    """Released code of the paper kept the epoch of the lowest accuracy."""
    assert best({"epoch 1": 0.2, "epoch 2": 0.9, "epoch 3": 0.5}) == "epoch 2"
    assert best({"k=10": 0.9, "k=20": 0.9}) == "k=10"
    assert best({"k=10": float("nan"), "k=20": 0.1}) == "k=20"


def test_knn_at_a_high_temperature_equals_uniform_votes_by_cosine_similarity(planted):
    """At a temperature of 1e6 all neighbours weigh the same, as scikit-learn's do."""
    problem = planted(1.0)
    features = problem.inputs["cls"]
    found = knn_probabilities(
        features["train"], problem.targets["train"], 3, features["test"], (10,), temperature=1e6, device=CPU
    )[10]
    reference = KNeighborsClassifier(10, metric="cosine").fit(features["train"], problem.targets["train"])
    assert np.allclose(found, reference.predict_proba(features["test"]), atol=1e-4)


def test_knn_weights_neighbours_by_similarity():
    """Cosines 1, 0.6, 0.6 at temperature 1: the near one of class 0 has e^0.4 = 1.4918 votes, the others one each."""
    bank = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]])
    found = knn_probabilities(bank, np.array([0, 1, 1]), 2, np.array([[2.0, 0]]), (1, 3), temperature=1.0, device=CPU)
    assert found[1][0].tolist() == [1, 0]
    assert found[3][0] == pytest.approx([1.4918 / 3.4918, 2 / 3.4918], abs=1e-4)


def test_numbers_of_neighbours_beyond_the_training_set_are_left_out():
    assert fitting((10, 20, 100), 50) == (10, 20)
    assert fitting((10, 20), 7) == (7,)


def test_the_linear_probe_has_thirteen_learning_rates_scaled_to_its_batch():
    heads = Heads.new(4, 2, 0, CPU)
    assert len(LEARNING_RATES) == 13
    assert heads.rates_h[0].item() == pytest.approx(1e-5 * BATCH / 256)
    assert heads.rates_h[-1].item() == pytest.approx(0.1 * BATCH / 256)


def test_a_step_of_the_linear_probe_equals_autograd_and_torch_sgd():
    torch.manual_seed(0)
    features, targets = torch.randn(8, 5), torch.randint(0, 3, (8,))
    heads = Heads.new(5, 3, 0, CPU)
    weight, bias = heads.weights_hdk[-1].clone().requires_grad_(), heads.biases_hk[-1].clone().requires_grad_()
    optimiser = torch.optim.SGD([weight, bias], lr=float(heads.rates_h[-1]), momentum=0.9)
    for _ in range(3):
        heads.step(features, torch.nn.functional.one_hot(targets, 3).float(), 1.0)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(features @ weight + bias, targets).backward()
        optimiser.step()
    assert torch.allclose(heads.weights_hdk[-1], weight, atol=1e-6)
    assert torch.allclose(heads.biases_hk[-1], bias, atol=1e-6)


def test_a_head_that_overflows_is_not_chosen(planted):
    problem = planted(6.0)
    huge = {split: values * 1e30 for split, values in problem.inputs["cls"].items()}
    finding = linear(
        Problem(problem.classes, {"cls": problem.inputs["cls"], "huge": huge}, problem.targets, problem.groups),
        epochs=2,
        resamples=0,
        seed=0,
        device=CPU,
    )
    assert finding.scores["balanced_accuracy"].value > 0.9


def test_a_head_that_overflows_on_test_alone_is_chosen_all_the_same(planted):
    """An image that overflows counts as the first class: half of the test images are lost, and half are right."""
    problem = planted(6.0)
    test = problem.inputs["cls"]["test"].copy()
    test[::2] = np.inf
    huge = Problem(problem.classes, {"cls": {**problem.inputs["cls"], "test": test}}, problem.targets, problem.groups)
    plain, finding = (linear(p.only("cls"), epochs=2, resamples=0, seed=0, device=CPU) for p in (problem, huge))
    assert finding.chosen == plain.chosen
    assert finding.details["validation_balanced_accuracy"] == plain.details["validation_balanced_accuracy"]
    assert len(finding.details["validation_balanced_accuracy"]) == len(LEARNING_RATES)
    assert 0.5 < finding.scores["accuracy"].value < 0.8
    assert 0.8 < finding.scores["auroc_macro"].value < 0.9, "1/2 + 1/2 x 3/4, where all is right but what is lost"


@pytest.mark.parametrize("labels", [(0, 2), (0, 1, 2)])
def test_logistic_regression_equals_scikit_learn_also_with_two_classes(labels):
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 4))
    targets = np.array(labels)[np.arange(60) % len(labels)]
    ((_, model),) = fit_path(features, targets, 3, (0.5,))
    reference = LogisticRegression(C=0.5).fit(features, targets)
    assert np.allclose(model.probabilities(features)[:, list(labels)], reference.predict_proba(features), atol=1e-6)


def test_logistic_regression_gives_no_probability_to_a_class_without_training_images():
    ((_, model),) = fit_path(np.array([[0.0], [1.0]]), np.array([0, 2]), 3, (1.0,))
    assert model.probabilities(np.array([[0.0]]))[0, 1] == 0
    ((_, alone),) = fit_path(np.array([[0.0], [1.0]]), np.array([1, 1]), 3, (1.0,))
    assert alone.probabilities(np.array([[5.0]])).tolist() == [[0, 1, 0]]


def test_a_feature_that_does_not_vary_is_switched_off():
    train = np.array([[1.0, 3.0], [2.0, 3.0 + 1e-9], [3.0, 3.0]])
    assert Standardiser(train)(np.array([[2.0, 4.0]])).tolist() == [[0, 0]]


def test_a_draw_takes_all_images_of_n_patients_of_each_class():
    targets = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    rows = draw_rows(targets, groups, 1, seed=5)
    assert len(rows) == 4
    assert len(np.unique(groups[rows])) == 2
    assert sorted(np.unique(targets[rows])) == [0, 1]
    assert draw_rows(targets, groups, 3, seed=5) is None


def test_few_shot_reports_mean_and_deviation_over_draws_and_more_shots_are_better(planted):
    finding = fewshot(planted(3.0), (1, 5, 50), seeds=5, temperature=0.07, resamples=0, seed=0, device=CPU)
    one, five = (finding.scores[f"logreg_{n}shot_balanced_accuracy"] for n in (1, 5))
    assert five.value > one.value > 0.5
    assert one.deviation > 0
    assert finding.details["too_few_groups_for_shots"] == [50]
    assert "knn_5shot_auroc_macro" in finding.scores


def test_few_shot_has_an_interval_of_the_mean_over_draws_and_none_on_validation(planted):
    finding = fewshot(planted(2.0), (5,), seeds=5, temperature=0.07, resamples=200, seed=0, device=CPU)
    for method in ("knn", "logreg"):
        score = finding.scores[f"{method}_5shot_f1_macro"]
        assert score.low < score.value < score.high
        assert finding.scores[f"val_{method}_5shot_f1_macro"].low is None


def test_few_shot_scores_validation_beside_test_with_the_same_draws():
    finding = fewshot(conflicting().only("right"), (5,), seeds=3, temperature=0.07, resamples=0, seed=0, device=CPU)
    for method in ("knn", "logreg"):
        val, test = (finding.scores[f"{prefix}{method}_5shot_balanced_accuracy"] for prefix in ("val_", ""))
        assert val.value > 0.9 > test.value + 0.2
        assert val.deviation is not None


def test_few_shot_finds_nothing_where_labels_are_shuffled(planted):
    finding = fewshot(planted(6.0, shuffled=True), (5,), seeds=5, temperature=0.07, resamples=0, seed=0, device=CPU)
    assert abs(finding.scores["knn_5shot_balanced_accuracy"].value - 1 / 3) < 0.08


def test_heads_learn_also_where_a_pass_is_a_single_step(planted):
    """24 images and one pass would be one step; five hundred are made."""
    problem = planted(6.0).draw(np.arange(24))
    assert linear(problem, epochs=1, resamples=0, seed=0, device=CPU).scores["balanced_accuracy"].value > 0.9
