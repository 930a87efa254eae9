"""The comparison: which model is best, and which others may be as good."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sonoforge_trainer.contract import (
    Artifacts,
    Baseline,
    EvaluationResult,
    Evidence,
    RunSummary,
    SampleConfusions,
    Score,
)
from sonoforge_trainer.evaluate.metrics import f1_macro
from sonoforge_trainer.report.comparison import models_of, tables
from sonoforge_trainer.report.runs import Run, read_run
from sonoforge_trainer.report.significance import compared, resampled_difference, same_samples
from sonoforge_trainer.storage import Storage

SHA = "sha256:" + "cd" * 32


def outcomes(truth, predicted, groups=None) -> SampleConfusions:
    return SampleConfusions(
        classes=("a", "b"),
        groups=tuple(range(len(truth)) if groups is None else groups),
        truth=tuple(map(int, truth)),
        predicted=tuple(map(int, predicted)),
    )


@pytest.fixture
def truth():
    return np.arange(200) % 2


def flipped(truth, count, seed):
    wrong = np.random.default_rng(seed).choice(len(truth), count, replace=False)
    predicted = truth.copy()
    predicted[wrong] = 1 - predicted[wrong]
    return predicted


def test_a_model_that_is_wrong_where_the_best_is_wrong_too_and_more_is_clearly_worse(truth):
    """20 errors against 30, of which 20 are the same: pairs see the difference that the two intervals hide."""
    best = flipped(truth, 20, 0)
    other = best.copy()
    right = np.flatnonzero(best == truth)[:10]
    other[right] = 1 - other[right]
    scores = [Score(value=value, low=value - 0.045, high=value + 0.045) for value in (0.90, 0.85)]
    paired = compared(*scores, "accuracy", (outcomes(truth, best), outcomes(truth, other)))
    assert (paired.relation, paired.paired) == ("worse", True)
    unpaired = compared(*scores, "accuracy", None)
    assert (unpaired.relation, unpaired.paired) == ("tied", False)


def test_two_models_of_equal_errors_tie(truth):
    pair = (outcomes(truth, flipped(truth, 30, 1)), outcomes(truth, flipped(truth, 31, 2)))
    assert compared(Score(value=0.85), Score(value=0.845), "accuracy", pair).relation == "tied"


def test_patients_and_not_images_are_drawn(truth):
    """The same errors, all in one patient of four: by images they are many, by patients they are one."""
    best, other = truth.copy(), truth.copy()
    other[:20] = 1 - other[:20]
    groups = np.arange(200) // 50
    by_image = compared(Score(value=1), Score(value=0.9), "accuracy", (outcomes(truth, best), outcomes(truth, other)))
    pair = (outcomes(truth, best, groups), outcomes(truth, other, groups))
    assert by_image.relation == "worse"
    assert compared(Score(value=1), Score(value=0.9), "accuracy", pair).relation == "tied"


def test_differences_of_f1_are_those_of_weighted_samples(truth):
    first, second = flipped(truth, 20, 3), flipped(truth, 40, 4)
    difference = resampled_difference(outcomes(truth, first), outcomes(truth, second), "f1_macro")

    def counts(predicted):
        matrix = np.zeros((2, 2))
        np.add.at(matrix, (truth, predicted), 1)
        return matrix

    exact = float(f1_macro(counts(first)) - f1_macro(counts(second)))
    assert difference.shape == (1000,)
    assert difference.mean() == pytest.approx(exact, abs=0.003)


def test_the_paired_bootstrap_agrees_with_the_paired_t_test_on_accuracy(truth):
    first, second = flipped(truth, 20, 5), flipped(truth, 50, 6)
    difference = resampled_difference(outcomes(truth, first), outcomes(truth, second), "accuracy")
    single = (first == truth).astype(float) - (second == truth).astype(float)
    low, high = stats.t.interval(0.95, len(single) - 1, single.mean(), stats.sem(single))
    assert np.quantile(difference, [0.025, 0.975]) == pytest.approx([low, high], abs=0.012)


def test_segmentations_are_compared_by_their_images():
    counts = [(80, 20 - k, 5, 95 + k) for k in range(20)]
    better = SampleConfusions(classes=("background", "head"), groups=tuple(range(20)), counts=tuple(counts))
    worse = better.model_copy(update={"counts": tuple((a - 10, b + 10, c, d) for a, b, c, d in counts)})
    for metric in ("dice_foreground", "dice_foreground_per_image", "iou_mean"):
        difference = resampled_difference(better, worse, metric)
        assert difference.min() > 0.02, metric
    assert resampled_difference(better, worse, "auroc_macro") is None


def test_only_the_very_same_samples_are_paired(truth):
    one = Evidence(dataset_digest=SHA, label="label", protocols={"knn": outcomes(truth, truth)})
    assert same_samples(one, one, "knn") is not None
    other_set = one.model_copy(update={"dataset_digest": "sha256:" + "0" * 64})
    other_part = one.model_copy(update={"where": {"country": "x"}})
    other_truth = one.model_copy(update={"protocols": {"knn": outcomes(1 - truth, truth)}})
    for other in (other_set, other_part, other_truth):
        assert same_samples(one, other, "knn") is None
    assert same_samples(one, one, "linear") is None


def test_without_any_spread_nothing_is_claimed():
    assert compared(Score(value=0.9), Score(value=0.1), "accuracy", None).relation == "unknown"


def test_rows_are_the_random_start_the_best_the_last_and_the_floors(summary):
    found = models_of([read_run(summary, Storage())])
    assert [(m.name, m.note) for m in found] == [
        ("random initialisation", "step 0"),
        ("best checkpoint", "step 10"),
        ("last checkpoint", "step 20"),
        ("raw pixels", "baseline"),
    ]
    (table,) = tables(found, Storage())
    (column,) = table.columns
    assert [c.score.value for c in column.cells] == [0.25, 0.75, 0.5, 0.4]
    assert [c.verdict.relation for c in column.cells] == ["worse", "best", "worse", "unknown"]
    assert not any(c.verdict.paired for c in column.cells)


def test_outcomes_beside_the_results_are_used_for_pairs(summary: RunSummary, truth):
    for number, checkpoint in enumerate(summary.checkpoints):
        path = Path(checkpoint.results[0].removeprefix("file://"))
        result = EvaluationResult.from_json(path.read_text())
        evidence = Evidence(
            dataset_digest=SHA, label="label", protocols={"knn": outcomes(truth, flipped(truth, 60 - 10 * number, 7))}
        )
        (path.parent / "e.json").write_text(evidence.to_json())
        path.write_text(result.model_copy(update={"artifacts": Artifacts(evidence="e.json")}).to_json())
    (table,) = tables(models_of([read_run(summary, Storage())]), Storage())
    assert [c.verdict.paired for c in table.columns[0].cells] == [True, False, True, False]


def test_a_baseline_kept_beside_the_checkpoints_is_a_row_and_is_compared_by_pairs(summary: RunSummary, truth):
    root = Path(summary.checkpoints_uri.removeprefix("file://"))
    for checkpoint in summary.checkpoints:
        path = Path(checkpoint.results[0].removeprefix("file://"))
        result = EvaluationResult.from_json(path.read_text())
        evidence = Evidence(
            dataset_digest=SHA, label="label", protocols={"knn": outcomes(truth, flipped(truth, 50, 7))}
        )
        (path.parent / "e.json").write_text(evidence.to_json())
        path.write_text(result.model_copy(update={"artifacts": Artifacts(evidence="e.json")}).to_json())
    baseline = Baseline(name="natural-images", kind="weights", uri="file:///w/dinov2.safetensors")
    folder = root / "baselines" / baseline.id / "eval"
    folder.mkdir(parents=True)
    better = Evidence(dataset_digest=SHA, label="label", protocols={"knn": outcomes(truth, flipped(truth, 5, 8))})
    (folder / "e.json").write_text(better.to_json())
    request = result.request.model_copy(update={"baseline": baseline})
    changes = {
        "request": request,
        "scores": {"knn/f1_macro": Score(value=0.97), "knn/val_f1_macro": Score(value=0.9)},
        "artifacts": Artifacts(evidence="e.json"),
    }
    (folder / "planes-0011.json").write_text(result.model_copy(update=changes).to_json())
    floors = summary.floors | {"natural-images:planes-knn/f1_macro": Score(value=0.97)}
    (table,) = tables(models_of([read_run(summary.model_copy(update={"floors": floors}), Storage())]), Storage())
    assert [m.name for m in table.models][-2:] == ["natural images", "raw pixels"]
    found = {m.name: c.verdict for m, c in zip(table.models, table.columns[0].cells, strict=True)}
    assert found["natural images"].relation == "best"
    assert (found["best checkpoint"].relation, found["best checkpoint"].paired) == ("worse", True)


def test_floors_that_differ_between_runs_get_rows_of_their_own(summary):
    other = summary.model_copy(update={"job": "other", "floors": {"raw pixels:planes-knn/f1_macro": Score(value=0.1)}})
    names = [m.name for m in models_of([Run(summary, [], []), Run(other, [], [])])]
    assert names[-2:] == ["raw pixels", "raw pixels (other)"]
    same = models_of([Run(summary, [], []), Run(summary.model_copy(update={"job": "twin"}), [], [])])
    assert [m.name for m in same].count("raw pixels") == 1


def test_health_numbers_are_shown_and_not_ranked(summary):
    checkpoints = tuple(
        c.model_copy(update={"scores": {"planes-health/rankme": Score(value=float(c.ref.step))}})
        for c in summary.checkpoints
    )
    run = Run(summary.model_copy(update={"checkpoints": checkpoints, "floors": {}}), [], [])
    (table,) = tables(models_of([run]), Storage())
    assert {c.verdict for c in table.columns[0].cells} == {None}
