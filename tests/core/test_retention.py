"""What retention deletes."""

from __future__ import annotations

from builders import checkpoint

from sonoforge_operator.retention import prunable
from sonoforge_operator.rules import no_gain
from sonoforge_operator.status import CheckpointStatus, EvaluationStatus
from sonoforge_trainer.contract import CheckpointConfig, Score


def scored(step: int, score: float | None, *, test: float = 0.5, pruned: bool = False) -> CheckpointStatus:
    evaluation = EvaluationStatus(
        name="e",
        id=str(step),
        phase="Pending" if score is None else "Succeeded",
        scores={} if score is None else {"e-knn/f1": Score(value=test), "e-knn/val_f1": Score(value=score)},
    )
    return CheckpointStatus(ref=checkpoint(step), evaluations=(evaluation,), pruned=pruned)


def steps(deleted: tuple[str, ...]) -> list[int]:
    return [int(id_.split("-")[1]) for id_ in deleted]


def config(**changes: object) -> CheckpointConfig:
    return CheckpointConfig.model_validate({"uri": "s3://b/run", "keep_last": 2, "keep_best": 0} | changes)


def test_the_newest_stay():
    checkpoints = [scored(s, 0.5) for s in (10, 20, 30, 40)]
    assert steps(prunable(checkpoints, config(), None, highest=True)) == [10, 20]


def test_a_checkpoint_without_scores_stays_however_old():
    checkpoints = [scored(10, None), *(scored(s, 0.5) for s in (20, 30, 40))]
    assert steps(prunable(checkpoints, config(), None, highest=True)) == [20]


def test_the_first_at_or_after_each_multiple_stays_and_deleting_one_never_promotes_its_neighbour():
    checkpoints = [scored(s, 0.5) for s in (10, 20, 30, 40, 50, 60)]
    spaced = config(keep_every_samples=640)
    assert steps(prunable(checkpoints, spaced, None, highest=True)) == [10, 30]
    after = [scored(c.ref.step, 0.5, pruned=c.ref.step in (10, 30)) for c in checkpoints]
    assert steps(prunable(after, spaced, None, highest=True)) == []


def test_the_best_stay_in_either_direction():
    checkpoints = [scored(s, v) for s, v in ((10, 0.9), (20, 0.1), (30, 0.5), (40, 0.4))]
    best = config(keep_best=1)
    assert steps(prunable(checkpoints, best, "e-knn/f1", highest=True)) == [20]
    assert steps(prunable(checkpoints, best, "e-knn/f1", highest=False)) == [10]


def test_test_scores_keep_nothing():
    checkpoints = [scored(s, v, test=1 - v) for s, v in ((10, 0.9), (20, 0.1), (30, 0.5), (40, 0.4))]
    assert steps(prunable(checkpoints, config(keep_best=1), "e-knn/f1", highest=True)) == [20]


def test_a_score_without_labels_keeps_by_itself():
    checkpoints = []
    for step, rank in ((10, 9.0), (20, 1.0), (30, 5.0), (40, 4.0)):
        scores = {"e-health/rankme": Score(value=rank)}
        evaluation = EvaluationStatus(name="e", id=str(step), phase="Succeeded", scores=scores)
        checkpoints.append(CheckpointStatus(ref=checkpoint(step), evaluations=(evaluation,)))
    assert steps(prunable(checkpoints, config(keep_best=1), "e-health/rankme", highest=True)) == [20]


def test_no_gain_counts_scored_checkpoints_since_the_best():
    assert no_gain([0.5, 0.4, None, 0.4], 2, highest=True)
    assert not no_gain([0.5, 0.4, None], 2, highest=True)
    assert not no_gain([0.5, 0.4, 0.6], 2, highest=True)
    assert no_gain([0.5, 0.6, 0.7], 2, highest=False)
    assert not no_gain([0.5, 0.4], None, highest=True)
