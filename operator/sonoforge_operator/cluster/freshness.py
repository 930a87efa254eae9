"""Whether the watches still tell the truth, and what repairs the operator's memory where they do not.

Two proofs: the operator's own Lease, which it renews every few seconds, has to come back through a watch; and now and
then everything is listed and compared with what the watches told. Pods that one watch tells of before their own does
are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

import structlog

from sonoforge_operator.cluster.api_client import CHILDREN, OWN, PODS, STANDING, Api, ApiError, Kind, NotFoundError
from sonoforge_operator.cluster.facts import Objects, ended_unheard
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.names import LABEL_PART, LABEL_UID, SELECTOR, Key, Names
from sonoforge_operator.cluster.objects import label_of
from sonoforge_operator.cluster.store import Store, key_of

log = structlog.get_logger(__name__)

STALE_SECONDS = 180.0
"""Without a heartbeat through the watch for so long, the operator is not healthy."""
_GRACE_SECONDS = 10.0
_GATHER_SECONDS = 1.0
_LONG_LIVED = ("worker", "coordinator")
"""Parts of a run whose pods say what they know while they run."""


def selector_of(kind: Kind) -> str:
    """Label selector of what is listed and watched of a kind."""
    return "" if kind in OWN[:3] else SELECTOR


class Freshness:
    """`steady` gives seconds that never jump; `changed` is told the kind and the object of what a watch missed."""

    def __init__(
        self,
        api: Api,
        store: Store,
        namespaces: tuple[str | None, ...],
        metrics: Metrics,
        changed: Callable[[Kind, Key], None],
        *,
        steady: Callable[[], float],
        stale_seconds: float = STALE_SECONDS,
        grace_seconds: float = _GRACE_SECONDS,
    ) -> None:
        self._api, self._store, self._namespaces = api, store, namespaces
        self._metrics, self._changed, self._steady = metrics, changed, steady
        self._stale_seconds, self._grace_seconds = stale_seconds, grace_seconds
        self._beat = steady()
        self._doubted: set[Kind] = set()
        self._doubt = asyncio.Event()

    def beat(self) -> None:
        """A watch brought the heartbeat."""
        self._beat = self._steady()

    @property
    def age(self) -> float:
        """Seconds since the newest heartbeat."""
        return self._steady() - self._beat

    @property
    def fresh(self) -> bool:
        """Whether the watches are believed."""
        return self.age < self._stale_seconds

    def doubt(self, kind: Kind) -> None:
        """A watch began anew with a listing: of what was deleted meanwhile it tells nothing."""
        self._doubted.add(kind)
        self._doubt.set()

    async def fill(self) -> None:
        """List everything, before the first pass: what is not known yet must not look like what is not there."""
        for kind in (*OWN, *CHILDREN, *STANDING):
            listed = set()
            for namespace in self._namespaces:
                found = self._api.list(kind, namespace, selector=selector_of(kind), metadata_only=kind in STANDING)
                async for manifest in found:
                    self._store.put(kind.name, manifest)
                    key = key_of(manifest)
                    listed.add((key.namespace, key.name))
            for namespace, name in self._store.versions(kind.name).keys() - listed:
                gone = self._store.get(kind.name, namespace, name)
                if gone is not None:
                    self._store.remove(kind.name, gone)

    async def compare(self, kind: Kind) -> int:
        """Compare what is known of a kind with what is there, and repair it. Returns the changes that were missed.

        Nobody but the operator writes a standing object: one that is gone, or not as it was left, is applied again.
        """
        behind = await self._behind(kind)
        if kind in STANDING:
            return self._give_up(kind, behind)
        if behind:
            await asyncio.sleep(self._grace_seconds)  # a watch is allowed to be a little late
            behind = {place: known for place, known in (await self._behind(kind)).items() if behind.get(place) == known}
        for namespace, name in behind:
            self._changed(kind, Key(namespace, name))  # while it is still known whose it is
            try:
                self._store.put(kind.name, await self._api.get(kind, namespace, name))
                self._changed(kind, Key(namespace, name))
            except NotFoundError:
                found = self._store.get(kind.name, namespace, name)
                if found is not None:
                    self._store.remove(kind.name, found)
        if behind:
            self._metrics.missed_changes.labels(kind.name).inc(len(behind))
            log.warning("watch-missed-changes", kind=kind.name, count=len(behind))
        return len(behind)

    def _give_up(self, kind: Kind, places: Iterable[tuple[str, str]]) -> int:
        """Forget objects, and have their jobs looked at, which then apply them. Returns how many there were."""
        count = 0
        for namespace, name in places:
            found = self._store.get(kind.name, namespace, name)
            if found is not None:
                self._changed(kind, Key(namespace, name))  # while it is still known whose it is
                self._store.forget(kind.name, found)
                count += 1
        return count

    async def _behind(self, kind: Kind) -> dict[tuple[str, str], str | None]:
        """Where the memory is behind the server, with the version that is remembered (None: nothing)."""
        listed: dict[tuple[str, str], str] = {}
        for namespace in self._namespaces:
            async for manifest in self._api.list(kind, namespace, selector=selector_of(kind), metadata_only=True):
                key = key_of(manifest)
                listed[key.namespace, key.name] = str(manifest["metadata"].get("resourceVersion"))
        known = self._store.versions(kind.name)
        found: dict[tuple[str, str], str | None] = {
            place: known.get(place) for place, version in listed.items() if _older(known.get(place), version)
        }
        return found | {place: version for place, version in known.items() if place not in listed}

    async def keep(self, seconds: float) -> None:
        """Compare everything every so many seconds, and what is doubted at once, until cancelled."""
        everything = self._steady() + seconds
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, everything - self._steady())):
                    await self._doubt.wait()
            await asyncio.sleep(_GATHER_SECONDS)  # a listing comes as many events, and often of several kinds
            self._doubt.clear()
            kinds, self._doubted = self._doubted, set()
            if self._steady() >= everything:
                everything = self._steady() + seconds
                kinds = {*OWN, *CHILDREN, *STANDING}
            for kind in sorted(kinds, key=lambda kind: kind.name):
                try:
                    await self.compare(kind)
                except ApiError as error:
                    log.warning("comparison-failed", kind=kind.name, status=error.status)
                    self.doubt(kind)


class LatePods:
    """Asks for the pods that the watch of Jobs tells of before their own does."""

    def __init__(self, api: Api, store: Store) -> None:
        self._api, self._store = api, store
        self._asked: dict[str, set[str]] = {}
        """By run, the uids of the Jobs whose pods were asked for."""

    async def objects(self, names: Names) -> Objects:
        """What the cluster has of a run, with the pods of its small Jobs that are over. Raises ApiError.

        Without it, what such a pod said would be lost, and its work done again. The server is asked once for each Job;
        where it refuses, nothing is known of the run: what was not heard of is not gone.
        """
        known = self._store.owned(names)
        asked = self._asked.setdefault(names.uid, set())
        unheard = ended_unheard(known) - asked
        if not unheard:
            return known
        there = set()
        selector = f"{SELECTOR},{LABEL_UID}={names.uid},{LABEL_PART} notin ({','.join(_LONG_LIVED)})"
        async for pod in self._api.list(PODS, names.key.namespace, selector=selector):
            self._store.put(PODS.name, pod)
            there.add(pod["metadata"]["uid"])
        for before in known.pods:
            if label_of(before, LABEL_PART) not in _LONG_LIVED and before["metadata"]["uid"] not in there:
                self._store.remove(PODS.name, before)
        asked |= unheard
        log.info("asked-for-pods", job=str(names.key), ended=len(unheard))
        return self._store.owned(names)

    def forget(self, uid: str) -> None:
        """Forget what was asked for a run."""
        self._asked.pop(uid, None)


def _older(known: str | None, listed: str) -> bool:
    if known is None:
        return True
    both = known.isdigit() and listed.isdigit()
    return int(known) < int(listed) if both else known != listed
