"""Bugs that other operators shipped, each as a test named after its report.

The cluster is played by objects as an API server gives them; facts, rules and plan are the real ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from objects import cluster_job, documents, ended, file, pod, small_job, worker_job

from sonoforge_operator.api import Workers, parse_job, parse_runtime
from sonoforge_operator.cluster.facts import Objects, facts
from sonoforge_operator.cluster.freshness import STALE_SECONDS, Freshness
from sonoforge_operator.cluster.handlers import Wiring
from sonoforge_operator.cluster.jobs import Site
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.names import Key
from sonoforge_operator.cluster.pods import PodPlan, pod_template
from sonoforge_operator.cluster.probes import State
from sonoforge_operator.cluster.queue import Queue
from sonoforge_operator.cluster.reconciler import Reconciler
from sonoforge_operator.cluster.store import Store
from sonoforge_operator.observed import Observed, Plan
from sonoforge_operator.plan import plan
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import Activity, CheckpointRef, ContractError, Progress

T0 = 1767225600.0  # 2026-01-01T00:00:00Z, when the pods of the builders start
STEPS = file().job.spec.training.recipe.steps


def ref(step: int) -> CheckpointRef:
    return CheckpointRef(
        step=step,
        samples=step * 32,
        uri=f"s3://b/run/step-{step:010d}/attempt-a",
        manifest_digest=f"sha256:{step:064x}",
        created="2026-01-01T00:00:00Z",
    )


class Cluster:
    """What a cluster has of one job, and passes over it."""

    def __init__(self, **spec: object) -> None:
        made = file()
        changed = made.job.spec.model_copy(update=spec)
        self.file = made.model_copy(update={"job": made.job.model_copy(update={"spec": changed})})
        self.status = JobStatus()
        self.now = T0
        self.pods: list[dict] = []
        self.jobs: list[dict] = []
        self.coordinator = True
        self.progress: Progress | None = Progress()
        self.events: list[str] = []

    def turn(self, seconds: float = 1.0) -> Plan:
        """One pass, some seconds later."""
        self.now += seconds
        deployments = ({"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}},) if self.coordinator else ()
        objects = Objects(tuple(self.jobs), tuple(self.pods), deployments)
        found = facts(objects, self.status, self.now)
        decided = plan(self.file, Observed(self.status, found, self.progress), self.now)
        self.status = decided.status
        self.events += [event.reason for event in decided.events]
        return decided

    def start(self, attempt: int = 1) -> None:
        """The Job of an attempt, with a running pod for every node."""
        uid = f"job-{attempt}"
        self.jobs = [j for j in self.jobs if j["metadata"]["uid"] != uid] + [worker_job(attempt, uid=uid)]
        self.pods = [pod(uid, index, uid=f"{uid}-{index}") for index in range(3)]

    def end(self, index: int, code: int, said: dict | None = None, **more: object) -> None:
        """The pod of a node ends."""
        uid = self.pods[index]["metadata"]["ownerReferences"][0]["uid"]
        name = self.pods[index]["metadata"]["uid"]
        reason = str(more.pop("reason_of_container", "Error"))
        self.pods[index] = pod(uid, index, uid=name, phase="Failed", state=ended(code, said, reason), **more)

    def step(self, number: int, *checkpoints: int) -> None:
        """The run says that it made a step."""
        self.progress = Progress(
            attempt=f"a{self.status.attempt}",
            activity=Activity.TRAINING,
            updated=self.now + 0.5,
            step=number,
            steps=STEPS,
            step_time=self.now + 0.5,
            world_size=3,
            median_step_seconds=0.1,
            checkpoints=tuple(ref(step) for step in checkpoints),
        )

    def training(self, step: int = 10, *checkpoints: int) -> None:
        """Bring the run to a step."""
        self.turn()
        self.start()
        self.turn()
        self.step(step, *checkpoints)
        self.turn()
        assert self.status.phase == "Running"


def test_kubeflow_trainer_2045_out_of_memory_is_no_restart_loop():
    """A worker that is killed for its memory starts over once, then the job fails and says which memory."""
    cluster = Cluster()
    cluster.training(10, 0)
    cluster.end(0, 137, reason_of_container="OOMKilled")
    cluster.turn()
    assert (cluster.status.attempt, cluster.status.phase) == (2, "Pending")
    cluster.start(2)
    cluster.turn()
    cluster.end(1, 137, reason_of_container="OOMKilled")
    cluster.turn()
    assert cluster.status.outcome is not None
    assert (cluster.status.outcome.result, cluster.status.outcome.reason) == ("Failed", "OutOfMemory")
    assert "OOMKilled" in cluster.status.outcome.message


def test_kubeflow_trainer_2044_an_error_that_no_retry_can_help_is_not_shown_as_restarting():
    cluster = Cluster()
    cluster.training()
    cluster.end(2, 64, {"cause": "config", "message": "lower virtualRanks"})
    decided = cluster.turn()
    assert cluster.status.outcome is not None
    assert cluster.status.outcome.reason == "Configuration"
    assert [child for child in decided.children if child.kind == "worker"] == []
    assert cluster.status.attempt == 1


def test_kubeflow_trainer_2072_a_pod_on_a_dead_node_does_not_hold_the_job_up():
    """It is Terminating for ever; its node was lost all the same."""
    cluster = Cluster()
    cluster.training()
    stuck = cluster.pods[1]
    stuck["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:10Z"
    cluster.step(11)
    cluster.turn(60)
    assert cluster.status.restarts == {"infrastructure": 1}
    assert cluster.status.worker_lost[1] == stuck["metadata"]["uid"]
    cluster.pods.append(pod("job-1", 1, uid="fresh", created="2026-01-01T00:00:40Z"))
    cluster.step(12)
    cluster.turn()
    assert (cluster.status.phase, cluster.status.attempt) == ("Running", 1)


def test_kubeflow_trainer_3666_and_2713_the_state_is_neither_wrong_nor_missing():
    """Pending before pods run, Running only while it steps, Suspended only while it is, Running again after."""
    cluster = Cluster()
    cluster.turn()
    assert cluster.status.phase == "Pending"
    cluster.training()
    spec = cluster.file.job.spec
    cluster.file = Cluster(suspend=True).file
    cluster.turn()
    assert cluster.status.phase == "Running"  # the pods are asked to save and leave
    cluster.end(0, 143, {"cause": "terminated", "final": True})
    cluster.turn()
    assert cluster.status.phase == "Running"  # the others leave
    cluster.pods = []
    cluster.turn()
    assert cluster.status.phase == "Suspended"
    cluster.file = Cluster(suspend=spec.suspend).file
    cluster.turn()
    assert (cluster.status.phase, cluster.status.attempt) == ("Pending", 2)
    cluster.start(2)
    cluster.turn()
    cluster.step(11)
    cluster.turn()
    assert cluster.status.phase == "Running"


def test_kubeflow_trainer_1658_the_last_evaluation_is_not_lost():
    """The job is not over before its last checkpoint has its scores."""
    cluster = Cluster()
    cluster.training(STEPS, STEPS)
    cluster.pods = []
    cluster.progress = replace_activity(cluster.progress)
    decided = cluster.turn()
    (evaluation,) = [child for child in decided.children if child.kind == "evaluation"]
    for _ in range(5):
        decided = cluster.turn()
        assert cluster.status.phase != "Succeeded"
    cluster.jobs.append(small_job(evaluation.name, uid="e", condition="Complete"))
    scores = {"cause": "done", "result": {"knn/f1_macro": {"value": 0.5}, "knn/val_f1_macro": {"value": 0.4}}}
    cluster.pods.append(pod("e", phase="Succeeded", state=ended(0, scores, "Completed"), part="evaluation"))
    for _ in range(10):
        decided = cluster.turn()
        for child in decided.children:
            if child.kind in ("inventory", "floor", "retention"):
                known = {job["metadata"]["labels"].get("sonoforge.dev/child") for job in cluster.jobs}
                if child.name not in known:
                    cluster.jobs.append(small_job(child.name, uid=child.name, condition="Complete"))
                    result = {"checkpoints": []} if child.kind == "inventory" else {}
                    state = ended(0, {"cause": "done", "result": result}, "Completed")
                    cluster.pods.append(pod(child.name, phase="Succeeded", state=state, part="evaluation"))
    assert cluster.status.phase == "Succeeded"
    assert all(c.evaluated for c in cluster.status.checkpoints)


def test_kubeflow_trainer_1638_a_pod_that_dies_takes_neither_the_others_nor_the_rendezvous_with_it():
    """There one pod's death restarted all, or closed the rendezvous. Even that of node 0 costs one pod here."""
    cluster = Cluster()
    cluster.training(10, 0)
    cluster.end(0, 143)
    decided = cluster.turn()
    assert [request.node for request in decided.requests if request.kind == "lost"] == ["0"], "the others are told"
    assert (cluster.status.attempt, cluster.status.restarts, decided.kill) == (1, {"infrastructure": 1}, frozenset())
    assert len([child for child in decided.children if child.kind == "worker"]) == 3
    assert [child.kind for child in decided.children if child.kind == "coordinator"] == ["coordinator"]
    cluster.pods[0] = pod("job-1", 0, uid="again", created="2026-01-01T00:00:05Z")
    cluster.turn(5)
    cluster.step(11, 0)
    cluster.turn()
    assert (cluster.status.attempt, cluster.status.phase) == (1, "Running")


