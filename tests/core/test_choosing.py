"""Which checkpoint is the best, and when a job stops early: decided on validation, over sound checkpoints."""

from __future__ import annotations

import pytest
from builders import World, checkpoint, job, retained, running_world, said_scores

from sonoforge_trainer.contract import CheckpointConfig, Termination


def test_a_score_to_be_best_by_that_no_evaluation_gives_is_told():
    world = running_world()
    world.end("eval-", 0, Termination(cause="done", result={"knn/accuracy": {"value": 0.5}}))
    told = {e.reason: e.message for e in world.turn().events}
    assert "'planes-knn/f1_macro' is not among its scores. Allowed: planes-knn/accuracy" in told["BestByUnknown"]


def test_a_score_that_validation_does_not_have_chooses_nothing_and_that_is_told():
    world = running_world()
    world.end("eval-", 0, Termination(cause="done", result={"knn/f1_macro": {"value": 0.5}}))
    told = {e.reason: e.message for e in world.turn().events}
    assert "'planes-knn/f1_macro' has no validation score here" in told["BestByUnknown"]
    assert (world.status.best, world.status.best_score) == ("", None)


def chosen_world(**spec: object) -> World:
    """Checkpoint 10 is best on validation, checkpoint 20 on test; 30 and 40 are on neither."""
    world = World(file=job(**spec))
    world.turn()
    world.report(40, 10, 20, 30, 40)
    for score, val in ((0.3, 0.9), (0.9, 0.6), (0.5, 0.7), (0.4, 0.5)):
        world.turn()
        world.end("eval-", 0, said_scores(score, val=val))
    world.turn()
    return world


def test_the_best_on_validation_is_chosen_and_kept_and_not_the_best_on_test():
    config = CheckpointConfig(uri="s3://b/run", every_samples=320, keep_last=1, keep_best=1)
    world = chosen_world(checkpoints=config)
    assert [c.ref.step for c in world.status.checkpoints if c.best] == [10]
    assert world.status.best == checkpoint(10).id
    assert (world.status.best_score, world.status.best_compared) == (0.3, 0.9)
    doomed = set()
    for _ in range(6):
        doomed |= {id_ for c in world.turn().children for id_ in c.prune}
        if world.running("retention-"):
            world.end("retention-", 0)
    assert doomed == {checkpoint(20).id, checkpoint(30).id}
    assert [c.ref.step for c in world.status.checkpoints if not c.pruned] == [10, 40]


def test_a_best_checkpoint_that_is_found_damaged_gives_its_place_to_the_next_best():
    world = chosen_world()
    world.report(50, 10, 20, 30, 40, quarantined=(checkpoint(10).uri,))
    world.turn()
    assert world.status.best == checkpoint(30).id
    assert (world.status.best_score, world.status.best_compared) == (0.5, 0.7)
    assert [c.ref.step for c in world.status.checkpoints if c.best] == [30]


@pytest.mark.parametrize(
    ("scores", "stops"),
    [
        (((0.1, 0.9), (0.2, 0.8), (0.3, 0.7)), True),  # rises on test alone
        (((0.9, 0.1), (0.8, 0.2), (0.7, 0.3)), False),  # rises on validation alone
    ],
)
def test_a_job_stops_early_where_validation_stops_rising_whatever_test_does(scores, stops):
    evaluation = job().job.spec.evaluation.model_copy(update={"stop_after_no_gain": 2})
    world = World(file=job(evaluation=evaluation))
    world.turn()
    world.report(30, 10, 20, 30)
    for score, val in scores:
        world.turn()
        world.end("eval-", 0, said_scores(score, val=val))
    world.turn()
    outcome = world.status.outcome
    assert (outcome is not None) is stops
    if outcome:
        assert outcome.reason == "NoGain"
        assert outcome.message == "2 checkpoints in a row without a better planes-knn/val_f1_macro"


def test_a_job_does_not_stop_early_past_a_checkpoint_that_waits_for_its_score():
    evaluation = job().job.spec.evaluation.model_copy(update={"stop_after_no_gain": 2, "parallel": 4})
    world = World(file=job(evaluation=evaluation))
    world.turn()
    world.report(40, 10, 20, 30, 40)
    world.turn()
    names = {c.evaluations[0].id: c.ref.step for c in world.status.checkpoints}
    by_step = {names[name.split("-")[1]]: name for name in world.running("eval-")}
    for step, score in ((10, 0.5), (20, 0.4), (40, 0.4)):
        world.end(by_step[step], 0, said_scores(score))
    world.turn()
    assert world.running("eval-") == [by_step[30]]
    assert world.status.outcome is None
    world.end(by_step[30], 0, said_scores(0.6))
    world.turn()
    assert world.status.outcome is None


def test_early_stopping_does_not_compare_with_a_damaged_checkpoint():
    evaluation = job().job.spec.evaluation.model_copy(update={"stop_after_no_gain": 2, "parallel": 1})
    world = World(file=job(evaluation=evaluation))
    world.turn()
    world.report(30, 10, 20, 30, quarantined=(checkpoint(10).uri,))
    for score in (0.9, 0.5, 0.6):
        world.turn()
        world.end("eval-", 0, said_scores(score))
    world.turn()
    assert world.status.outcome is None


def test_a_checkpoint_whose_evaluation_failed_for_good_does_not_hold_early_stopping_up():
    policy = {"stop_after_no_gain": 2, "parallel": 1, "retries": 0}
    world = World(file=job(evaluation=job().job.spec.evaluation.model_copy(update=policy)))
    world.turn()
    world.report(40, 10, 20, 30, 40)
    for said in (said_scores(0.5), said_scores(0.4), None, said_scores(0.4)):
        world.turn()
        world.end("eval-", 0 if said else 65, said)
    world.turn()
    assert world.status.outcome.reason == "NoGain"


def test_a_choice_that_was_made_by_another_score_does_not_stay():
    world = chosen_world()
    evaluation = world.file.job.spec.evaluation.model_copy(update={"best_by": "planes-knn/accuracy"})
    world.file = job(evaluation=evaluation)
    world.turn()
    assert (world.status.best, world.status.best_score, world.status.best_compared) == ("", None, None)
    assert not any(c.best for c in world.status.checkpoints)


def test_a_damaged_checkpoint_takes_the_place_of_no_sound_one():
    world = retained()
    world.end("retention-", 0)
    world.turn()
    world.report(30, 20, quarantined=(checkpoint(30).uri,))
    world.turn()
    world.report(30, 20, 30, quarantined=(checkpoint(30).uri,))
    for _ in range(3):
        world.turn()
        if world.running("eval-"):
            world.end("eval-", 0, said_scores(0.5))
    world.turn()
    assert world.running("retention-") == []
    assert world.status.durable_step == 20
    assert world.events.count("CheckpointQuarantined") == 1


def test_the_best_score_follows_when_another_score_decides():
    world = running_world()
    values = {"knn/f1_macro": 0.5, "knn/val_f1_macro": 0.4, "knn/accuracy": 0.7, "knn/val_accuracy": 0.6}
    said = Termination(cause="done", result={name: {"value": value} for name, value in values.items()})
    world.end("eval-", 0, said)
    world.turn()
    assert (world.status.best_score, world.status.best_compared) == (0.5, 0.4)
    evaluation = world.file.job.spec.evaluation.model_copy(update={"best_by": "planes-knn/accuracy"})
    world.file = job(evaluation=evaluation)
    world.turn()
    assert (world.status.best_score, world.status.best_compared) == (0.7, 0.6)
