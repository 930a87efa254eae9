"""What a kubelet and Prometheus are told of the operator: /healthz, /readyz and /metrics."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from sonoforge_operator.cluster.api_client import Api
from sonoforge_operator.cluster.freshness import Freshness
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.queue import Queue
from sonoforge_operator.cluster.reconciler import Reconciler


@dataclass
class State:
    """What probes and metrics look at."""

    freshness: Freshness
    queue: Queue
    reconciler: Reconciler
    metrics: Metrics
    api: Api
    stuck_seconds: float
    started: bool = False

    @property
    def healthy(self) -> bool:
        """Whether the watches are fresh and passes are made. A replica that waits for the Lease is."""
        return not self.started or (self.freshness.fresh and self.stuck < self.stuck_seconds)

    @property
    def stuck(self) -> float:
        """Seconds for which a pass lasts or none ended. How long jobs wait says how many there are, and no more."""
        return max(self.queue.idle, self.reconciler.longest)


@contextlib.asynccontextmanager
async def probes(state: State, host: str, port: int) -> AsyncIterator[None]:
    """Serve /healthz, /readyz and /metrics there; nothing where the port is 0."""
    if not port:
        yield
        return

    async def health(_: web.Request) -> web.Response:
        return web.json_response(
            {"watchAgeSeconds": round(state.freshness.age, 1), "stuckSeconds": round(state.stuck, 1)},
            status=200 if state.healthy else 503,
        )

    async def ready(_: web.Request) -> web.Response:
        return web.json_response({"leading": state.started}, status=200 if state.started else 503)

    async def metrics(_: web.Request) -> web.Response:
        shown = state.metrics
        shown.queue_depth.set(state.queue.depth)
        shown.queue_seconds.set(state.queue.oldest)
        shown.watch_age.set(state.freshness.age)
        shown.api_writes.set(state.api.writes)
        return web.Response(body=generate_latest(shown.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", health), web.get("/readyz", ready), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield
    finally:
        await runner.cleanup()