def test_pytorch_147064_survivors_that_wait_for_a_node_that_left_are_started_over_within_a_budget():
    """There the survivor hung, a node that came back found the rendezvous closed, and no limit on restarts held."""
    cluster = Cluster()
    cluster.training(10, 0)
    for attempt in (2, 3):
        cluster.end(1, 143)
        cluster.turn()
        cluster.pods[1] = pod(f"job-{attempt - 1}", 1, uid=f"back-{attempt}", created="2026-01-01T00:00:05Z")
        cluster.turn()
        cluster.turn(1900)
        assert (cluster.status.attempt, cluster.status.outcome) == (attempt, None)
        assert cluster.status.restarts["stall"] == attempt - 1
        cluster.start(attempt)
        cluster.turn()
    cluster.turn(1900)
    assert cluster.status.outcome is not None
    assert (cluster.status.outcome.result, cluster.status.outcome.reason) == ("Failed", "NoProgress")
    assert "Rendezvous" in cluster.status.outcome.message


def test_pytorch_111646_survivors_that_hang_in_a_collective_are_started_over():
    """All pods run, nothing fails, and no step is made: the group starts over from the checkpoint. There: 30 min."""
    cluster = Cluster()
    cluster.training(10, 0)
    cluster.turn(30)
    assert cluster.status.phase == "Running"
    decided = cluster.turn(60)
    assert (cluster.status.attempt, cluster.status.restarts) == (2, {"stall": 1})
    assert {name.split("-")[1] for name in decided.kill} == {"001"}
    assert [child for child in decided.children if child.kind == "worker"] == []  # not beside the old group


