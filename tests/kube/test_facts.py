"""From objects of a cluster to facts: what a plan is told, whatever the objects hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import ended, pod, small_job, worker_job

from sonoforge_operator.cluster.facts import Objects, ended_unheard, facts, pod_fact, unanswered
from sonoforge_operator.rules import classify
from sonoforge_operator.status import JobStatus

T0 = 1767225600.0  # 2026-01-01T00:00:00Z
CREATING = {"waiting": {"reason": "ContainerCreating"}}


def fact_of(document, now=T0 + 60):
    return pod_fact(document, "worker", now)


@pytest.mark.parametrize(
    ("document", "cause", "message"),
    [
        (pod("j", phase="Failed", state=ended(1)), "application", "exit code 1"),
        (pod("j", phase="Failed", state=ended(137)), "infrastructure", "the process was killed"),
        (
            pod("j", phase="Failed", state=ended(137, reason="ContainerStatusUnknown")),
            "infrastructure",
            "ContainerStatusUnknown on node-a",
        ),
        (pod("j", phase="Failed", state=ended(255, reason="Unknown")), "infrastructure", "Unknown on node-a"),
        (
            pod("j", phase="Failed", state=ended(137, {"cause": "application", "message": "x"})),
            "application",
            "application: x",
        ),
        (pod("j", phase="Failed", state=ended(137, reason="OOMKilled")), "memory", "OOMKilled on node-a"),
        (pod("j", phase="Failed", state=ended(143)), "infrastructure", "exit code 143"),
        (
            pod("j", phase="Failed", state=ended(64, {"cause": "config", "message": "lower it"})),
            "config",
            "config: lower it",
        ),
        (
            pod(
                "j",
                phase="Failed",
                state=ended(1, {"cause": "application", "message": "x"}),
                conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}],
            ),
            "infrastructure",
            "the pod was taken away: PreemptionByScheduler",
        ),
        (pod("j", phase="Failed", state={}, reason="OutOfcpu"), "infrastructure", "the process was killed"),
        (
            pod("j", phase="Failed", state={}, reason="OutOfnvidia.com/gpu"),
            "hardware",
            "OutOfnvidia.com/gpu on node-a",
        ),
        (pod("j", phase="Failed", state={}, reason="OutOfamd.com/gpu"), "hardware", "OutOfamd.com/gpu on node-a"),
        (
            pod("j", phase="Failed", state=ended(74, {"cause": "hardware", "message": "The GPU failed: XID 79."})),
            "hardware",
            "hardware: The GPU failed: XID 79.",
        ),
        (pod("j", phase="Failed", state=ended(74)), "hardware", "exit code 74"),
        (
            pod("j", phase="Failed", state={}, reason="UnexpectedAdmissionError"),
            "hardware",
            "UnexpectedAdmissionError on node-a",
        ),
        (pod("j", phase="Failed", state={}, reason="Evicted"), "infrastructure", "Evicted on node-a"),
        (pod("j", phase="Succeeded", state=ended(0, reason="Completed")), "finished", "exit code 0"),
    ],
)
def test_the_end_of_a_pod_is_classed_by_evidence_in_order(document, cause, message):
    """Pod conditions first, then what the platform says, then the message, then the exit code; never 137 alone."""
    failure = classify(fact_of(document))
    assert (failure.cause, failure.message) == (cause, message)


@pytest.mark.parametrize(
    ("document", "waiting"),
    [
        (pod("j"), ""),
        (pod("j", phase="Pending", state={"waiting": {"reason": "ErrImagePull", "message": "no such"}}), "ImagePull"),
        (
            pod("j", phase="Pending", state={"waiting": {"reason": "CreateContainerConfigError"}}),
            "ContainerConfig",
        ),
        (
            pod(
                "j",
                phase="Pending",
                state={},
                conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}],
            ),
            "Unschedulable",
        ),
        (
            pod(
                "j",
                phase="Pending",
                state={},
                conditions=[{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}],
            ),
            "WaitingForQueue",
        ),
        (pod("j", phase="Pending", state={"waiting": {"reason": "ContainerCreating"}}), "Starting"),
    ],
)
def test_a_pod_that_does_not_run_says_why(document, waiting):
    fact = fact_of(document)
    assert (fact.running, fact.waiting) == (True, waiting)


def test_a_pod_on_a_dead_node_counts_as_lost_once_its_time_to_end_is_over():
    """kubeflow/trainer #2072: Terminating for ever."""
    document = pod("j", deleted="2026-01-01T00:01:00Z")
    assert fact_of(document, T0 + 70).running
    assert not unanswered(document, T0 + 70)
    late = fact_of(document, T0 + 80)
    assert (late.running, late.disruption) == (False, "NodeUnreachable")
    assert classify(late).cause == "infrastructure"
    assert unanswered(document, T0 + 80)


