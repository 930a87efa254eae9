"""Hostile input: whatever a spec, a status, an annotation, a pod or a coordinator holds, a pass has an answer.

In CI a share of the cases is drawn, the same in every run; `make fuzz` draws 10,000 of each.
"""

from __future__ import annotations

import asyncio
import copy
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from objects import documents, ended, file, pod, worker_job

from sonoforge_operator.api import JobFile
from sonoforge_operator.cluster.coordinators import Coordinators, believable
from sonoforge_operator.cluster.desired import ClusterJob
from sonoforge_operator.cluster.facts import Objects, facts
from sonoforge_operator.cluster.handlers import Wiring
from sonoforge_operator.cluster.jobs import RejectedError, Site, resolve
from sonoforge_operator.cluster.names import Key, Names
from sonoforge_operator.cluster.projection import checkpoint_document, job_document, rejected_document
from sonoforge_operator.cluster.reconciler import finished_at, time_to_live
from sonoforge_operator.cluster.record import UnreadableRecordError, recall, remember
from sonoforge_operator.cluster.store import Store
from sonoforge_operator.observed import Observed
from sonoforge_operator.plan import plan
from sonoforge_operator.resources import CheckpointSpec
from sonoforge_operator.status import JobStatus, Outcome, Saving
from sonoforge_trainer.contract import CheckpointRef, ContractError, Progress

_EXAMPLES = int(os.environ.get("SONOFORGE_FUZZ_EXAMPLES", "120"))
HOSTILE = settings(
    max_examples=_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
T0 = 1767225600.0  # 2026-01-01T00:00:00Z

SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["s3://b/x", "file:///x", "1h", "0s", "-1", "x" * 300, "2026-01-01T00:00:00Z", "9999999d"])
)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


class Digests(Coordinators):
    """Digests of tokens, without a connection."""

    def __init__(self) -> None:
        self._key = b"a key of the tests"