def test_volcano_4814_and_4815_a_restart_does_not_cause_the_next_one():
    """What the old group's pods say while they end is not news."""
    cluster = Cluster()
    cluster.training(10, 0)
    cluster.end(0, 1, {"cause": "application", "message": "boom"})
    cluster.turn()
    assert cluster.status.attempt == 2
    for index in (1, 2):
        cluster.end(index, 1, {"cause": "application", "message": "boom"})
        cluster.turn()
    old = cluster.pods
    cluster.start(2)
    cluster.pods += old
    for _ in range(5):
        cluster.turn()
    assert cluster.status.attempt == 2
    assert cluster.status.restarts == {"application": 1}


def test_volcano_2560_a_preemption_costs_no_retry():
    cluster = Cluster()
    cluster.training(10, 0)
    condition = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
    for number in range(50):
        cluster.end(0, 143, conditions=condition)
        cluster.turn()
        cluster.pods[0] = pod("job-1", 0, uid=f"again-{number}", created="2026-01-01T00:00:02Z")
        cluster.step(11 + number)
        cluster.turn()
    assert cluster.status.restarts == {"infrastructure": 50}
    assert (cluster.status.attempt, cluster.status.application_failures) == (1, ())
    assert cluster.status.phase == "Running"


def test_a_lost_pod_is_counted_once_also_when_the_object_of_the_next_lost_one_is_gone():
    cluster = Cluster()
    cluster.training(10, 0)
    cluster.end(0, 143, reason="Evicted")
    evicted = cluster.pods[0]
    cluster.turn()
    cluster.pods.append(pod("job-1", 0, uid="b", created="2026-01-01T00:00:10Z"))
    cluster.turn()
    cluster.pods[-1] = pod("job-1", 0, uid="b", phase="Failed", state=ended(143), created="2026-01-01T00:00:10Z")
    cluster.turn()
    cluster.pods[-1] = pod("job-1", 0, uid="c", created="2026-01-01T00:00:20Z")
    assert evicted in cluster.pods
    for _ in range(3):
        cluster.step(11)
        decided = cluster.turn()
        assert decided.requests == ()
    assert cluster.status.restarts == {"infrastructure": 2}
    assert cluster.events.count("WorkerReplaced") == 2


def test_kuberay_3860_a_job_whose_head_is_gone_is_not_running_for_ever():
    """Nobody answers any more: the status says so within seconds, and names it a stall in the end."""
    cluster = Cluster()
    cluster.training()
    cluster.progress = None
    cluster.turn(31)
    training = cluster.status.condition("Training")
    assert training is not None
    assert (training.status, training.reason) == ("Unknown", "Unreachable")
    cluster.turn(1900)
    assert cluster.status.phase == "Stalled"


