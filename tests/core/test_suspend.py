"""A job that is to be suspended saves first, whatever happens meanwhile, and goes on from there."""

from __future__ import annotations

from builders import World, job, running_world

from sonoforge_operator.api import Workers
from sonoforge_operator.observed import ChildFact
from sonoforge_trainer.contract import Activity, Progress, Termination

LEFT = Termination(cause="terminated", final=True)
"""What a worker says that was asked to save and leave."""


def to_be_suspended(**spec: object) -> World:
    """A run at step 15 whose newest checkpoint is of step 10, on the pass that finds it is to be suspended."""
    world = World()
    world.turn()
    world.report(10, 10)
    world.turn()
    world.report(15, 10)
    world.turn()
    world.file = job(suspend=True, **spec)
    world.turn()
    return world


def leave(world: World, step: int = 19) -> None:
    """The nodes do as they were asked."""
    world.report(step, 10, step, activity=Activity.STOPPED)
    world.end("worker-", 143, LEFT)


def test_suspending_saves_first_then_releases_the_workers_and_unsuspending_brings_them_back():
    world = to_be_suspended()
    (request,) = world.last.requests
    assert request.kind == "stop"
    for step in (16, 17, 18):
        world.report(step, 10)
        world.turn()
        assert len(world.running("worker-")) == 2
        assert world.last.requests == (request,), "the same, however often it is asked"
    assert world.status.phase == "Running"
    suspended = world.status.condition("Suspended")
    assert (suspended.status, suspended.reason) == ("False", "Saving")
    world.report(19, 10, activity=Activity.CHECKPOINTING)
    world.turn(3600)
    assert len(world.running("worker-")) == 2, "a save takes as long as it takes"
    assert world.status.attempt == 1

    leave(world)
    world.turn()
    world.turn()
    assert world.last.requests == ()
    assert world.children.keys().isdisjoint(world.started[:2])
    assert (world.status.phase, world.status.durable_step) == ("Suspended", 19)
    assert [e for e in world.events if e.startswith("Suspend")] == ["Suspending", "Suspended"]
    world.file = job()
    world.turn()
    assert len(world.running("worker-")) == 2
    assert (world.status.attempt, world.status.restarts, world.status.lost_steps) == (2, {}, 0)


def test_suspending_is_asked_again_of_a_coordinator_that_took_the_place_of_another():
    world = to_be_suspended()
    (request,) = world.last.requests
    world.end("coordinator-", None)
    world.progress = None
    world.turn()
    assert world.running("coordinator-") == ["coordinator-001"]
    assert world.last.requests == (), "nobody would hear it"
    world.report(17, 10)
    world.turn()
    assert world.last.requests == (request,)


def test_suspending_is_asked_of_every_process_group_that_forms_meanwhile():
    """A group whose processes died inside their pods knows nothing of what another one was asked."""
    world = to_be_suspended()
    (first,) = world.last.requests
    world.report(16, 10, attempt="another")
    world.turn()
    (second,) = world.last.requests
    assert first.id != second.id
    world.turn()
    assert world.last.requests == (second,)


def test_suspending_while_the_coordinator_is_silent_waits_until_it_can_be_asked():
    world = World()
    world.turn()
    world.report(10, 10)
    world.turn()
    world.progress = None
    world.turn(200)
    world.file = job(suspend=True)
    world.turn()
    world.turn(200)
    assert len(world.running("worker-")) == 2, "what was saved when it was heard last says nothing"
    assert "are to be asked" in world.status.condition("Suspended").message
    for step in range(69, 80):
        world.report(step, 10, 60)
        world.turn(20)
        (request,) = world.last.requests
        assert request.kind == "stop"
        assert len(world.running("worker-")) == 2, "it has its time from when it was asked"


def test_suspending_does_not_wait_for_a_group_that_lost_what_it_did_and_counts_why():
    world = to_be_suspended()
    for index, name in enumerate(world.running("worker-")):
        said = Termination(cause="hardware", message="Xid 79")
        world.children[name] = ChildFact(
            name=name, running=False, exit_code=74, termination=said, node=f"node-{index}", identity=f"pod-{index}"
        )
    for _ in range(3):
        world.turn()
    assert world.running("worker-") == []
    assert world.status.phase == "Suspended"
    assert world.status.restarts == {"hardware": 1}
    assert {e.name for e in world.status.excluded} == {"node-0", "node-1"}


def test_suspending_waits_for_no_group_that_did_nothing_yet():
    world = World(file=job(suspend=True))
    world.turn()
    assert world.started == []
    world = World()
    world.turn()
    world.file = job(suspend=True)
    world.turn()
    assert world.running("worker-") == []
    assert world.last.requests == ()


def test_suspending_waits_though_a_node_has_just_joined():
    world = to_be_suspended()
    newest = world.running("worker-")[1]
    world.children[newest] = ChildFact(name=newest, running=True, started=world.now + 10)
    world.turn()
    assert len(world.running("worker-")) == 2
    assert len(world.last.requests) == 1


def test_suspending_and_resizing_at_once_saves_first_and_comes_back_in_the_new_size():
    world = to_be_suspended(workers=Workers(min_nodes=1, max_nodes=1))
    assert len(world.running("worker-")) == 2
    assert len(world.last.requests) == 1
    leave(world)
    world.turn()
    world.turn()
    assert (world.status.phase, world.status.attempt) == ("Suspended", 1)
    world.file = job(workers=Workers(min_nodes=1, max_nodes=1))
    for _ in range(3):
        world.turn()
    assert len(world.running("worker-")) == 1