def paths(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in a document."""
    found = [at] if at else []
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in pairs:
        found += paths(value, (*at, key))
    return found


def damaged(document: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """A document with up to three of its values replaced by anything, or taken out, and a field that nobody knows."""
    made = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        places = [p for p in paths(made) if p[0] not in ("apiVersion", "kind") and p != ("metadata",)]
        *way, last = data.draw(st.sampled_from([p for p in places if p[:2] != ("metadata", "name")]))
        owner: Any = made
        for step in way:
            owner = owner[step]
        if data.draw(st.booleans()):
            owner[last] = data.draw(JSON)
        elif isinstance(owner, dict):
            owner.pop(last)
            owner[data.draw(st.text(min_size=1, max_size=6))] = data.draw(JSON)
    return made


def cluster(*manifests: dict[str, Any]) -> Store:
    store = Store()
    for manifest in manifests:
        metadata = manifest.get("metadata")
        place = {"namespace": "n", "uid": "u", "resourceVersion": "1"}
        known = {**place, **(metadata if isinstance(metadata, dict) else {}), "namespace": "n"}
        store.put(manifest["kind"], {**manifest, "metadata": known})
    return store


def prepared() -> list[dict[str, Any]]:
    made = documents()
    for manifest in made:
        manifest["metadata"]["namespace"] = "n"
    return made


@HOSTILE
@given(st.data())
def test_a_spec_is_taken_or_refused_with_a_reason_and_nothing_else_happens(data):
    """The three objects that people write, each with damage."""
    made = prepared()
    for number in data.draw(st.sets(st.integers(0, 2), min_size=1)):
        made[number] = damaged(made[number], data)
    store = cluster(*made)
    job = {**made[0], "metadata": {**prepared()[0]["metadata"], "generation": 1, "resourceVersion": "1"}}
    refused = None
    try:
        found = resolve(job, store, Digests(), Site("image", "operator"))
    except RejectedError as error:
        refused = error
    if refused is not None:
        document = rejected_document(job, refused.reason, refused.message, T0)
        assert document["phase"] in ("Invalid", "Pending")
        assert refused.message
        return
    decided = plan(found.file, Observed(JobStatus()), T0)
    job_document(found, decided.status, Observed(JobStatus()))


@HOSTILE
@given(st.data())
def test_a_status_is_read_or_refused_and_the_end_of_a_job_is_never_undone(data):
    good = JobStatus(uid="u", attempt=3, finished=T0, outcome=Outcome(result="Failed", reason="X", message=""))
    manifest = {
        "metadata": {"name": "x", "namespace": "n", "uid": "u"},
        "spec": {"ttlAfterFinished": data.draw(JSON)},
        "status": {"record": good.document(), "completionTime": "2026-01-01T00:00:00Z", "phase": "Failed"},
    }
    wild = damaged(manifest, data)
    try:
        status = recall(wild, [damaged({"metadata": {"name": "c"}, "spec": {}, "status": {}}, data)], file())
    except UnreadableRecordError:
        status = None
    if status is not None:
        decided = plan(file(), Observed(status), T0 + 10)
        if status.terminal:
            assert (decided.children, decided.status) == ((), status)
    finished = finished_at(wild)
    assert time_to_live(wild, finished) >= finished


def a_live_job() -> tuple[dict[str, Any], dict[str, Any]]:
    """A job that trains with floors and evaluations under way and checkpoints being deleted, and one of them."""
    job = live_job()
    said = Progress(updated=T0, step=30, steps=100, step_time=T0, world_size=3, attempt="a")
    observed = Observed(JobStatus(uid="u"), {}, said.model_copy(update={"checkpoints": (ref(10), ref(20), ref(30))}))
    status = plan(job.file, observed, T0).status
    done = [status.checkpoints[0].evaluations[0].model_copy(update={"phase": "Succeeded"})]
    checkpoint = status.checkpoints[0].model_copy(update={"evaluations": tuple(done)})
    floors = tuple(floor.model_copy(update={"phase": "Running"}) for floor in status.floors)
    assert floors
    status = status.model_copy(
        update={
            "floors": floors,
            "pruning": (ref(10).id,),
            "worker_deaths": (1, 0, 2),
            "worker_lost": ("a", "", "b"),
            "saving": Saving(since=T0, asked=T0, group="a"),
        }
    )
    spec = CheckpointSpec.of(ref(20), job="fetal.v2", job_uid="u").document()
    metadata = {"name": "x", "namespace": "n", "uid": "u"}
    return (
        {"metadata": metadata, "status": {"record": remember(status)}},
        {"metadata": {"name": "c"}, "spec": spec, "status": checkpoint_document(checkpoint, status, job.file)},
    )


def suspended(job: JobFile, wish: bool) -> JobFile:
    """The job, with or without the wish to suspend it."""
    spec = job.job.spec.model_copy(update={"suspend": wish})
    return job.model_copy(update={"job": job.job.model_copy(update={"spec": spec})})


def live_job() -> ClusterJob:
    made = prepared()
    return resolve({**made[0], "metadata": made[0]["metadata"]}, cluster(*made), Digests(), Site("image", "operator"))


def ref(step: int) -> CheckpointRef:
    return CheckpointRef(
        step=step,
        samples=step * 32,
        uri=f"s3://b/run/step-{step}/a",
        manifest_digest=f"sha256:{step:064x}",
        created="2026-01-01T00:00:00Z",
    )


@HOSTILE
@given(st.data(), st.booleans())
def test_the_record_of_a_job_that_runs_is_read_or_refused_and_a_pass_has_an_answer(data, with_checkpoint):
    """With damage to the record and the checkpoint, with one checkpoint or none, over several passes."""
    job = live_job()
    manifest, checkpoint = a_live_job()
    try:
        status = recall(damaged(manifest, data), [damaged(checkpoint, data)] if with_checkpoint else [], job.file)
    except UnreadableRecordError:
        return
    pods = tuple(pod("job-1", index, uid=f"p{index}") for index in range(3))
    for turn in range(3):
        now = T0 + 60.0 * turn
        found = facts(Objects((worker_job(status.attempt),), pods), status, now)
        said = status.progress if data.draw(st.booleans()) else None
        decided = plan(suspended(job.file, data.draw(st.booleans())), Observed(status, found, said), now)
        status = decided.status
        job_document(job, status, Observed(status, found, said))


ANYTHING = (None, True, 0, -1, 2**63, 1.5, 1e308, -1e308, "", "x" * 300, "9999999d", [], {}, [1], {"a": 1}, [None])


@pytest.mark.parametrize("what", ["record", "checkpoint", "progress", "pod", "worker job"])
def test_any_single_value_may_be_anything(what):
    """Every value of what is read back or observed, each replaced by each of these: what chance may take long to find.

    The passes go on from there, with the wish to suspend and without it.
    """
    record, checkpoint = a_live_job()
    wild = {
        "record": record["status"],
        "checkpoint": checkpoint,
        "progress": Progress(updated=T0, step=5, step_time=T0, attempt="a", checkpoints=(ref(10),)).document(),
        "pod": pod("job-1", 0, uid="p0", phase="Failed", state=ended(1)),
        "worker job": worker_job(1),
    }[what]
    job = live_job()
    for place in paths(wild):
        *way, last = place
        for anything in ANYTHING:
            changed = copy.deepcopy(wild)
            owner: Any = changed
            for step in way:
                owner = owner[step]
            owner[last] = anything
            world = {"record": record["status"], "checkpoint": checkpoint, "pod": None, "worker job": None}
            passes(job, world | {what: changed})


def passes(job: ClusterJob, world: dict[str, Any]) -> None:
    """Three passes over a job, two of them with the wish to suspend it."""
    manifest = {**a_live_job()[0], "status": world["record"]}
    try:
        status = recall(manifest, [world["checkpoint"]], job.file)
        said = Progress.parse(world["progress"]) if "progress" in world else status.progress
    except (UnreadableRecordError, ContractError):
        return
    pods = tuple(world["pod"] or pod("job-1", index, uid=f"p{index}") for index in range(2))
    workers = world["worker job"] or worker_job(status.attempt)
    for turn in range(3):
        now = T0 + 60.0 * turn
        found = facts(Objects((workers,), pods), status, now)
        observed = Observed(status, found, believable(said, job) if said and turn else None)
        status = plan(suspended(job.file, turn < 2), observed, now).status
        job_document(job, status, observed)


@HOSTILE
@given(st.data())
def test_pods_and_answers_that_lie_never_make_a_budget_negative_or_a_name_too_long(data):
    """Several passes over pods and progress with damage, each from the status of the one before."""
    job, status = file(), JobStatus()
    names = Names(Key("n", "fetal.v2"), "u")
    progress = Progress(updated=T0, step=5, steps=100, step_time=T0, world_size=2, attempt="a").document()
    for turn in range(data.draw(st.integers(1, 4))):
        pods = [
            damaged(pod("job-1", index, uid=f"p{index}-{turn}", phase="Failed", state=ended(1)), data)
            for index in range(data.draw(st.integers(0, 3)))
        ]
        now = T0 + 60.0 * turn
        found = facts(Objects((damaged(worker_job(status.attempt), data),), tuple(pods)), status, now)
        try:
            said = Progress.parse(damaged(progress, data))
        except ContractError:
            said = None
        before = status
        decided = plan(suspended(job, data.draw(st.booleans())), Observed(status, found, said), now)
        status = decided.status
        counts = [*status.restarts.values(), *status.worker_deaths, status.lost_steps, status.restarts_without_progress]
        assert min(counts, default=0) >= 0
        assert status.attempt >= before.attempt
        assert all(count >= before.restarts.get(cause, 0) for cause, count in status.restarts.items())
        assert len({child.name for child in decided.children}) == len(decided.children)
        for child in decided.children:
            name = names.worker_job(child.attempt) if child.kind == "worker" else names.child(child.name)
            assert len(name) <= 63
        if before.terminal:
            assert status == before


@HOSTILE
@given(st.data())
def test_an_answer_of_a_coordinator_is_believed_only_as_far_as_it_can_be_true(data):
    made = prepared()
    job = resolve({**made[0], "metadata": made[0]["metadata"]}, cluster(*made), Digests(), Site("image", "operator"))
    ref = {
        "step": 5,
        "samples": 160,
        "uri": "s3://b/run/step-5/a",
        "manifestDigest": f"sha256:{5:064x}",
        "created": "x",
    }
    said = {**Progress(updated=T0).document(), "checkpoints": [ref, damaged({"r": ref}, data).get("r")]}
    try:
        progress = Progress.parse(damaged(said, data))
    except ContractError:
        return
    for found in believable(progress, job).checkpoints:
        assert found.uri.startswith("s3://b/run/")
        assert 0 <= found.step <= job.file.job.spec.training.recipe.steps


@HOSTILE
@given(st.data())
def test_an_event_of_a_watch_wakes_at_most_its_own_job(data):
    woken: list[Key] = []

    class Queue:
        def wake(self, key: Key, after: float = 0.0) -> None:
            woken.append(key)

    class Nobody:
        def keys_naming(self, kind: str, key: Key) -> list[Key]:
            return []

    from sonoforge_operator.cluster.api_client import BATCH_JOBS, CHECKPOINTS, DEPLOYMENTS, JOBS, PODS

    wiring = Wiring(Store(), Queue(), Nobody())  # type: ignore[arg-type]
    base = pod("job-1", 0)
    base["metadata"] |= {"resourceVersion": "1", "annotations": {"a": "b"}, "name": "x"}
    for kind in (JOBS, PODS, BATCH_JOBS, DEPLOYMENTS, CHECKPOINTS):
        wild = damaged(base, data)
        metadata = wild.get("metadata")
        wild["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "name": "x", "namespace": "research"}
        for event in ("ADDED", "MODIFIED", "DELETED", None):
            wiring.take(kind, event, wild)
    assert {key.namespace for key in woken} <= {"research"}


def test_answers_that_are_no_progress_are_no_answer():
    """At the wire: a server that says anything but progress."""

    async def scenario() -> None:
        from aiohttp import web

        bodies = [b"", b"{", b"[]", b'{"step": "x"}', b'{"unknown": 1}', b"\xff\xfe", b"x" * (5 * 2**20)]

        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=bodies[int(request.match_info["n"])])

        app = web.Application()
        app.router.add_get("/{n}/progress", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        for number in range(len(bodies)):
            async with Coordinators(b"k" * 32, f"{host}/{number}") as visitor:
                assert await visitor.progress(Names(Key("n", "x"), "u")) is None
        await runner.cleanup()

    asyncio.run(scenario())
