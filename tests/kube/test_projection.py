"""What a person sees of a job: true also where a job is refused, stalled or silent."""

from __future__ import annotations

from objects import cluster_job

from sonoforge_operator.cluster.projection import job_document, rejected_document
from sonoforge_operator.observed import ChildFact, Observed
from sonoforge_operator.plan import plan
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import Activity, Progress

T0 = 1767225600.0  # 2026-01-01T00:00:00Z
CONDITIONS = ["Accepted", "Queued", "Scheduled", "Rendezvoused", "Training", "Stalled", "Evaluating", "Collapsed"]
CONDITIONS += ["Suspended", "Succeeded", "Failed"]


def refused(status: dict | None, now: float = T0 + 60) -> dict:
    manifest = {"metadata": {"name": "x", "generation": 2}, **({"status": status} if status else {})}
    return rejected_document(manifest, "RuntimeNotFound", "apply it", now)


def seen(document: dict) -> dict[str, tuple[str, str, str]]:
    return {c["type"]: (c["status"], c["reason"], c["lastTransitionTime"]) for c in document["conditions"]}


def test_a_job_that_is_refused_at_first_sight_has_every_condition():
    document = refused(None)
    found = seen(document)
    assert list(found) == CONDITIONS
    assert found.pop("Accepted") == ("False", "RuntimeNotFound", "2026-01-01T00:01:00Z")
    assert set(found.values()) == {("Unknown", "NotAccepted", "2026-01-01T00:01:00Z")}
    assert document["phase"] == "Pending"


def test_a_job_that_is_refused_while_it_runs_is_not_shown_as_running():
    """Its memory stays, and so does what was reached; how fast it goes now, nobody knows."""
    before = running(Progress(samples_per_second=50.0, **TRAINING), T0)
    assert (before["phase"], before["throughputText"]) == ("Running", "50.0/s")
    document = refused(before)
    assert (document["phase"], document["reason"]) == ("Pending", "RuntimeNotFound")
    assert seen(document)["Training"] == ("Unknown", "NotAccepted", "2026-01-01T00:01:00Z")
    assert (document["eta"], document["throughput"], document["throughputText"]) == ("", 0.0, "")
    assert (document["step"], document["record"]) == (before["step"], before["record"])
    again = refused(document, T0 + 120)
    assert again == document


def test_a_rate_and_the_time_left_are_told_only_while_the_run_trains():
    """Silent, it has none; stalled, it has none either."""
    said = Progress(samples_per_second=50.0, **TRAINING)
    document = running(said, T0)
    assert (document["phase"], document["throughputText"], document["eta"]) == ("Running", "50.0/s", "0m32s")
    silent = running(said, T0 + 3600)
    assert (silent["phase"], silent["reason"]) == ("Stalled", "Unreachable")
    stalled = running(said, T0 + 3600, answers=said)
    assert (stalled["phase"], stalled["reason"]) == ("Stalled", "Collective")
    for found in (silent, stalled):
        assert (found["throughput"], found["throughputText"], found["eta"]) == (0.0, "", "")
        assert found["step"] == 50


def test_the_queue_of_a_job_is_told_also_where_its_runtime_gives_it():
    assert cluster_job().file.job.spec.queue_name == ""
    assert running(Progress(**TRAINING), T0)["queue"] == "research"


TRAINING = {
    "attempt": "a",
    "activity": Activity.TRAINING,
    "updated": T0 + 1,
    "step": 50,
    "steps": 100,
    "samples": 1600,
    "step_time": T0 + 1,
    "world_size": 6,
    "median_step_seconds": 0.1,
}


def running(progress: Progress, later: float, answers: Progress | None = None) -> dict:
    """The document of a job with all its nodes, some time after it told its progress."""
    job = cluster_job()
    names = ("coordinator-000", *(f"worker-001-{index:04d}-000" for index in range(3)))
    nodes = {name: ChildFact(name, running=True, started=T0 - 60) for name in names}
    started = JobStatus(started=T0 - 60, attempt_started=T0 - 60)
    status = plan(job.file, Observed(started, nodes, progress), T0 + 2).status
    observed = Observed(status, nodes, progress if later == T0 else answers)
    if later != T0:
        status = plan(job.file, observed, later).status
    return job_document(job, status, observed)
