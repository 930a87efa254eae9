"""One pass over one job: resolve, observe, plan, record, apply."""

from __future__ import annotations

import asyncio
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog

from sonoforge_operator.api import seconds
from sonoforge_operator.cluster.api_client import JOBS, ApiError, ConflictError
from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.facts import unix_seconds
from sonoforge_operator.cluster.jobs import RejectedError, Site, references, resolve
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.names import Key, Names
from sonoforge_operator.cluster.port import ClusterPort
from sonoforge_operator.cluster.projection import rejected_document
from sonoforge_operator.cluster.record import UnreadableRecordError
from sonoforge_operator.cluster.store import Store, key_of
from sonoforge_operator.observed import Plan
from sonoforge_operator.plan import plan

log = structlog.get_logger(__name__)

_LOOK_AGAIN_SECONDS = 300.0
_RETIRE_SECONDS = 5.0
_UNREADABLE = (
    "status.record was not written by this version of the operator; start the version that wrote it, or remove "
    "status.record to begin the job anew from its newest checkpoint"
)
_JOBS_A_SECOND = 100.0
_LONGEST_POLL_SECONDS = 30.0


def finished_at(manifest: Mapping[str, Any]) -> float:
    """Unix time at which a job ended; 0 where it did not."""
    status = manifest.get("status")
    text = status.get("completionTime") if isinstance(status, Mapping) else None
    return unix_seconds(text) if isinstance(text, str) else 0.0


def time_to_live(manifest: Mapping[str, Any], finished: float) -> float:
    """Unix time at which a job that ended is deleted; infinite where it says nothing of it that can be read."""
    spec = manifest.get("spec")
    text = spec.get("ttlAfterFinished") if isinstance(spec, Mapping) else None
    if not isinstance(text, str) or not re.fullmatch(r"([0-9]{1,9}[smhd])+", text):
        return float("inf")
    return finished + seconds(text)


class _Stopwatch:
    """Seconds since it was made, with its pauses and without."""

    def __init__(self) -> None:
        self._began, self._paused = time.monotonic(), 0.0
        self._pause_began: float | None = None

    @property
    def seconds(self) -> float:
        until = time.monotonic() if self._pause_began is None else self._pause_began
        return until - self._began - self._paused

    @property
    def with_pauses(self) -> float:
        return time.monotonic() - self._began

    async def pause(self, awaited: Awaitable[object]) -> None:
        """Wait for something on nobody's account."""
        self._pause_began = time.monotonic()
        try:
            await awaited
        finally:
            self._paused += time.monotonic() - self._pause_began
            self._pause_began = None


