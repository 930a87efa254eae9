"""Single incidents that once lost work, did it twice, or told something that was not true."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import JOB, World, checkpoint, job, said_scores

from sonoforge_operator.api import parse_job_file
from sonoforge_trainer.contract import Activity, CheckpointConfig, Progress, Termination

HOURS = 3600.0


def running_world(**spec: object) -> World:
    """A world whose job trains at step 10 with checkpoint 10."""
    world = World(file=job(**spec))
    world.turn()
    world.report(10, 10)
    world.turn()
    assert world.status.phase == "Running"
    return world


def ended(world: World, turns: int = 8) -> World:
    for _ in range(turns):
        world.turn()
        for kind in ("eval-", "floor-", "retention-"):
            if world.running(kind):
                said = Termination(cause="done", result={"raw-pixels:planes-knn/f1_macro": {"value": 0.2}})
                world.end(kind, 0, said if kind == "floor-" else said_scores(0.5))
    return world


def test_a_new_coordinator_that_knows_nothing_yet_is_no_stall_however_long_the_run_has_lasted():
    world = running_world()
    world.now += 2 * HOURS
    world.report(20, 10)
    world.turn()
    world.end("coordinator-", -9)
    world.progress = None
    world.turn()
    world.progress = Progress()
    for _ in range(20):
        world.turn()
        assert world.status.attempt == 1
        assert world.status.phase == "Running"
    world.turn(15)
    assert world.status.condition("Training").status == "Unknown"
    assert world.status.restarts == {"coordinator": 1}


def test_a_group_that_never_steps_under_a_new_coordinator_is_started_over_after_the_deadline():
    world = running_world()
    world.end("coordinator-", -9)
    world.progress = Progress()
    world.turn()
    world.turn(1.0)
    assert world.status.attempt == 1
    world.turn(70.0)  # it stepped before, so a stall is judged by its steps
    assert world.status.attempt == 2


def test_a_job_that_was_stopped_overnight_is_not_stalled_when_it_is_started_again():
    world = running_world()
    world.children.clear()
    world.progress = None
    world.turn(10 * HOURS)
    world.progress = Progress()
    for _ in range(30):
        world.turn(30.0)
        assert world.status.attempt == 1
    assert world.status.condition("Stalled").status == "False"
    assert world.status.condition("Training").status == "False"


def test_one_answer_of_the_coordinator_that_is_late_is_no_news_about_the_run():
    world = running_world()
    world.now += 2 * HOURS
    world.report(20, 10)
    world.turn()
    world.progress = None
    world.turn()
    assert (world.status.phase, world.status.condition("Stalled").status) == ("Running", "False")


def test_a_long_upload_of_the_last_checkpoint_is_no_stall():
    world = running_world()
    world.report(99, 10, activity=Activity.CHECKPOINTING)
    world.turn(1800)
    assert world.status.attempt == 1


def test_suspending_does_not_count_the_coordinator_as_lost():
    world = running_world()
    world.file = job(suspend=True)
    world.turn()
    world.end("worker-", 143, Termination(cause="terminated", final=True))
    for _ in range(2):
        world.turn()
    if world.running("coordinator-"):
        world.end("coordinator-", 0)
    world.turn()
    world.file = job()
    world.turn()
    assert world.status.restarts == {}
    assert world.running("coordinator-") == ["coordinator-000"]


def test_a_checkpoint_that_nobody_lived_to_report_is_found_and_evaluated_before_the_job_ends():
    world = World()
    world.turn()
    world.report(100, 0, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("worker-")
    world.unreported = (60,)
    ended(world)
    assert world.status.phase == "Succeeded"
    assert [c.ref.step for c in world.status.checkpoints] == [0, 60, 100]
    assert all(c.evaluations[0].phase == "Succeeded" for c in world.status.checkpoints)


def test_every_checkpoint_that_nobody_reported_is_found_however_old_and_however_many_there_are():
    reported, unreported = range(0, 400, 2), range(1, 40, 2)
    file = job(evaluation=job().job.spec.evaluation.model_copy(update={"parallel": 64}))
    world = World(file=file)
    world.turn()
    world.report(100, *reported, activity=Activity.FINISHED)
    world.unreported = tuple(unreported)
    world.turn()
    world.end("worker-")
    ended(world, turns=30)
    assert world.status.phase == "Succeeded"
    assert [c.ref.step for c in world.status.checkpoints] == sorted([*reported, *unreported])
    assert all(c.evaluations[0].phase == "Succeeded" for c in world.status.checkpoints)
    assert world.status.inventories == 3  # 20 checkpoints, 8 at a time


def test_a_listing_that_is_done_again_leaves_out_what_is_known_and_not_what_was_deleted():
    world = retained()
    world.end("retention-", 0)
    world.report(100, 10, 20, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("worker-")
    world.turn()
    (listing,) = [c for c in world.last.children if c.kind == "inventory"]
    assert listing.known == (checkpoint(20).id, checkpoint(100).id)


def test_how_processes_end_after_the_last_checkpoint_changes_nothing():
    world = running_world()
    world.report(100, 10, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("worker-001-0000", 1, Termination(cause="application", message="at exit"))
    world.end("worker-001-0001", None)
    ended(world)
    assert (world.status.phase, world.status.attempt, world.status.restarts) == ("Succeeded", 1, {})


def test_workers_that_do_not_leave_after_the_last_checkpoint_are_stopped():
    world = running_world()
    world.report(100, 10, 100, activity=Activity.FINISHED)
    world.turn(10)
    assert world.status.outcome is None
    world.turn(60)
    assert world.status.outcome.reason == "BudgetSpent"


def test_kills_do_not_use_up_the_retries_of_an_evaluation():
    world = running_world()
    for _ in range(3):
        world.end("eval-", None)
        world.turn()
    world.end("eval-", 65, Termination(cause="data", message="x"))
    world.turn()
    assert world.status.checkpoints[0].evaluations[0].phase == "Running"
    assert world.started.count(world.running("eval-")[0]) == 1


def test_an_evaluation_that_is_killed_every_time_is_given_up_in_the_end():
    world = running_world()
    for _ in range(21):
        world.end("eval-", -9)
        world.turn()
    evaluation = world.status.checkpoints[0].evaluations[0]
    assert (evaluation.phase, evaluation.reason) == (
        "Failed",
        "killed 21 times without an answer; is there enough memory?",
    )


@pytest.mark.parametrize("result", [{"knn/f1_macro": {"value": None}}, {"knn/f1_macro": 0.5}, {"knn/f1_macro": {}}])
def test_scores_that_cannot_be_read_fail_the_evaluation_and_not_the_runner(result):
    world = running_world()
    for _ in range(2):
        world.end("eval-", 0, Termination(cause="done", result=result))
        world.turn()
    evaluation = world.status.checkpoints[0].evaluations[0]
    assert (evaluation.phase, evaluation.reason) == ("Failed", "its scores cannot be read")


def cannot_start(world: World, prefix: str, waiting: str, message: str = "") -> None:
    """The running children with this prefix do not start, since they were made."""
    for name in world.running(prefix):
        world.children[name] = replace(world.children[name], waiting=waiting, waiting_message=message)


def over(world: World) -> World:
    """Training has ended, and its last checkpoint waits for its scores."""
    world.turn()
    world.report(100, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("worker-")
    world.turn()
    assert world.status.outcome is not None
    return world


def test_an_evaluation_that_can_never_start_says_why_and_does_not_hold_the_job_for_ever():
    world = over(World())
    tries = []
    for _ in range(2):
        cannot_start(world, "eval-", "ImagePull", "no such image")
        world.turn()
        evaluating = world.status.condition("Evaluating")
        assert (world.status.phase, evaluating.status, evaluating.reason) == ("Evaluating", "True", "ImagePull")
        assert evaluating.message.endswith("no such image")
        tries += world.running("eval-")
        world.turn(1801.0)
        world.turn()
    assert len(set(tries)) == 2
    evaluation = world.status.checkpoints[0].evaluations[0]
    assert (evaluation.phase, evaluation.reason) == ("Failed", "ImagePull: no such image")
    assert ended(world).status.phase == "Succeeded"


@pytest.mark.parametrize("waiting", ["Unschedulable", "WaitingForQueue"])
def test_an_evaluation_that_waits_for_a_free_place_waits_as_long_as_it_takes_and_says_so(waiting):
    world = over(World())
    cannot_start(world, "eval-", waiting)
    world.turn(100 * HOURS)
    evaluation = world.status.checkpoints[0].evaluations[0]
    assert (evaluation.phase, evaluation.failures) == ("Running", 0)
    assert world.status.condition("Evaluating").reason == waiting


def test_an_evaluation_that_the_api_server_refuses_says_so():
    world = over(World())
    world.refused = "Invalid: requests above limits"
    world.turn()
    evaluating = world.status.condition("Evaluating")
    assert (world.status.phase, evaluating.status, evaluating.reason) == ("Evaluating", "True", "Refused")
    assert evaluating.message.endswith("requests above limits")


def test_scores_of_a_protocol_that_nobody_knows_are_a_failed_try_and_break_no_pass():
    world = over(World())
    for _ in range(2):
        world.end("eval-", 0, Termination(cause="done", result={"future/score": {"value": 0.5}}))
        world.turn()
        world.turn()
    evaluation = world.status.checkpoints[0].evaluations[0]
    assert (evaluation.phase, evaluation.reason) == ("Failed", "its scores cannot be read")


def test_an_evaluation_that_cannot_start_while_the_run_trains_is_left_for_somebody_to_put_right():
    world = running_world()
    cannot_start(world, "eval-", "ImagePull", "no such image")
    world.report(20, 10)
    world.turn(5 * HOURS)
    evaluation = world.status.checkpoints[0].evaluations[0]
    assert (evaluation.phase, evaluation.failures) == ("Running", 0)
    assert world.status.condition("Evaluating").reason == "ImagePull"


@pytest.mark.parametrize("waiting", ["ImagePull", "Starting"])
def test_a_listing_that_can_never_start_is_given_up_and_told(waiting):
    world = World()
    world._answer_listings = lambda: None
    over(world)
    world.end("eval-", 0, said_scores(0.5))
    for _ in range(3):
        world.turn()
        assert world.status.phase == "Evaluating"
        cannot_start(world, "inventory-", waiting, "no such image")
        world.turn()
        reason = world.status.condition("Evaluating").reason
        assert reason == ("UpToDate" if waiting == "Starting" else waiting)
        world.turn(1801.0)
    assert "InventoryFailed" in world.events
    world.turn()
    assert world.status.phase == "Succeeded"


def test_retention_that_can_never_start_is_given_up_and_told():
    world = retained()
    for _ in range(3):
        cannot_start(world, "retention-", "ContainerConfig", "no such secret")
        world.report(21, 10, 20)
        world.turn()
        world.report(22, 10, 20)
        world.turn(1801.0)
    assert "RetentionFailed" in world.events


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


def retained() -> World:
    config = CheckpointConfig(uri="s3://b/run", every_samples=320, keep_last=1, keep_best=0)
    world = World(file=job(checkpoints=config))
    world.turn()
    world.report(20, 10, 20)
    for _ in range(3):
        world.turn()
        if world.running("eval-"):
            world.end("eval-", 0, said_scores(0.5))
    world.turn()
    assert len(world.running("retention-")) == 1
    return world


def test_retention_whose_end_nobody_saw_is_done_again():
    world = retained()
    world.end("retention-", None)
    world.turn()
    assert len(world.running("retention-")) == 1
    world.end("retention-", 0)
    world.turn()
    assert [c.ref.step for c in world.status.checkpoints if c.pruned] == [10]


def test_retention_that_fails_is_given_up_and_does_not_hold_up_the_end():
    world = retained()
    for _ in range(3):
        world.end("retention-", 69)
        world.turn()
    assert world.running("retention-") == []
    assert "RetentionFailed" in world.events
    world.report(100, 10, 20, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("worker-")
    assert ended(world).status.phase == "Succeeded"


def test_retention_that_runs_is_not_started_over_when_there_is_more_to_delete():
    world = retained()
    before = world.running("retention-")
    world.report(30, 10, 20, 30)
    for _ in range(3):
        world.turn()
        if world.running("eval-"):
            world.end("eval-", 0, said_scores(0.5))
    world.turn()
    assert world.running("retention-") == before
    world.end("retention-", 0)
    world.turn()
    world.turn()
    assert [c.prune for c in world.last.children if c.kind == "retention"] == [(checkpoint(20).id,)]


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


def test_an_edited_suite_replaces_what_waits_and_adds_what_is_new():
    world = running_world()
    text = JOB.replace(
        "protocols: [knn]}", "protocols: [knn], seed: 7}\n    - {name: more, shards: s3://b/m.json, protocols: [knn]}"
    )
    world.file = parse_job_file(text, where="job.yaml")
    before = world.running("eval-")
    world.turn()
    assert [e.name for e in world.status.checkpoints[0].evaluations] == ["planes", "more"]
    assert len(world.running("eval-")) == 1
    assert world.running("eval-") != before


def test_an_edited_suite_does_not_wait_for_a_checkpoint_that_was_deleted():
    world = retained()
    world.end("retention-", 0)
    world.turn()
    world.file = parse_job_file(JOB.replace("protocols: [knn]}", "protocols: [knn], seed: 7}"), where="job.yaml")
    world.turn()
    first, second = (c.evaluations[0] for c in world.status.checkpoints)
    assert (first.phase, second.phase) == ("Failed", "Running")
    assert "deleted by retention" in first.reason


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


def test_floors_run_once_while_nothing_waits_and_the_job_waits_for_them():
    world = World(file=parse_job_file(JOB.replace("floors: false", "floors: true"), where="job.yaml"))
    world.turn()
    assert world.running("floor-") == []
    world.report(10, 10)
    world.turn()
    assert (len(world.running("eval-")), len(world.running("floor-"))) == (1, 0)
    world.end("eval-", 0, said_scores(0.5))
    world.turn()
    assert len(world.running("floor-")) == 1
    world.report(20, 10, 20)
    world.turn()
    assert world.running("eval-") == []
    ended(world)
    assert world.status.floors[0].scores["raw-pixels:planes-knn/f1_macro"].value == 0.2
    assert len([n for n in world.started if n.startswith("floor-")]) == 1
    assert world.status.checkpoints[1].evaluations[0].phase == "Succeeded"


def test_floors_wait_again_where_every_checkpoint_object_was_deleted_behind_the_operators_back():
    world = World(file=parse_job_file(JOB.replace("floors: false", "floors: true"), where="job.yaml"))
    world.turn()
    world.report(10, 10)
    world.turn()
    world.end("eval-", 0, said_scores(0.5))
    world.turn()
    assert len(world.running("floor-")) == 1
    world.status = world.status.model_copy(update={"checkpoints": ()})
    world.turn()
    assert world.running("floor-") == []
    assert world.status.floors[0].phase == "Pending"
    world.report(20, 10, 20)
    ended(world)
    assert world.status.floors[0].phase == "Succeeded"


def test_floors_that_no_evaluation_of_the_suite_asks_for_are_forgotten():
    world = World(file=parse_job_file(JOB.replace("floors: false", "floors: true"), where="job.yaml"))
    world.turn()
    world.report(10, 10)
    world.turn()
    unknown = world.status.floors[0].model_copy(update={"name": "nobody", "phase": "Running"})
    world.status = world.status.model_copy(update={"floors": (unknown,)})
    world.turn()
    assert [(floor.name, floor.phase) for floor in world.status.floors] == [("planes", "Pending")]


def test_floors_that_fail_are_told_and_the_job_succeeds():
    world = World(file=parse_job_file(JOB.replace("floors: false", "floors: true"), where="job.yaml"))
    world.turn()
    world.report(100, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("worker-")
    for _ in range(12):
        world.turn()
        if world.running("eval-"):
            world.end("eval-", 0, said_scores(0.5))
        if world.running("floor-"):
            world.end("floor-", 65, Termination(cause="data", message="no masks"))
    assert world.status.phase == "Succeeded"
    assert world.status.floors[0].reason == "data: no masks"


def test_steps_done_again_are_counted_once_the_new_group_says_where_it_stands():
    world = running_world()
    world.report(37, 30)
    world.turn()
    world.report(0, attempt="b", activity=Activity.STARTING)
    world.turn()
    assert world.status.lost_steps == 0
    world.report(31, 30, attempt="b", restored_step=30)
    world.turn()
    assert world.status.lost_steps == 7


def test_nodes_that_die_again_and_again_without_a_step_are_started_later_and_later():
    world = running_world()
    waits = []
    for _ in range(7):
        world.end("worker-001-0000", -9)
        turns = 0
        world.turn()
        while not world.running("worker-001-0000"):
            world.turn()
            turns += 1
        waits.append(turns)
    assert waits[:4] == [0, 0, 0, 0]
    assert waits[4:] == [2, 4, 8]
    world.report(12, 10)
    world.turn()
    world.end("worker-001-0000", -9)
    world.turn()
    assert len(world.running("worker-001-0000")) == 1


def kill_coordinator(world: World) -> int:
    """It dies, and this many turns pass without one."""
    (name,) = world.running("coordinator-")
    world.children[name] = replace(world.children[name], running=False, exit_code=-9)
    turns = 0
    world.turn()
    while not world.running("coordinator-"):
        world.turn()
        turns += 1
    return turns


def test_a_coordinator_that_dies_at_its_start_is_waited_for_longer_and_longer():
    world = running_world()
    assert [kill_coordinator(world) for _ in range(6)] == [0, 0, 0, 0, 2, 4]


def test_a_coordinator_that_a_step_was_told_to_is_replaced_at_once_however_often_it_dies():
    world = running_world()
    waits = []
    for step in range(20, 40):
        world.report(step, 10)
        world.turn()
        waits.append(kill_coordinator(world))
    assert waits == [0] * 20
