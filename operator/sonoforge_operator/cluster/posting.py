"""Kubernetes Events: few, and one object for what is told again."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import structlog

from sonoforge_operator.api import API_VERSION
from sonoforge_operator.cluster.api_client import EVENTS, Api, ApiError, ConflictError, Manifest
from sonoforge_operator.cluster.names import MANAGER, Names
from sonoforge_operator.observed import Event

log = structlog.get_logger(__name__)

_MOST = 1000
_REPORTER = "sonoforge-operator"


class Posting:
    """Posts events. What cannot be posted is in the log: no pass fails for it."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def post(self, names: Names, events: tuple[Event, ...], now: float, attempt: int = 0) -> None:
        """Post the events of a pass, and log them with the attempt that they belong to."""
        for event in events:
            log.info(
                "event",
                job=str(names.key),
                attempt=attempt,
                reason=event.reason,
                message=event.message,
                **({"warning": True} if event.warning else {}),
            )
            try:
                await self._post(names, event, now)
            except ApiError as error:
                log.warning("event-not-posted", job=str(names.key), reason=event.reason, status=error.status)

    async def _post(self, names: Names, event: Event, now: float) -> None:
        at = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        key = names.key
        digest = hashlib.sha256(f"{event.reason}\n{event.message}".encode()).hexdigest()[:16]
        name = f"{names.base}.{digest}"
        manifest: Manifest = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": key.namespace},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": "PretrainJob",
                "name": key.name,
                "namespace": key.namespace,
                "uid": names.uid,
            },
            "reason": event.reason,
            "message": event.message[:_MOST],
            "type": "Warning" if event.warning else "Normal",
            "source": {"component": _REPORTER},
            "reportingComponent": _REPORTER,
            "reportingInstance": MANAGER,
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        }
        try:
            await self._api.create(manifest)
        except ConflictError:
            known = await self._api.get(EVENTS, key.namespace, name)
            count = known.get("count")
            again = {"count": (count if isinstance(count, int) else 1) + 1, "lastTimestamp": at}
            await self._api.merge(EVENTS, key.namespace, name, again)
