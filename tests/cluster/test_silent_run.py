"""What takes time in a pass: a run that does not answer, a spec that changes meanwhile, a turn that comes late."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from components import wait_for
from control_plane import ControlPlane
from operators import apply_crds, grant, own_namespace
from test_life import JOB

from sonoforge_operator.cluster.api_client import DEPLOYMENTS, JOBS, PODS, Api
from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.freshness import Freshness
from sonoforge_operator.cluster.jobs import Site
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.names import LABEL_PART, Key
from sonoforge_operator.cluster.port import ClusterPort
from sonoforge_operator.cluster.reconciler import Reconciler
from sonoforge_operator.cluster.store import Store
from sonoforge_trainer.contract import Activity, Progress, Request


class LateReconciler(Reconciler):
    """Its clock can be told to jump while a pass waits for its turn."""

    late_seconds = 0.0
    _late = 0.0

    @asynccontextmanager
    async def _turn(self, timed: Any) -> AsyncIterator[None]:
        async with super()._turn(timed):
            self._late += self.late_seconds
            yield

    def now(self) -> float:
        return time.time() + self._late


@dataclass
class Silent:
    """An operator without watches, one turn, and a coordinator of the job `fetal` that says nothing until released.

    Then it says that the run trains and that a step has just ended.
    """

    reconciler: LateReconciler
    store: Store
    freshness: Freshness
    asked: asyncio.Event
    released: asyncio.Event
    fetal: Key
    taken: list[Request]
    """Requests that the coordinator took."""

    def call_ready(self, ready: int = 1) -> None:
        """Let the store say that the coordinator is ready, or that it is not."""
        (deployment,) = self.store.all(DEPLOYMENTS.name)
        self.store.put(DEPLOYMENTS.name, {**deployment, "status": {"readyReplicas": ready}})

    def place(self, part: str, node: str) -> None:
        """Let the store say that the pods of a part run on a node that nobody has, at addresses 10.0.0.1 and on."""
        pods = [pod for pod in self.store.all(PODS.name) if pod["metadata"]["labels"][LABEL_PART] == part]
        assert pods
        for number, pod in enumerate(pods, start=1):
            status = {**pod["status"], "phase": "Running", "podIP": f"10.0.0.{number}"}
            self.store.put(PODS.name, {**pod, "spec": {**pod["spec"], "nodeName": node}, "status": status})

    async def begin(self) -> asyncio.Future[float | None]:
        """A pass over the job that waits for its run."""
        await self.reconciler.reconcile(self.fetal)
        self.call_ready()
        waits = asyncio.ensure_future(self.reconciler.reconcile(self.fetal))
        await self.asked.wait()
        return waits


@asynccontextmanager
async def opened(
    control_plane: ControlPlane,
    namespace: str,
    *,
    seconds: float = 300,
    steady: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Silent]:
    asked, released = asyncio.Event(), asyncio.Event()
    taken: list[Request] = []

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await released.wait()
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            taken.append(Request.from_json(await reader.readexactly(size)))
        now = time.time()
        training = {"attempt": "a", "activity": Activity.TRAINING, "updated": now, "step": 10, "steps": 100}
        body = Progress(**training, step_time=now, world_size=1, nodes=1, median_step_seconds=1.0).to_json().encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/{{namespace}}/{{service}}"
    store, metrics = Store(), Metrics()
    async with (
        server,
        await Api.connect(str(grant(control_plane, namespace))) as api,
        Coordinators(b"a key of the tests, 32 bytes long", url, seconds=seconds, steady=steady) as visitor,
    ):
        site = Site(default_image="example.invalid/trainer:1", operator_namespace=namespace)
        reconciler = LateReconciler(
            *(ClusterPort(api, store, visitor), store, visitor, site, metrics),
            turns=1,
            clock=lambda: reconciler.now(),
        )
        freshness = Freshness(api, store, (namespace,), metrics, lambda kind, key: None, steady=lambda: 0.0)
        await freshness.fill()
        yield Silent(reconciler, store, freshness, asked, released, Key(namespace, "fetal"), taken)


@pytest.fixture
def kubectl(control_plane: ControlPlane) -> Any:
    """kubectl in a namespace with the job `fetal` and its like, `other`."""
    apply_crds(control_plane)
    with own_namespace(control_plane, "silent") as namespace:

        def run(*arguments: str, stdin: str | None = None) -> str:
            return control_plane.kubectl(f"--namespace={namespace}", *arguments, stdin=stdin)

        run.namespace = namespace  # type: ignore[attr-defined]
        documents = list(yaml.safe_load_all(JOB))
        other = {**documents[0], "metadata": {"name": "other"}}
        other["spec"] = documents[0]["spec"] | {"checkpoints": {"uri": "s3://b/other"}}
        run("apply", "--filename=-", stdin=yaml.safe_dump_all([*documents, other]))
        yield run


def test_a_run_that_does_not_answer_holds_no_turn_of_another_job(control_plane: ControlPlane, kubectl: Any) -> None:
    async def story() -> None:
        async with opened(control_plane, kubectl.namespace) as silent:
            waits = await silent.begin()
            await silent.reconciler.reconcile(Key(kubectl.namespace, "other"))
            assert not waits.done(), "it waits still"
            assert len(list(silent.store.all(DEPLOYMENTS.name))) == 2, "and the other job has its children"
            silent.released.set()
            await waits

    asyncio.run(story())


def test_a_spec_that_changes_during_a_pass_is_not_observed_by_it(
    control_plane: ControlPlane, kubectl: Callable[..., str]
) -> None:
    def job() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(kubectl("get", "pj", "fetal", "--output=json"))
        return found

    async def story() -> None:
        async with opened(control_plane, kubectl.namespace) as silent:  # type: ignore[attr-defined]
            waits = await silent.begin()
            kubectl("patch", "pj", "fetal", "--type=merge", '--patch={"spec":{"suspend":true}}')
            assert await silent.freshness.compare(JOBS) == 1
            silent.released.set()
            await waits
            assert (job()["metadata"]["generation"], job()["status"]["observedGeneration"]) == (2, 1)
            await silent.reconciler.reconcile(silent.fetal)
            assert job()["status"]["observedGeneration"] == 2

    asyncio.run(story())


def test_a_pass_that_hangs_is_told_from_one_that_waits_for_its_turn(control_plane: ControlPlane, kubectl: Any) -> None:
    async def story() -> None:
        async with opened(control_plane, kubectl.namespace) as silent:
            waits = await silent.begin()
            await asyncio.sleep(0.3)
            hung = silent.reconciler.longest
            assert hung >= 0.3, "it waits for its run"
            async with silent.reconciler._turns:
                silent.released.set()
                await asyncio.sleep(1.0)
                assert not waits.done(), "it waits for its turn"
                assert silent.reconciler.longest < hung + 0.5
            await waits
            assert silent.reconciler.longest == 0.0
            took = silent.reconciler._metrics.registry.get_sample_value
            passes, whole = took("sonoforge_reconcile_seconds_sum"), took("sonoforge_reconcile_whole_seconds_sum")
            assert whole - passes >= 0.9, "the metrics tell its wait for a turn from the rest"

    asyncio.run(story())


def test_a_pass_that_waited_long_for_its_turn_does_not_take_that_for_a_stall(
    control_plane: ControlPlane, kubectl: Any
) -> None:
    async def story() -> None:
        async with opened(control_plane, kubectl.namespace) as silent:
            waits = await silent.begin()
            silent.reconciler.late_seconds = 600.0
            silent.released.set()
            await waits
            status = json.loads(kubectl("get", "pj", "fetal", "--output=json"))["status"]
            assert status["step"] == 10, "it was heard"
            assert (status["attempt"], status.get("restarts", {})) == (1, {})

    asyncio.run(story())


def test_a_coordinator_that_falls_silent_is_replaced_and_the_next_one_told_who_was_lost_with_it(
    control_plane: ControlPlane, kubectl: Callable[..., str]
) -> None:
    now = [0.0]

    def get(what: str, part: str = "coordinator") -> list[Any]:
        selector = [] if what == "events" else [f"--selector=sonoforge.dev/part={part}"]
        found: list[Any] = json.loads(kubectl("get", what, *selector, "--output=json"))["items"]
        return found

    def pod() -> str:
        """Uid of the pod that the Deployment has made."""
        wait_for(lambda: get("pods"), "the coordinator has a pod", 30)
        return str(get("pods")[0]["metadata"]["uid"])

    async def story() -> None:
        namespace = kubectl.namespace  # type: ignore[attr-defined]
        async with opened(control_plane, namespace, seconds=2, steady=lambda: now[0]) as silent:
            silent.released.set()
            await silent.reconciler.reconcile(silent.fetal)
            first = await asyncio.to_thread(pod)
            await asyncio.to_thread(wait_for, lambda: get("pods", "worker"), "the workers have pods", 30)
            await silent.freshness.fill()
            silent.call_ready()
            silent.place("coordinator", "node-1")
            silent.place("worker", "node-1")
            await silent.reconciler.reconcile(silent.fetal)
            silent.released.clear()
            for now[0] in (0.0, 4.0):
                await silent.reconciler.reconcile(silent.fetal)
                assert await asyncio.to_thread(pod) == first, "it may answer yet"
            now[0] = 8.0
            await silent.reconciler.reconcile(silent.fetal)
            silent.released.set()
            await asyncio.to_thread(wait_for, lambda: pod() != first, "another one is there", 30)
            assert "CoordinatorLost" in {event["reason"] for event in get("events")}
            await silent.reconciler.reconcile(silent.fetal)
            assert silent.taken == [], "the old one answers again, and is not meant"
            workers = get("pods", "worker")
            await silent.freshness.fill()
            silent.call_ready(0)
            await silent.reconciler.reconcile(silent.fetal)
            silent.call_ready()
            silent.place("coordinator", "node-2")
            for _ in range(2):
                await silent.reconciler.reconcile(silent.fetal)
            told = {(request.kind, request.id) for request in silent.taken}
            assert told == {("lost", pod["metadata"]["uid"]) for pod in workers}
            assert len(silent.taken) == len(workers), "each is told once"

    asyncio.run(story())