def test_of_the_pods_of_an_index_the_first_uncounted_end_is_told_then_the_newest():
    job = worker_job(attempt=2)
    first = pod("job-1", 0, uid="a", phase="Failed", state=ended(143))
    second = pod("job-1", 0, uid="b", phase="Failed", state=ended(1), created="2026-01-01T00:00:10Z")
    third = pod("job-1", 0, uid="c", created="2026-01-01T00:00:20Z")
    objects = Objects(jobs=(job,), pods=(third, first, second))
    status = JobStatus(attempt=2)
    assert facts(objects, status, T0)["worker-002-0000-000"].identity == "a"
    counted = status.model_copy(update={"worker_deaths": (1,), "worker_lost": ("a",)})
    assert facts(objects, counted, T0)["worker-002-0000-001"].identity == "b"
    counted = counted.model_copy(update={"worker_deaths": (2,), "worker_lost": ("b",)})
    assert facts(objects, counted, T0)["worker-002-0000-002"].running
    gone = Objects(jobs=(job,), pods=(third,))
    assert facts(gone, counted, T0)["worker-002-0000-002"].identity == "c"


def test_a_pod_that_is_leaving_is_one_loss_though_its_successor_is_there_before_its_end():
    """A Job makes the next pod when one is deleted, not when it has ended."""
    leaving = pod("job-1", 0, uid="a", deleted="2026-01-01T00:02:00Z")
    left = pod("job-1", 0, uid="a", phase="Failed", state=ended(143), deleted="2026-01-01T00:02:00Z")
    waiting = pod("job-1", 0, uid="b", phase="Pending", state={}, created="2026-01-01T00:00:10Z")
    status = JobStatus()
    told = []
    for pods in ((leaving,), (leaving, waiting), (left, waiting)):
        fact = facts(Objects((worker_job(),), pods), status, T0 + 20)["worker-001-0000-000"]
        told.append((fact.identity, fact.running))
    assert told == [("a", True), ("a", True), ("a", False)]
    counted = status.model_copy(update={"worker_deaths": (1,), "worker_lost": ("a",), "worker_lost_created": (T0,)})
    for pods in ((left, waiting), (waiting,)):
        assert facts(Objects((worker_job(),), pods), counted, T0 + 20)["worker-001-0000-001"].identity == "b"


def test_a_pod_that_was_counted_stays_counted_when_the_object_of_a_later_one_is_gone():
    """Evicted pods stay, drained ones go: the end of the evicted one is no news then."""
    evicted = pod("job-1", 0, uid="z", phase="Failed", state=ended(143))
    drained = pod("job-1", 0, uid="y", phase="Failed", state=ended(143), created="2026-01-01T00:00:10Z")
    healthy = pod("job-1", 0, uid="x", created="2026-01-01T00:00:20Z")
    status = JobStatus(worker_deaths=(2,), worker_lost=("y",), worker_lost_created=(T0 + 10,))
    for pods in ((evicted, drained, healthy), (evicted, healthy)):
        assert facts(Objects((worker_job(),), pods), status, T0)["worker-001-0000-002"].identity == "x"
    assert facts(Objects((worker_job(),), (evicted,)), status, T0) == {}


def test_a_counted_pod_without_a_successor_is_no_fact():
    status = JobStatus(worker_deaths=(1,), worker_lost=("a",))
    objects = Objects(jobs=(worker_job(),), pods=(pod("job-1", 0, uid="a", phase="Failed", state=ended(143)),))
    assert facts(objects, status, T0) == {}


def test_nodes_of_a_job_that_its_queue_holds_back_wait_for_it():
    found = facts(Objects(jobs=(worker_job(parallelism=2, suspend=True),)), JobStatus(), T0)
    assert {name: fact.waiting for name, fact in found.items()} == {
        "worker-001-0000-000": "WaitingForQueue",
        "worker-001-0001-000": "WaitingForQueue",
    }


