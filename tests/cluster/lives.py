"""The operator inside the test's own process, so that a test can end it at any request: no memory survives a life."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sonoforge_operator.cluster.api_client import JOBS, Api, ApiError
from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.freshness import Freshness
from sonoforge_operator.cluster.jobs import Site
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.port import ClusterPort
from sonoforge_operator.cluster.reconciler import Reconciler
from sonoforge_operator.cluster.store import Store, key_of

_REST_SECONDS = 0.05


class KilledError(BaseException):
    """The operator was killed: nothing of it catches this, as nothing catches SIGKILL."""


@dataclass
class Killer:
    """Decides at each write whether the operator dies, before or after it."""

    wanted: Callable[[int], str | None]
    """By the number of the write in this life, from 1: `before`, `after`, or None to live on."""
    writes: int = 0
    done: list[str] = field(default_factory=list)
    """What was about to be written, or had been, at each death."""


class MortalApi(Api):
    """A connection whose owner may die at any write. Writes go one after another, so that each is died at."""

    killer: Killer
    writing: asyncio.Lock

    async def _exchange(
        self, method: str, path: str, query: Mapping[str, str], body: object, content: str, accept: str
    ) -> bytes:
        if method == "GET":
            return await super()._exchange(method, path, query, body, content, accept)
        async with self.writing:
            if self.killer.done:
                raise KilledError  # what else was under way dies with it
            self.killer.writes += 1
            when = self.killer.wanted(self.killer.writes)
            if when == "before":
                self.killer.done.append(f"before {method} {path}")
                raise KilledError
            answer = await super()._exchange(method, path, query, body, content, accept)
            if when == "after":
                self.killer.done.append(f"after {method} {path}")
                raise KilledError
            return answer


class Lives:
    """One operator after another over the same namespace."""

    def __init__(self, kubeconfig: Path, namespace: str, coordinator_url: str) -> None:
        self._kubeconfig, self._namespace, self._url = str(kubeconfig), namespace, coordinator_url
        self.count = 0
        """Operators so far."""
        self.errors: list[str] = []
        """Passes that failed and were made again."""

    def live(self, until: Callable[[], bool], killer: Killer | None = None, seconds: float = 60.0) -> bool:
        """Let one operator live. Whether it reached `until`; False where it was killed. Raises TimeoutError."""
        self.count += 1
        try:
            asyncio.run(self._live(until, killer or Killer(lambda _: None), seconds))
        except KilledError:
            return False
        return True

    async def _live(self, until: Callable[[], bool], killer: Killer, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            store, metrics = Store(), Metrics()
            async with (
                await MortalApi.connect(self._kubeconfig) as api,
                Coordinators(b"a key of the tests, 32 bytes long", self._url) as coordinators,
            ):
                api.killer, api.writing = killer, asyncio.Lock()
                port = ClusterPort(api, store, coordinators)
                site = Site(default_image="example.invalid/trainer:1", operator_namespace=self._namespace)
                reconciler = Reconciler(port, store, coordinators, site, metrics)
                loop = asyncio.get_running_loop()
                freshness = Freshness(api, store, (self._namespace,), metrics, lambda kind, key: None, steady=loop.time)
                while not until():
                    try:
                        await freshness.fill()  # what the watches would bring
                    except ApiError as error:
                        self.errors.append(str(error))
                        continue
                    for manifest in list(store.all(JOBS.name)):
                        try:
                            await reconciler.reconcile(key_of(manifest))
                        except ApiError as error:
                            self.errors.append(str(error))
                    await asyncio.sleep(_REST_SECONDS)


def end_state(namespace: str, get: Callable[..., Any]) -> dict[str, Any]:
    """What a job came to, without what depends on the time it took."""
    jobs = get("pj")["items"]
    found: dict[str, Any] = {}
    for job in jobs:
        status = job["status"]
        record = status["record"]
        found[job["metadata"]["name"]] = {
            "phase": status["phase"],
            "step": status["step"],
            "attempt": status["attempt"],
            "checkpoints": status["checkpoints"],
            "best": status.get("bestText"),
            "outcome": record.get("outcome"),
            "restarts": status.get("restarts"),
            "conditions": {c["type"]: c["status"] for c in status["conditions"]},
        }
    checkpoints = sorted(get("ckpt")["items"], key=lambda c: c["spec"]["step"])
    found["checkpoints"] = [
        {
            "step": c["spec"]["step"],
            "phase": c["status"]["phase"],
            "best": c["status"].get("best"),
            "pruned": c["status"].get("pruned"),
            "evaluations": [
                {k: e.get(k) for k in ("name", "phase", "failures", "scores")} for e in c["status"]["evaluations"]
            ],
        }
        for c in checkpoints
    ]
    found["deployments"] = len(get("deployments")["items"])
    return found