def test_suspending_waits_five_minutes_for_nodes_that_do_not_leave():
    world = to_be_suspended()
    for step in range(16, 31):
        world.report(step, 10)
        world.turn(20)
    assert len(world.running("worker-")) == 2
    for step in (60, 61):
        world.report(step, 10)
        world.turn(20)
    assert world.running("worker-") == []
    assert "Suspended" in [e.reason for e in world.last.events if e.warning]


def test_suspending_gives_a_group_of_long_steps_time_to_agree():
    world = to_be_suspended()
    for step in range(16, 40):
        world.report(step, 10, median_step_seconds=150.0)
        world.turn(60)
    assert len(world.running("worker-")) == 2
    assert world.status.phase == "Running"


def test_suspending_does_not_cut_a_long_save_for_one_answer_that_is_missing():
    world = to_be_suspended()
    world.report(16, 10, activity=Activity.CHECKPOINTING)
    world.turn(1000)
    for silence in (None, Progress()):
        world.progress = silence
        world.turn(2)
        assert len(world.running("worker-")) == 2
    assert world.status.attempt == 1


def test_a_wish_to_suspend_that_nobody_hears_is_said_to_be_unheard_and_forgotten_with_the_wish():
    world = World(deaf=True)
    world.turn()
    world.report(15, 10)
    world.turn()
    world.file = job(suspend=True)
    world.turn()
    world.report(16, 10)
    world.turn()
    assert "are to be asked" in world.status.condition("Suspended").message
    world.file = job()
    world.report(17, 10)
    world.turn()
    assert (world.status.saving, world.status.attempt) == (None, 1)


def test_a_wish_to_suspend_that_was_taken_back_takes_no_node_away_though_none_leaves():
    world = to_be_suspended()
    world.turn()
    world.file = job()
    for step in range(16, 60):
        world.report(step, 10)
        world.turn(20)
    assert (world.status.saving, world.status.attempt) == (None, 1)
    assert world.started.count("worker-001-0000-000") == 1


def test_of_nodes_that_left_as_asked_none_is_counted_however_the_others_end():
    world = to_be_suspended()
    first, second = world.running("worker-")
    world.report(19, 10, 19, activity=Activity.STOPPED)
    world.children[first] = ChildFact(name=first, running=False, exit_code=143, termination=LEFT)
    other = Termination(cause="collective", message="The attempt was ended by another node.")
    world.children[second] = ChildFact(name=second, running=False, exit_code=1, termination=other)
    for _ in range(3):
        world.turn()
    assert (world.status.phase, world.status.restarts, world.status.attempt) == ("Suspended", {}, 1)


def test_nodes_that_leave_for_a_request_nobody_remembers_begin_a_new_attempt_and_are_not_counted():
    world = World()
    world.turn()
    world.report(15, 10)
    world.turn()
    world.end("worker-", 143, LEFT)
    world.turn()
    world.turn()
    assert (world.status.attempt, world.status.restarts) == (2, {})
    assert len(world.running("worker-002-")) == 2


def test_a_size_that_is_asked_for_together_with_resuming_is_one_new_attempt():
    world = to_be_suspended()
    leave(world)
    for _ in range(3):
        world.turn()
    world.file = job(workers=Workers(min_nodes=1, max_nodes=1))
    world.turn()
    world.turn()
    assert (world.status.attempt, world.running("worker-")) == (2, ["worker-002-0000-000"])


def test_a_wish_to_suspend_that_is_taken_back_lets_the_nodes_leave_and_come_again():
    world = to_be_suspended()
    world.turn()
    world.file = job()
    world.report(16, 10)
    world.turn()
    assert len(world.last.requests) == 1, "they were asked, and may have saved already"
    leave(world)
    for _ in range(4):
        world.turn()
    assert (world.status.attempt, world.status.saving, world.status.restarts) == (2, None, {})
    assert len(world.running("worker-002-")) == 2


def test_a_wish_to_suspend_that_is_taken_back_before_anybody_was_asked_disturbs_nothing():
    world = World()
    world.turn()
    world.report(15, 10)
    world.turn()
    world.file = job(suspend=True)
    said, world.progress = world.progress, None
    world.turn()
    assert world.status.saving
    world.file, world.progress = job(), said
    world.report(16, 10)
    world.turn()
    assert (world.status.attempt, world.status.saving, world.last.requests) == (1, None, ())
    assert "suspended" not in world.status.goodput.lost_seconds


def test_a_job_that_ends_while_its_nodes_save_asks_nothing_more():
    world = to_be_suspended()
    world.end("worker-", 64, Termination(cause="config", message="x"))
    world.turn()
    assert world.status.outcome.reason == "Configuration"
    assert (world.status.saving, world.last.requests) == (None, ())


def test_every_wish_to_suspend_is_a_request_of_its_own():
    world = to_be_suspended()
    (first,) = world.last.requests
    leave(world)
    for _ in range(3):
        world.turn()
    world.file = job()
    world.turn()
    world.report(25, 10, 19)
    world.turn()
    world.file = job(suspend=True)
    world.turn()
    (second,) = world.last.requests
    assert first.id != second.id


def test_suspending_does_not_count_the_coordinator_as_lost():
    world = running_world()
    world.file = job(suspend=True)
    world.turn()
    world.end("worker-", 143, LEFT)
    for _ in range(2):
        world.turn()
    if world.running("coordinator-"):
        world.end("coordinator-", 0)
    world.turn()
    world.file = job()
    world.turn()
    assert world.status.restarts == {}
    assert world.running("coordinator-") == ["coordinator-000"]
