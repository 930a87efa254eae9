"""The plan of a job: what exists when, what a failure leads to, and that nothing is lost or done twice."""

from __future__ import annotations

import pytest
from builders import World, checkpoint, job, over, said_scores

from sonoforge_operator.api import EvaluationPolicy, NameRef, RestartPolicy, Workers
from sonoforge_operator.api.job import NoProgressBudget
from sonoforge_trainer.contract import Activity, CheckpointConfig, Termination


def policy(**changes: object) -> EvaluationPolicy:
    base = {"suite_ref": NameRef(name="planes"), "best_by": "planes-knn/f1_macro", "retries": 1, "floors": False}
    return EvaluationPolicy.model_validate(base | changes)


def test_a_new_job_gets_a_coordinator_and_all_its_nodes():
    world = World()
    world.turn()
    assert world.started == ["coordinator-000", "worker-001-0000-000", "worker-001-0001-000"]
    assert world.status.phase == "Pending"


def test_the_whole_life_of_a_job():
    world = World()
    world.turn()
    world.report(10, 0)
    world.turn()
    assert world.status.phase == "Running"
    assert len(world.running("eval-")) == 1
    world.end("eval-", 0, said_scores(0.3))
    world.report(100, 0, 50, 100, activity=Activity.FINISHED)
    world.turn()
    assert world.status.phase == "Running", "the workers are about to leave: nothing is pending"
    world.end("worker-")
    for score in (0.5, 0.8):
        world.turn()
        world.end("eval-", 0, said_scores(score))
    world.turn()
    assert world.running("worker-") == []
    if world.running("retention-"):
        world.end("retention-")
    world.turn()
    assert world.status.phase == "Succeeded"
    assert world.status.best == checkpoint(100).id
    assert [c.score("planes-knn/f1_macro") for c in world.status.checkpoints] == [0.3, 0.5, 0.8]
    assert world.last is not None
    assert world.last.children == ()


def test_a_group_that_found_nothing_left_to_do_is_running_until_it_leaves():
    """Nobody heard the last report of the one before, so this one read the last checkpoint back, and did no step."""
    world = World()
    world.turn()
    world.now += 10
    world.report(100, 100, activity=Activity.STARTING, step_time=0.0)
    world.turn()
    assert world.status.phase == "Pending"
    world.now += 1
    world.report(100, 100, activity=Activity.FINISHED, step_time=0.0)
    world.turn()
    assert world.status.phase == "Running"