def test_dask_kubernetes_968_two_passes_over_the_same_facts_say_the_same():
    """The phase follows from facts, never from which event came first."""
    cluster = Cluster()
    cluster.training()
    before = cluster.status
    objects = Objects(tuple(cluster.jobs), tuple(cluster.pods), ())
    found = facts(objects, before, cluster.now)
    first = plan(cluster.file, Observed(before, found, cluster.progress), cluster.now)
    again = plan(cluster.file, Observed(before, found, cluster.progress), cluster.now)
    assert first == again
    shuffled = facts(replace(objects, pods=tuple(reversed(objects.pods))), before, cluster.now)
    assert plan(cluster.file, Observed(before, shuffled, cluster.progress), cluster.now) == first


def test_cre_310_pods_that_cannot_be_scheduled_are_not_shown_as_running():
    """NVIDIA cluster-readiness-engine #310: Unschedulable for 7 hours while the job looked as if it ran."""
    cluster = Cluster()
    cluster.turn()
    cluster.start()
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    cluster.pods = [pod("job-1", i, uid=f"p{i}", phase="Pending", state={}, conditions=[condition]) for i in range(3)]
    cluster.turn()
    stalled = cluster.status.condition("Stalled")
    assert stalled is not None
    assert (cluster.status.phase, stalled.reason) == ("Stalled", "Unschedulable")
    assert "0/3 nodes" in stalled.message


def test_a_pod_that_starts_does_not_hide_one_that_cannot_be_scheduled():
    cluster = Cluster(workers=Workers(min_nodes=3, max_nodes=3))
    cluster.turn()
    cluster.start()
    creating = {"waiting": {"reason": "ContainerCreating"}}
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    cluster.pods[0] = pod("job-1", 0, uid="p0", phase="Pending", state=creating)
    cluster.pods[2] = pod("job-1", 2, uid="p2", phase="Pending", state={}, conditions=[condition])
    cluster.turn()
    stalled, scheduled = cluster.status.condition("Stalled"), cluster.status.condition("Scheduled")
    assert stalled is not None
    assert scheduled is not None
    assert (cluster.status.phase, stalled.reason, scheduled.reason) == ("Stalled", "Unschedulable", "Unschedulable")


def test_a_coordinator_whose_image_cannot_be_pulled_is_told_at_once_and_later_where_the_run_steps():
    pull = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    stuck = pod("deploy", uid="c", phase="Pending", state=pull, part="coordinator")
    cluster = Cluster()
    cluster.turn()
    cluster.start()
    cluster.pods.append(stuck)
    cluster.progress = None
    cluster.turn()
    stalled = cluster.status.condition("Stalled")
    assert stalled is not None
    assert (cluster.status.phase, stalled.reason) == ("Stalled", "ImagePull")
    assert stalled.message == "the coordinator does not run: no such image"
    cluster = Cluster()
    cluster.training()
    cluster.pods.append(stuck)
    cluster.progress = None
    cluster.turn()
    assert cluster.status.phase == "Running"
    cluster.turn(1900)
    stalled = cluster.status.condition("Stalled")
    assert stalled is not None
    assert (cluster.status.phase, stalled.reason, cluster.status.attempt) == ("Stalled", "ImagePull", 1)


def test_pods_that_start_are_pending_and_stalled_only_after_the_deadline():
    """A status that cries stall at every start is not read when there is one."""
    cluster = Cluster()
    cluster.turn()
    cluster.start()
    creating = {"waiting": {"reason": "ContainerCreating"}}
    cluster.pods = [pod("job-1", i, uid=f"p{i}", phase="Pending", state=creating) for i in range(3)]
    cluster.turn()
    assert cluster.status.phase == "Pending"
    cluster.turn(1801.0)
    stalled = cluster.status.condition("Stalled")
    assert stalled is not None
    assert (cluster.status.phase, stalled.reason) == ("Stalled", "Starting")


def test_ci_infra_1057_a_node_that_rejects_pods_is_avoided_by_the_next_attempt():
    """pytorch/ci-infra #1057: one lost GPU, and the node rejected 554 pods in 1 h 46 m."""
    cluster = Cluster()
    cluster.training(10, 0)
    cluster.pods[0] = pod("job-1", 0, uid="job-1-0", phase="Failed", state={}, reason="UnexpectedAdmissionError")
    cluster.turn()
    assert [node.name for node in cluster.status.excluded] == ["node-a"]
    assert (cluster.status.attempt, cluster.status.restarts) == (2, {"hardware": 1})
    assert cluster.status.outcome is None