def test_an_evaluation_whose_pod_is_gone_ended_as_its_job_says():
    for condition, code in (("Complete", 0), ("Failed", None)):
        found = facts(Objects(jobs=(small_job("eval-a-000", condition=condition),)), JobStatus(), T0)
        fact = found["eval-a-000"]
        assert (fact.running, fact.exit_code) == (False, code)
    assert facts(Objects(jobs=(small_job("eval-a-000"),)), JobStatus(), T0)["eval-a-000"].running


def test_unheard_is_a_job_that_is_over_and_whose_pod_is_not_known_to_have_ended():
    over = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    conditions = {"gone": "Complete", "failed": "Failed", "late": "Complete", "heard": "Complete", "runs": None}
    jobs = tuple(small_job(f"eval-{uid}-000", uid=uid, condition=c) for uid, c in conditions.items())
    pods = (pod("late", uid="a"), pod("heard", uid="b", phase="Succeeded", state=ended(0)), pod("runs", uid="c"))
    assert ended_unheard(Objects(jobs=(*jobs, worker_job() | over), pods=pods)) == {"gone", "failed", "late"}


@pytest.mark.parametrize(
    "held",
    [
        small_job("eval-a-000") | {"spec": {"suspend": True}},
        small_job("eval-a-000", condition="Suspended") | {"spec": {"suspend": False}},
    ],
    ids=["held", "just let go"],
)
def test_an_evaluation_that_its_queue_holds_back_waits_for_it(held):
    assert facts(Objects(jobs=(held,)), JobStatus(), T0)["eval-a-000"].waiting == "WaitingForQueue"


def test_what_waited_for_a_place_has_the_whole_time_to_start_once_it_has_one():
    placed = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T02:00:00Z"}
    assert fact_of(pod("j", phase="Pending", state=CREATING, conditions=[placed]), T0 + 7230).started == T0 + 7200
    refused = placed | {"status": "False"}
    assert fact_of(pod("j", phase="Pending", state=CREATING, conditions=[refused]), T0 + 7230).started == T0
    admitted = small_job("eval-a-000")
    admitted["status"]["startTime"] = "2026-01-01T02:00:00Z"
    assert facts(Objects(jobs=(admitted,)), JobStatus(), T0 + 7230)["eval-a-000"].started == T0 + 7200


def test_the_successor_of_a_counted_pod_may_be_as_old_as_it_was():
    """Times have whole seconds, and the object of the one that was counted is gone."""
    successor = pod("job-1", 0, uid="a")
    status = JobStatus(worker_deaths=(1,), worker_lost=("b",), worker_lost_created=(T0,))
    assert facts(Objects((worker_job(),), (successor,)), status, T0)["worker-001-0000-001"].identity == "a"


@pytest.mark.parametrize(
    "labels",
    [
        {"sonoforge.dev/part": "worker", "sonoforge.dev/attempt": "none"},
        {"sonoforge.dev/part": "worker", "sonoforge.dev/attempt": "0"},
        {"sonoforge.dev/part": "worker"},
        {"sonoforge.dev/part": "evaluation", "sonoforge.dev/child": "worker-none-0"},
        {"sonoforge.dev/part": "evaluation", "sonoforge.dev/child": "worker-001-0000-000"},
    ],
)
def test_a_job_that_only_looks_like_workers_is_no_fact(labels):
    made = {"metadata": {"name": "forged", "uid": "j", "labels": labels}, "spec": {"suspend": True, "parallelism": 2}}
    assert facts(Objects(jobs=(made,), pods=(pod("j", 0),)), JobStatus(), T0) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KEYS = (
    "phase",
    "reason",
    "conditions",
    "containerStatuses",
    "deletionTimestamp",
    "creationTimestamp",
    "labels",
    "uid",
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "metadata": st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=4), JSON, max_size=5) | JSON,
            "spec": JSON,
            "status": st.dictionaries(st.sampled_from(_KEYS), JSON, max_size=5) | JSON,
        },
    ),
    st.sampled_from(["worker", "evaluation"]),
)
def test_whatever_a_pod_or_a_job_holds_there_is_an_answer(document, part):
    labels = {"sonoforge.dev/part": part, "sonoforge.dev/child": "x", "sonoforge.dev/attempt": "1"}
    metadata = document.get("metadata")
    job = {**document, "metadata": {**(metadata if isinstance(metadata, dict) else {}), "labels": labels}}
    found = facts(Objects(jobs=(job,), pods=(document,), deployments=(document,)), JobStatus(), T0)
    for fact in found.values():
        classify(fact)