def test_a_finished_job_never_changes_again():
    world = World()
    world.turn()
    world.report(100, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("worker-")
    world.end("eval-", 0, said_scores(0.5))
    world.turn()
    world.turn()
    assert world.status.terminal
    before, started = world.status, list(world.started)
    world.progress = None
    world.turn(3600)
    assert world.status == before
    assert world.started == started


def test_a_lost_node_is_replaced_alone_and_the_others_are_told():
    world = World()
    world.turn()
    world.report(10)
    world.turn()
    world.end("worker-001-0001", -9)
    plan = world.turn()
    assert world.running("worker-") == ["worker-001-0000-000", "worker-001-0001-001"]
    assert [(r.kind, r.node, r.id) for r in plan.requests] == [("lost", "1", "worker-001-0001-000")]
    assert world.status.restarts == {"infrastructure": 1}


def test_an_application_error_restarts_the_whole_group_and_the_budget_ends_the_job():
    world = World()
    world.turn()
    said = Termination(cause="application", exception="KeyError", message="boom", step=7)
    for attempt in (2, 3):
        world.end(f"worker-{attempt - 1:03d}-0000", 1, said)
        world.turn()
        world.turn()
        assert world.running("worker-") == [f"worker-{attempt:03d}-0000-000", f"worker-{attempt:03d}-0001-000"]
    world.end("worker-003-0000", 1, said)
    world.turn()
    assert world.status.outcome is not None
    assert world.status.outcome.reason == "NoProgress"
    world.turn()
    assert world.running("worker-") == []


@pytest.mark.parametrize(("cause", "code", "reason"), [("data", 65, "Data"), ("storage", 69, "Storage")])
def test_damaged_data_and_storage_that_refuses_end_the_job_under_their_own_name(cause, code, reason):
    world = World()
    world.turn()
    for attempt in range(1, 5):
        assert world.status.outcome is None
        world.end(f"worker-{attempt:03d}-0000", code, Termination(cause=cause, message="look"))
        world.turn()
        world.turn(300)
    assert world.status.outcome.reason == reason


def strict() -> RestartPolicy:
    return RestartPolicy(no_progress=NoProgressBudget(max=1))


def test_a_group_that_lost_a_peer_after_a_new_checkpoint_is_not_told_that_nothing_moves():
    world = World(file=job(restart_policy=strict()))
    for attempt in (1, 2, 3):
        world.turn()
        world.report(10 * attempt, 10 * attempt)
        world.turn()
        world.end(f"worker-{attempt:03d}-0000", 1, Termination(cause="collective", message="a peer was lost"))
        world.turn()
    assert (world.status.outcome, world.status.attempt) == (None, 4)
    assert (world.status.restarts, world.status.restarts_without_progress) == ({"collective": 3}, 0)


def test_a_budget_that_is_lowered_later_is_not_spent_by_a_failure_that_does_not_add_to_it():
    world = World()
    world.turn()
    world.end("worker-001-0000", 1, Termination(cause="application", message="x"))
    world.turn()
    world.file = job(restart_policy=strict())
    world.turn()
    world.end("worker-002-0000", 1, Termination(cause="collective", message="a peer was lost"))
    world.turn()
    assert (world.status.outcome, world.status.attempt) == (None, 3)


def test_the_error_of_one_node_is_the_cause_and_not_that_the_others_lost_it():
    world = World()
    world.turn()
    world.end("worker-001-0000", 1, Termination(cause="collective", message="ended by another node"))
    world.end("worker-001-0001", 65, Termination(cause="data", message="s3://b/x is missing"))
    world.turn()
    assert world.status.restarts == {"data": 1}


def test_a_configuration_error_fails_the_job_at_once_with_its_message():
    world = World()
    world.turn()
    world.end("worker-001-0000", 64, Termination(cause="config", exception="ContractError", message="bad"))
    for _ in range(3):
        world.turn()
    assert world.status.phase == "Failed"
    assert world.status.condition("Failed").message == "ContractError: bad"


@pytest.mark.parametrize(("cause", "code", "reason"), [("memory", 71, "OutOfMemory"), ("not-finite", 76, "NotFinite")])
def test_memory_and_divergence_get_one_more_try(cause, code, reason):
    world = World()
    for attempt in (1, 2):
        world.turn()
        world.report(10 * attempt, 10 * attempt)
        world.turn()
        world.end(f"worker-{attempt:03d}-0000", code, Termination(cause=cause, message="x"))
    world.turn()
    assert world.status.outcome is not None
    assert world.status.outcome.reason == reason


def test_the_coordinator_is_replaced_and_the_workers_are_left_alone():
    world = World()
    world.turn()
    world.report(10)
    world.turn()
    world.end("coordinator-", -9)
    world.turn()
    assert world.running("coordinator-") == ["coordinator-001"]
    assert world.running("worker-") == ["worker-001-0000-000", "worker-001-0001-000"]


def test_workers_that_ended_well_before_anyone_saw_the_last_checkpoint_are_asked_again():
    world = World()
    world.turn()
    world.report(90, 50)
    world.turn()
    world.end("worker-")
    world.turn()
    assert world.running("worker-") == ["worker-002-0000-000", "worker-002-0001-000"]
    world.report(100, 50, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("worker-")
    world.turn()
    assert world.status.outcome is not None
    assert world.status.outcome.reason == "BudgetSpent"


def test_an_evaluation_that_was_killed_is_done_again_and_does_not_count_as_failed():
    world = World()
    world.turn()
    world.report(10, 0)
    world.turn()
    for _ in range(5):
        world.end("eval-", -9)
        world.turn()
        world.turn()
    world.end("eval-", 0, said_scores(0.4))
    world.turn()
    evaluation = world.status.checkpoints[0].evaluations[0]
    assert (evaluation.phase, evaluation.scores["planes-knn/f1_macro"].value) == ("Succeeded", 0.4)


def test_an_evaluation_that_keeps_failing_is_marked_and_training_goes_on():
    world = World()
    world.turn()
    world.report(10, 0)
    world.turn()
    for _ in range(2):
        world.end("eval-", 65, Termination(cause="data", message="leak between splits"))
        world.turn()
        world.turn()
    evaluation = world.status.checkpoints[0].evaluations[0]
    assert (evaluation.phase, evaluation.reason) == ("Failed", "data: leak between splits")
    assert len(world.running("worker-")) == 2


def test_only_as_many_evaluations_run_as_the_policy_allows():
    world = World(file=job(evaluation=policy(parallel=2)))
    world.turn()
    world.report(40, 0, 10, 20, 30)
    world.turn()
    assert len(world.running("eval-")) == 2


def test_a_job_does_not_end_before_its_last_checkpoint_has_scores():
    world = over(World())
    assert not world.status.terminal
    assert world.status.phase == "Evaluating"


def test_after_the_training_no_node_is_pending_while_storage_is_listed():
    world = World()
    world.turn()
    world.report(100, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("eval-", 0, said_scores(0.5))
    world.end("worker-")
    world.turn()  # this starts the listing, which the next turn answers
    assert world.running("inventory-") == ["inventory-000-000"]
    assert all(c.evaluated for c in world.status.checkpoints)
    assert world.status.phase == "Evaluating"
    scheduled = world.status.condition("Scheduled")
    assert (scheduled.reason, scheduled.message) == ("Over", "0 nodes run, none is wanted any more")


def test_scores_that_stop_rising_stop_the_job_and_the_checkpoint_made_on_leaving_is_evaluated():
    world = World(file=job(evaluation=policy(stop_after_no_gain=2)))
    world.turn()
    world.report(30, 0, 10, 20)
    for score in (0.5, 0.4, 0.4):
        world.turn()
        world.end("eval-", 0, said_scores(score))
    world.turn()
    assert world.status.outcome is not None
    assert world.status.outcome.reason == "NoGain"
    assert world.running("worker-") == []
    assert world.running("coordinator-") == ["coordinator-000"]
    world.report(33, 0, 10, 20, 33, activity=Activity.STOPPED)
    world.turn()
    assert len(world.running("eval-")) == 1
    world.end("eval-", 0, said_scores(0.4))
    for _ in range(3):
        world.turn()
        if world.running("retention-"):
            world.end("retention-")
    assert world.status.phase == "Succeeded"
    assert world.status.checkpoints[-1].ref.step == 33


def test_a_run_that_stops_stepping_is_started_over_as_a_new_attempt():
    world = World()
    world.turn()
    world.report(10, 10)
    world.turn()
    world.turn(59)
    assert world.status.attempt == 1
    world.turn(10)
    assert world.status.attempt == 2
    assert world.status.restarts == {"stall": 1}
    assert "Restarted" in world.events


def test_a_new_size_starts_a_new_attempt_once_the_old_one_has_saved_and_left():
    world = World(keep_unwanted="worker-001")
    world.turn()
    world.report(10, 10)
    world.turn()
    world.file = job(workers=Workers(min_nodes=1, max_nodes=3))
    plan = world.turn()
    assert world.running("worker-002") == []
    assert plan.kill == frozenset()
    world.end("worker-001", 143)
    world.keep_unwanted = ""
    world.turn()
    world.turn()
    assert world.running("worker-") == [f"worker-002-{i:04d}-000" for i in range(3)]
    assert world.status.restarts == {}


def test_what_is_left_of_a_failed_attempt_is_killed_and_not_asked_to_save():
    world = World(keep_unwanted="worker-001")
    world.turn()
    world.end("worker-001-0000", 1, Termination(cause="application", message="x"))
    plan = world.turn()
    assert "worker-001-0001-000" in plan.kill


def test_a_run_that_says_it_trains_but_does_not_step_is_not_shown_as_running():
    world = World()
    world.turn()
    world.report(0, step_time=0.0)
    world.turn()
    assert world.status.phase == "Pending"


def test_steps_done_again_are_counted():
    world = World()
    world.turn()
    world.report(37, 30)
    world.turn()
    world.report(31, 30, attempt="next", restored_step=30)
    world.turn()
    assert world.status.lost_steps == 7


def test_retention_keeps_the_newest_the_best_and_what_waits_for_scores():
    config = CheckpointConfig(uri="s3://b/run", every_samples=320, keep_last=1, keep_best=1)
    world = World(file=job(checkpoints=config, evaluation=policy(parallel=9)))
    world.turn()
    world.report(40, 0, 10, 20, 30)
    world.turn()
    for name, score in zip(world.running("eval-")[:3], (0.1, 0.9, 0.2), strict=True):
        world.end(name, 0, said_scores(score))
    world.turn()
    best = world.status.best
    retention = [c for c in world.last.children if c.kind == "retention"]
    assert len(retention) == 1
    doomed = set(retention[0].prune)
    assert best not in doomed
    assert checkpoint(30).id not in doomed
    assert len(doomed) in (1, 2)
    world.end("retention-")
    world.turn()
    assert {c.ref.id for c in world.status.checkpoints if c.pruned} == doomed
    assert len(world.status.checkpoints) == 4


def test_every_condition_is_always_present():
    world = World()
    for _ in range(3):
        world.turn()
        assert [c.type for c in world.status.conditions] == [
            "Accepted",
            "Queued",
            "Scheduled",
            "Rendezvoused",
            "Training",
            "Stalled",
            "Evaluating",
            "Collapsed",
            "Suspended",
            "Succeeded",
            "Failed",
        ]


def test_a_pass_that_was_cut_after_the_status_was_written_is_finished_by_the_next():
    """The status says that a node was replaced, but the process was not started: the next pass starts it, once."""
    world = World()
    world.turn()
    world.report(10)
    world.turn()
    world.end("worker-001-0001", -9)
    dead = dict(world.children)
    world.turn()
    world.children = dead  # as if the runner had died between writing the status and touching the processes
    world.turn()
    assert world.running("worker-") == ["worker-001-0000-000", "worker-001-0001-001"]
    assert world.status.restarts == {"infrastructure": 1}