def test_a_node_whose_gpu_failed_under_a_worker_is_avoided_and_the_others_are_not():
    """Its peers lost it in a collective. Only one of them is to blame."""
    cluster = Cluster()
    cluster.training(10, 0)
    for index, node in enumerate(("node-a", "node-b", "node-c")):
        cause = "hardware" if index == 1 else "collective"
        cluster.end(index, 74 if index == 1 else 1, {"cause": cause, "message": "XID 79"})
        cluster.pods[index]["spec"]["nodeName"] = node
    cluster.turn()
    assert [node.name for node in cluster.status.excluded] == ["node-b"]
    assert (cluster.status.attempt, cluster.status.restarts) == (2, {"hardware": 1})
    assert cluster.status.outcome is None


def test_kopf_980_an_operator_whose_watches_died_is_not_healthy():
    """A watch died for good with its session. Only what comes through a watch is a heartbeat."""
    now = [0.0]
    freshness = Freshness(None, Store(), ("n",), Metrics(), lambda kind, key: None, steady=lambda: now[0])  # type: ignore[arg-type]
    now[0] = STALE_SECONDS - 1
    assert freshness.fresh
    now[0] = STALE_SECONDS + 1
    assert not freshness.fresh
    freshness.beat()
    assert freshness.fresh


def test_kopf_1145_an_operator_that_works_on_and_watches_no_more_is_not_healthy():
    """Its passes are made in time, what they know is old. A process that lives proves nothing."""
    now, store, metrics = [0.0], Store(), Metrics()
    freshness = Freshness(None, store, ("n",), metrics, lambda kind, key: None, steady=lambda: now[0])  # type: ignore[arg-type]
    reconciler = Reconciler(None, store, None, Site(default_image="", operator_namespace="n"), metrics)  # type: ignore[arg-type]
    queue = Queue(clock=lambda: now[0])
    state = State(freshness, queue, reconciler, metrics, None, stuck_seconds=300.0, started=True)  # type: ignore[arg-type]
    assert state.healthy
    now[0] = STALE_SECONDS + 1
    assert state.stuck == 0.0
    assert not state.healthy


@pytest.mark.parametrize(
    "annotations",
    [{"sonoforge.dev/digest": "x" * 5000}, {"a": None}, None, [], "text", {"sonoforge.dev/request": "{"}],
)
def test_argo_cve_2026_40886_one_bad_annotation_stops_nothing(annotations):
    woken = []

    class Queue:
        def wake(self, key: Key, after: float = 0.0) -> None:
            woken.append(key)

    class Nobody:
        def keys_naming(self, kind: str, key: Key) -> list[Key]:
            return []

    from sonoforge_operator.cluster.api_client import BATCH_JOBS, JOBS, PODS

    wiring = Wiring(Store(), Queue(), Nobody())  # type: ignore[arg-type]
    for kind in (JOBS, PODS, BATCH_JOBS):
        metadata = {"name": "x", "namespace": "n", "uid": "u", "resourceVersion": "7", "annotations": annotations}
        wiring.take(kind, "ADDED", {"metadata": {**metadata, "labels": {"sonoforge.dev/job": "x"}}})
    assert set(woken) == {Key("n", "x")}


def test_argo_cve_2026_31892_a_job_cannot_write_a_part_of_a_pod():
    """A job names what it wants; there is no field in which a pod's would fit, and a runtime has none either."""
    job, runtime, _ = documents()
    for where, key in ((job["spec"], "podSpecPatch"), (job["spec"]["workers"], "hostNetwork")):
        where[key] = {"hostNetwork": True}
        with pytest.raises(ContractError, match="unknown key"):
            parse_job(job)
        del where[key]
    for key in ("securityContext", "hostPath", "env", "serviceAccountName"):
        runtime["spec"]["workers"][key] = "x"
        with pytest.raises(ContractError, match="unknown key"):
            parse_runtime(runtime)
        del runtime["spec"]["workers"][key]
    made = cluster_job()
    plan_of_pod = PodPlan("worker", ("true",), made.runtime.workers)
    spec = pod_template(plan_of_pod, made.runtime, "image", "base", {})["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "nodeName", "shareProcessNamespace"} & set(spec)


def replace_activity(progress: Progress | None) -> Progress:
    assert progress is not None
    return progress.model_copy(update={"activity": Activity.FINISHED, "updated": progress.updated + 1})
