"""Single incidents of a run that once lost work, did it twice, or told something that was not true."""

from __future__ import annotations

from dataclasses import replace

from builders import World, checkpoint, ended, job, retained, running_world

from sonoforge_trainer.contract import Activity, Progress, Termination

HOURS = 3600.0


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