class Reconciler:
    """Passes over jobs by key. Many may wait for what a run says, and `turns` write. `clock` gives Unix seconds."""

    def __init__(
        self,
        port: ClusterPort,
        store: Store,
        coordinators: Coordinators,
        site: Site,
        metrics: Metrics,
        *,
        poll_seconds: float = 2.0,
        turns: int = 2,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._port, self._store, self._coordinators, self._site = port, store, coordinators, site
        self._metrics, self._poll_seconds, self._clock = metrics, poll_seconds, clock
        self._uids: dict[Key, str] = {}
        self._active: set[Key] = set()
        self._going_on: dict[Key, _Stopwatch] = {}
        # What waits for a coordinator that is silent is not in the way of what has something to write.
        self._turns = asyncio.Semaphore(turns)

    def keys_naming(self, kind: str, key: Key) -> list[Key]:
        """The jobs that name a runtime or a suite."""
        return [
            key_of(job)
            for job in self._store.all(JOBS.name)
            if key_of(job).namespace == key.namespace and (kind, key.name) in references(job)
        ]

    @property
    def longest(self) -> float:
        """Seconds of the longest pass that goes on, without its wait for a turn."""
        return max((timed.seconds for timed in self._going_on.values()), default=0.0)

    async def reconcile(self, key: Key) -> float | None:
        """Make one pass. Returns the seconds to the next one, or None where the job is gone."""
        timed = self._going_on[key] = _Stopwatch()
        try:
            return await self._pass(key, timed)
        except ConflictError:
            self._metrics.failed_passes.labels("conflict").inc()
            raise
        except ApiError as error:
            self._metrics.failed_passes.labels("api").inc()
            await self._port.complain(Names(key, self._uids.get(key, "")), error, self._clock())
            log.warning("pass-failed", job=str(key), status=error.status, reason=error.reason, message=error.message)
            raise
        except Exception as error:
            self._metrics.failed_passes.labels("error").inc()
            frame = traceback.extract_tb(error.__traceback__)[-1]  # its text may hold anything
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            log.error("pass-failed", job=str(key), exception=type(error).__name__, where=where)  # noqa: TRY400
            raise
        finally:
            del self._going_on[key]
            self._metrics.pass_seconds.observe(timed.seconds)
            self._metrics.whole_seconds.observe(timed.with_pauses)

    async def _pass(self, key: Key, timed: _Stopwatch) -> float | None:
        manifest = self._store.get(JOBS.name, key.namespace, key.name)
        if manifest is None or manifest["metadata"].get("deletionTimestamp"):
            self._forget(key)
            return None
        uid = str(manifest["metadata"].get("uid", ""))
        if self._uids.setdefault(key, uid) != uid:
            self._forget(key)
            self._uids[key] = uid
        now = self._clock()
        finished = finished_at(manifest)
        if finished:
            async with self._turn(timed):
                return await self._after_the_end(manifest, Names(key, uid), finished, now)
        try:
            job = resolve(manifest, self._store, self._coordinators, self._site)
            observed = await self._port.observe(job, now)
        except RejectedError as error:
            self._coordinators.forget(uid)  # it is not visited any more, so nothing is known of it
            async with self._turn(timed):
                await self._port.reject(manifest, rejected_document(manifest, error.reason, error.message, now))
            return _LOOK_AGAIN_SECONDS
        except UnreadableRecordError:
            self._coordinators.forget(uid)
            async with self._turn(timed):
                await self._port.reject(manifest, rejected_document(manifest, "RecordUnreadable", _UNREADABLE, now))
            return _RETIRE_SECONDS  # what repairs it is a change of the status, which wakes nobody
        now = self._clock()
        recorded: Plan | None = None
        try:
            async with self._turn(timed):
                # The time of the facts, not that of the turn: what was heard a while ago is no silence of the run.
                decided = plan(job.file, observed, now)
                await self._port.record(job, observed, decided, now)
                recorded = decided
                self._metrics.follow(key, observed.status, decided)
                await self._port.apply(job, observed, decided, now)
        except asyncio.CancelledError:
            recorded = None  # the process ends, and another replica may act already
            raise
        finally:
            if recorded is not None:  # outside the turn: a run that does not listen holds up nobody else
                await self._port.send(job, recorded)
        if decided.status.terminal:
            self._active.discard(key)
            return _RETIRE_SECONDS
        self._active.add(key)
        soon = self._coordinators.asks_again(uid)
        if soon is not None:
            return soon
        # Events wake a job at once; this is for what no event tells, the progress of its run.
        poll = min(_LONGEST_POLL_SECONDS, max(self._poll_seconds, len(self._active) / _JOBS_A_SECOND))
        return max(decided.wake_after, poll)

    async def _after_the_end(
        self, manifest: Mapping[str, Any], names: Names, finished: float, now: float
    ) -> float | None:
        """Nothing of a job that ended changes any more: it lets go of what it holds, and is deleted in time."""
        self._active.discard(names.key)
        left = time_to_live(manifest, finished) - now
        if left <= 0:
            await self._port.expire(names)
            return None
        return min(left, float("inf") if await self._port.retire(names, now) else _RETIRE_SECONDS)

    @asynccontextmanager
    async def _turn(self, timed: _Stopwatch) -> AsyncIterator[None]:
        """Wait for a turn to write. What a burst of jobs waits here is the queue's time and not that of a pass."""
        await timed.pause(self._turns.acquire())
        try:
            yield
        finally:
            self._turns.release()

    def _forget(self, key: Key) -> None:
        uid = self._uids.pop(key, None)
        if uid is not None:
            self._port.forget(uid)
            self._metrics.forget(key)
        self._active.discard(key)
