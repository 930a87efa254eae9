"""One pass over one job: resolve, observe, plan, record, apply."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from sonoforge_operator.cluster.api_client import JOBS, ApiError, ConflictError
from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.jobs import RejectedError, Site, references, resolve
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.names import Key
from sonoforge_operator.cluster.port import ClusterPort
from sonoforge_operator.cluster.projection import rejected_document
from sonoforge_operator.cluster.store import Store, key_of
from sonoforge_operator.plan import plan

log = structlog.get_logger(__name__)

_LOOK_AGAIN_SECONDS = 300.0
_JOBS_A_SECOND = 100.0
_LONGEST_POLL_SECONDS = 30.0


class Reconciler:
    """Passes over jobs by key. `clock` gives Unix seconds."""

    def __init__(
        self,
        port: ClusterPort,
        store: Store,
        coordinators: Coordinators,
        site: Site,
        metrics: Metrics,
        *,
        poll_seconds: float = 2.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._port, self._store, self._coordinators, self._site = port, store, coordinators, site
        self._metrics, self._poll_seconds, self._clock = metrics, poll_seconds, clock
        self._uids: dict[Key, str] = {}
        self._active: set[Key] = set()

    def keys_naming(self, kind: str, key: Key) -> list[Key]:
        """The jobs that name a runtime or a suite."""
        return [
            key_of(job)
            for job in self._store.all(JOBS.name)
            if key_of(job).namespace == key.namespace and (kind, key.name) in references(job)
        ]

    async def reconcile(self, key: Key) -> float | None:
        """Make one pass. Returns the seconds to the next one, or None where the job is gone."""
        began = time.monotonic()
        try:
            return await self._pass(key)
        except ConflictError:
            self._metrics.failed_passes.labels("conflict").inc()
            raise
        except ApiError as error:
            self._metrics.failed_passes.labels("api").inc()
            log.warning("pass-failed", job=str(key), status=error.status, reason=error.reason, message=error.message)
            raise
        except Exception as error:
            self._metrics.failed_passes.labels("error").inc()
            log.exception("pass-failed", job=str(key), exception=type(error).__name__)
            raise
        finally:
            self._metrics.pass_seconds.observe(time.monotonic() - began)

    async def _pass(self, key: Key) -> float | None:
        manifest = self._store.get(JOBS.name, key.namespace, key.name)
        if manifest is None or manifest["metadata"].get("deletionTimestamp"):
            self._forget(key)
            return None
        uid = str(manifest["metadata"].get("uid", ""))
        if self._uids.setdefault(key, uid) != uid:
            self._forget(key)
            self._uids[key] = uid
        now = self._clock()
        try:
            job = resolve(manifest, self._store, self._coordinators, self._site)
        except RejectedError as error:
            await self._port.reject(manifest, rejected_document(manifest, error.reason, error.message, now))
            return _LOOK_AGAIN_SECONDS
        observed = await self._port.observe(job, now)
        now = self._clock()
        decided = plan(job.file, observed, now)
        await self._port.record(job, observed, decided, now)
        # What is written is counted, whether or not the rest of this pass can be done.
        self._metrics.follow(key, observed.status, decided)
        await self._port.apply(job, observed, decided, now)
        if decided.expired:
            await self._port.expire(job)
            return None
        if decided.status.terminal:
            self._active.discard(key)
            return min(decided.wake_after, _LOOK_AGAIN_SECONDS)
        self._active.add(key)
        # Events wake a job at once; this is for what no event tells, the progress of its run.
        poll = min(_LONGEST_POLL_SECONDS, max(self._poll_seconds, len(self._active) / _JOBS_A_SECOND))
        return max(decided.wake_after, poll)

    def _forget(self, key: Key) -> None:
        uid = self._uids.pop(key, None)
        if uid is not None:
            self._port.forget(uid)
            self._metrics.forget(key)
        self._active.discard(key)
