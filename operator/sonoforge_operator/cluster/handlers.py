"""Wiring of kopf: every event of the watches goes into the store and wakes the jobs that it concerns. Nothing else.

Only `on.event` handlers, in a registry of our own: kopf then writes no annotation and no finalizer, and keeps no state
that a restart could lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kopf
import structlog

from sonoforge_operator.cluster.api_client import CHECKPOINTS, CHILDREN, JOBS, LEASES, RUNTIMES, SUITES, Kind
from sonoforge_operator.cluster.freshness import Freshness, selector_of
from sonoforge_operator.cluster.leadership import LEASE_NAME
from sonoforge_operator.cluster.names import LABEL_JOB, Key
from sonoforge_operator.cluster.queue import Queue
from sonoforge_operator.cluster.reconciler import Reconciler
from sonoforge_operator.cluster.store import Store, key_of

log = structlog.get_logger(__name__)

_PAGE = 500
_REQUEST_SECONDS = 30.0


class Wiring:
    """Takes what watches bring, and wakes jobs. `namespaces` are those that are served; empty for all.

    kopf watches the operator's own namespace besides, for its Lease; what is there otherwise is left alone.
    """

    def __init__(self, store: Store, queue: Queue, reconciler: Reconciler, namespaces: tuple[str, ...] = ()) -> None:
        self.store = store
        """What is known."""
        self._queue, self._reconciler, self._namespaces = queue, reconciler, namespaces

    def take(self, kind: Kind, event_type: str | None, manifest: Mapping[str, Any]) -> None:
        """Take over an event of a watch."""
        if self._namespaces and key_of(manifest).namespace not in self._namespaces:
            return
        before = self.store.get(kind.name, key_of(manifest).namespace, key_of(manifest).name)
        if event_type == "DELETED":
            self.store.remove(kind.name, manifest)
        elif not self.store.put(kind.name, manifest):
            return  # what this process wrote itself, or what is known by now
        elif kind == JOBS and before is not None and _wish(before) == _wish(manifest):
            return  # its status, which nobody but the operator writes
        self.wake(kind, key_of(manifest), manifest)

    def wake(self, kind: Kind, key: Key, manifest: Mapping[str, Any] | None = None) -> None:
        """Ask for a pass over every job that an object concerns."""
        if kind == JOBS:
            self._queue.wake(key)
        elif kind in (RUNTIMES, SUITES):
            for named in self._reconciler.keys_naming(kind.name, key):
                self._queue.wake(named)
        else:
            found = manifest or self.store.get(kind.name, key.namespace, key.name)
            labels = (found or {}).get("metadata", {}).get("labels")
            job = labels.get(LABEL_JOB) if isinstance(labels, Mapping) else None
            if isinstance(job, str):
                self._queue.wake(Key(key.namespace, job))


def registry_of(wiring: Wiring, freshness: Callable[[], Freshness], lease_namespace: str) -> kopf.OperatorRegistry:
    """A registry with one handler for each watched kind."""
    registry = kopf.OperatorRegistry()

    def watch(kind: Kind) -> None:
        @kopf.on.event(*_selector(kind), id=f"take-{kind.plural}", registry=registry)  # type: ignore[untyped-decorator,unused-ignore]
        async def take(event: Mapping[str, Any], **_: Any) -> None:
            try:
                wiring.take(kind, event.get("type"), event["object"])
                if event.get("type") is None:  # part of a listing
                    freshness().doubt(kind)
            except Exception as error:  # noqa: BLE001 - one poisoned object must not stop the watch of all others
                log.error("event-unreadable", kind=kind.name, exception=type(error).__name__)  # noqa: TRY400 - it may hold anything

    for kind in (JOBS, RUNTIMES, SUITES, CHECKPOINTS, *CHILDREN):
        watch(kind)

    @kopf.on.event(*_selector(LEASES), id="take-lease", registry=registry)  # type: ignore[untyped-decorator,unused-ignore]
    async def take_lease(name: str | None, namespace: str | None, **_: Any) -> None:
        if (namespace, name) == (lease_namespace, LEASE_NAME):
            freshness().beat()

    @kopf.on.login(registry=registry)  # type: ignore[untyped-decorator,unused-ignore]
    async def log_in(**arguments: Any) -> object:
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

    return registry


def settings(watch_silence_seconds: float) -> kopf.OperatorSettings:
    """Settings of kopf. A watch that says nothing for so long is made anew."""
    found = kopf.OperatorSettings()
    found.posting.enabled = False
    found.scanning.disabled = True
    found.watching.chunk_size = _PAGE
    found.watching.inactivity_timeout = watch_silence_seconds
    found.networking.request_timeout = _REQUEST_SECONDS
    found.networking.trust_env = True  # as our own client: through the proxy of the environment, or neither
    for kind in (CHECKPOINTS, *CHILDREN, LEASES):
        found.watching.label_selectors[kind.api_version, kind.plural] = selector_of(kind)
    return found


def _selector(kind: Kind) -> tuple[str, str, str]:
    group, _, version = kind.api_version.rpartition("/")
    return group, version, kind.plural


def _wish(manifest: Mapping[str, Any]) -> tuple[object, object, object]:
    """What a person asks for with an object: its version, identity, and whether it is to go."""
    metadata = manifest["metadata"]
    return metadata.get("generation"), metadata.get("uid"), metadata.get("deletionTimestamp")
