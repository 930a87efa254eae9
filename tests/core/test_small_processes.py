"""Evaluations, floors, listings and retention: tried again, given up, told, and never in the way of the job."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import JOB, World, checkpoint, ended, over, retained, running_world, said_scores

from sonoforge_operator.api import parse_job_file
from sonoforge_trainer.contract import Activity, Termination

HOURS = 3600.0


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
