"""A Job is over and the watch of pods is late: the API server is asked for what its pod said, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration
from objects import cluster_job, documents, ended, pod, small_job

from sonoforge_operator.cluster.api_client import BATCH_JOBS, JOBS, PODS, Api, ApiError
from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.names import LABEL_UID
from sonoforge_operator.cluster.port import ClusterPort
from sonoforge_operator.cluster.store import Store
from sonoforge_operator.observed import ChildFact

JOB = cluster_job()
T0 = 1767225600.0  # 2026-01-01T00:00:00Z
SCORES = {"cause": "done", "result": {"knn/f1_macro": {"value": 0.5}}}
OVER = pod("e", phase="Succeeded", state=ended(0, SCORES, "Completed"), part="evaluation")
STILL_RUNS = pod("e", part="evaluation")


@dataclass
class World:
    """An API server that has pods, and an operator's memory, which a test keeps behind."""

    store: Store = field(default_factory=Store)
    pods: list[Mapping[str, Any]] = field(default_factory=list)
    selectors: list[str] = field(default_factory=list)
    """What was listed."""
    refuses: bool = False
    port: ClusterPort = field(init=False)

    async def fact(self) -> ChildFact:
        return (await self.port.observe(JOB, T0 + 60)).children["eval-a-000"]

    async def answer(self, request: web.Request) -> web.Response:
        assert request.path == "/api/v1/namespaces/research/pods"
        self.selectors.append(request.query["labelSelector"])
        if self.refuses:
            return web.json_response({"kind": "Status", "reason": "ServiceUnavailable"}, status=503)
        return web.json_response({"kind": "PodList", "metadata": {}, "items": self.pods})


def of_the_run(manifest: Mapping[str, Any], version: int) -> dict[str, Any]:
    metadata = manifest["metadata"]
    owners = metadata.get("ownerReferences") or [{"kind": "PretrainJob", "uid": JOB.names.uid, "controller": True}]
    labels = {**metadata["labels"], LABEL_UID: JOB.names.uid}
    more = {"labels": labels, "ownerReferences": owners, "resourceVersion": str(version)}
    return {**manifest, "metadata": {**metadata, **more}}


@asynccontextmanager
async def opened(*known: Mapping[str, Any], there: tuple[Mapping[str, Any], ...] = ()) -> AsyncIterator[World]:
    """An evaluation's Job is over; these pods are known, and those are there."""
    world = World(pods=[of_the_run(each, 9) for each in there])
    run = documents()[0]
    world.store.put(JOBS.name, {**run, "metadata": {**run["metadata"], "namespace": "research"}})
    world.store.put(BATCH_JOBS.name, of_the_run(small_job("eval-a-000", uid="e", condition="Complete"), 3))
    for each in known:
        world.store.put(PODS.name, of_the_run(each, 2))
    app = web.Application()
    app.router.add_get("/{path:.*}", world.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        configuration = Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
        async with Api(configuration) as api, Coordinators(b"k" * 32, "http://127.0.0.1:9") as coordinators:
            world.port = ClusterPort(api, world.store, coordinators)
            yield world
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("known", [(), (STILL_RUNS,)], ids=["not known", "known to run"])
def test_its_scores_are_asked_for(known):
    async def story():
        async with opened(*known, there=(OVER,)) as world:
            for _ in range(3):
                fact = await world.fact()
                assert fact.termination is not None, "its scores are taken, and it is not done again"
                assert fact.termination.result == SCORES["result"]
            (selector,) = world.selectors
            assert f"{LABEL_UID}={JOB.names.uid}," in selector

    asyncio.run(story())


@pytest.mark.parametrize("known", [(), (STILL_RUNS,)], ids=["not known", "known to run"])
def test_one_that_is_gone_is_asked_for_once_and_lost(known):
    async def story():
        async with opened(*known, pod("job-1", 0, uid="worker")) as world:
            for _ in range(3):
                fact = await world.fact()
                assert (fact.running, fact.exit_code, fact.termination) == (False, 0, None)
            assert len(world.selectors) == 1
            assert [place[1] for place in world.store.versions(PODS.name)] == ["worker"], "which nobody asked for"

    asyncio.run(story())


def test_one_that_cannot_be_asked_for_is_not_lost():
    async def story():
        async with opened(there=(OVER,)) as world:
            world.refuses = True
            for _ in range(2):
                with pytest.raises(ApiError):
                    await world.fact()
            world.refuses = False
            assert (await world.fact()).termination is not None
            assert len(world.selectors) == 3

    asyncio.run(story())


def test_one_whose_end_is_known_is_not_asked_for():
    async def story():
        async with opened(OVER) as world:
            assert (await world.fact()).termination is not None
            assert world.selectors == []

    asyncio.run(story())
