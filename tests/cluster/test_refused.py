"""What the API server refuses to make for a job, and jobs that were refused and are not any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from operators import apply_crds, grant, own_namespace
from test_life import JOB

from sonoforge_operator.cluster.api_client import RUNTIMES, Api, ApiError
from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.freshness import Freshness
from sonoforge_operator.cluster.jobs import Site
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.names import Key
from sonoforge_operator.cluster.port import ClusterPort
from sonoforge_operator.cluster.reconciler import Reconciler
from sonoforge_operator.cluster.store import Store

UNSATISFIABLE = {"spec": {"workers": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}}}
SATISFIABLE = {"spec": {"workers": {"limits": {"memory": "4Gi"}}}}


@dataclass
class Place:
    """A namespace with a job, and an operator without watches that is told when to look."""

    namespace: str
    run: Callable[..., str]

    @asynccontextmanager
    async def operator(self, kubeconfig: str) -> AsyncIterator[Callable[[], Any]]:
        """Read what is there, then make one pass."""
        store, metrics = Store(), Metrics()
        async with (
            await Api.connect(kubeconfig) as api,
            Coordinators(b"a key of the tests, 32 bytes long", "http://127.0.0.1:9/{namespace}/{service}") as asked,
        ):
            site = Site(default_image="example.invalid/trainer:1", operator_namespace=self.namespace)
            reconciler = Reconciler(ClusterPort(api, store, asked), store, asked, site, metrics)
            freshness = Freshness(api, store, (self.namespace,), metrics, lambda *_: None, steady=lambda: 0.0)
            await freshness.fill()

            async def look() -> None:
                await freshness.compare(RUNTIMES)
                await reconciler.reconcile(Key(self.namespace, "fetal"))

            yield look

    def shown(self) -> tuple[str, str, str]:
        status = json.loads(self.run("get", "pj", "fetal", "--output=json"))["status"]
        return status["phase"], status["reason"], status["message"]

    def accepted(self) -> tuple[str, str]:
        conditions = json.loads(self.run("get", "pj", "fetal", "--output=json"))["status"]["conditions"]
        return next((c["status"], c["reason"]) for c in conditions if c["type"] == "Accepted")


@pytest.fixture
def place(control_plane):
    apply_crds(control_plane)
    with own_namespace(control_plane, "refused") as namespace:

        def run(*arguments: str, stdin: str | None = None) -> str:
            return control_plane.kubectl(f"--namespace={namespace}", *arguments, stdin=stdin)

        run("apply", "--filename=-", stdin=JOB)
        yield Place(namespace, run)


def test_a_child_that_is_invalid_is_told_by_an_event_and_as_the_reason_until_it_is_not(control_plane, place):
    place.run("patch", "prt", "cpu", "--type=merge", f"--patch={json.dumps(UNSATISFIABLE)}")

    async def story() -> None:
        async with place.operator(str(grant(control_plane, place.namespace))) as look:
            for _ in range(2):
                with pytest.raises(ApiError, match="422"):
                    await look()
            phase, reason, message = place.shown()
            assert (phase, reason) == ("Pending", "Refused")
            assert "must be less than or equal to memory limit" in message
            events = json.loads(place.run("get", "events", "--output=json"))["items"]
            (told,) = [event for event in events if event["reason"] == "Refused"]
            assert (told["type"], told["count"]) == ("Warning", 2)
            assert "must be less than or equal to memory limit" in told["message"]
            place.run("patch", "prt", "cpu", "--type=merge", f"--patch={json.dumps(SATISFIABLE)}")
            await look()
            await look()
            assert place.shown()[:2] == ("Pending", "NoWorkers")

    asyncio.run(story())


def test_a_quota_that_is_spent_is_the_reason_too(control_plane, place):
    async def story() -> None:
        async with place.operator(str(grant(control_plane, place.namespace))) as look:
            forbid = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
            place.run(
                "create", "--filename=-", stdin=json.dumps(forbid | {"spec": {"hard": {"count/jobs.batch": "0"}}})
            )
            place.run("wait", "resourcequota/none", "--for=jsonpath={.status.hard}", "--timeout=30s")
            for _ in range(2):
                with pytest.raises(ApiError, match="403"):
                    await look()
            assert place.shown()[:2] == ("Pending", "Refused")
            assert "exceeded quota" in place.shown()[2]

    asyncio.run(story())


@pytest.mark.parametrize("restarted", [False, True], ids=["the-same-operator", "another-operator"])
def test_a_job_that_is_accepted_again_says_so_in_the_next_pass(control_plane, place, restarted):
    runtime = place.run("get", "prt", "cpu", "--output=json")

    async def story() -> None:
        kubeconfig = str(grant(control_plane, place.namespace))
        async with place.operator(kubeconfig) as look:
            await look()
            await look()
            assert place.accepted() == ("True", "Valid")
            place.run("delete", "prt", "cpu")
            await look()
            assert place.accepted() == ("False", "RuntimeNotFound")
            place.run("create", "--filename=-", stdin=runtime)
            if not restarted:
                await look()
        if restarted:
            async with place.operator(kubeconfig) as look:
                await look()
        assert place.accepted() == ("True", "Valid")

    asyncio.run(story())
