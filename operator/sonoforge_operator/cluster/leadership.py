"""Leadership by a Lease: only the holder acts, and one that cannot renew it in time stops at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import structlog

from sonoforge_operator.cluster.api_client import LEASES, Api, ApiError, ConflictError, NotFoundError
from sonoforge_operator.cluster.facts import unix_seconds
from sonoforge_operator.cluster.names import LABEL_MANAGED, MANAGER

log = structlog.get_logger(__name__)

LEASE_NAME = "sonoforge-operator"
"""Name of the Lease in the operator's namespace."""
LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 30, 20.0, 5.0
"""How long a Lease holds, how long its holder tries to renew it before it stops, and the time between two tries."""


class LeadershipLostError(Exception):
    """The Lease could not be renewed in time: another replica may act now."""


class Leadership:
    """One candidate. `clock` gives Unix seconds, `steady` seconds that never jump."""

    def __init__(
        self, api: Api, namespace: str, identity: str, *, clock: Callable[[], float], steady: Callable[[], float]
    ) -> None:
        self._api, self._namespace, self._identity = api, namespace, identity
        self._clock, self._steady = clock, steady
        self._seen: tuple[str, float] | None = None

    async def win(self) -> None:
        """Return once this candidate holds the Lease."""
        while True:
            try:
                if await self._try():
                    break
            except ApiError as error:
                log.warning("lease-not-taken", status=error.status, reason=error.reason, message=error.message)
            await asyncio.sleep(RETRY_SECONDS)
        log.info("leading", identity=self._identity)

    async def hold(self) -> None:
        """Renew the Lease until cancelled. Raises LeadershipLostError where that fails for too long."""
        renewed = self._steady()
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                async with asyncio.timeout(RENEW_SECONDS):
                    if not await self._try():
                        raise LeadershipLostError("another replica holds the Lease")
                renewed = self._steady()
            except (ApiError, TimeoutError) as error:
                log.warning("lease-not-renewed", error=type(error).__name__)
            if self._steady() - renewed > RENEW_SECONDS:
                raise LeadershipLostError(f"the Lease was not renewed for {RENEW_SECONDS:.0f} s")

    async def release(self) -> None:
        """Give the Lease back, so that the next replica need not wait for it."""
        lease = await self._api.get(LEASES, self._namespace, LEASE_NAME)
        if (lease.get("spec") or {}).get("holderIdentity") == self._identity:
            await self._api.replace({**lease, **_KIND, "spec": {**lease["spec"], "holderIdentity": ""}})

    async def _try(self) -> bool:
        """Take or renew the Lease. Whether it is held now."""
        try:
            lease = await self._api.get(LEASES, self._namespace, LEASE_NAME)
        except NotFoundError:
            metadata = {"name": LEASE_NAME, "namespace": self._namespace, "labels": {LABEL_MANAGED: MANAGER}}
            try:
                await self._api.create({**_KIND, "metadata": metadata, "spec": self._spec(0, None)})
            except ConflictError:
                return False
            return True
        spec: dict[str, Any] = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        mine = holder == self._identity
        if holder and not mine and not self._expired(spec):
            return False
        changes = spec.get("leaseTransitions") or 0
        renewed = self._spec(changes + (not mine), spec.get("acquireTime") if mine else None)
        try:
            await self._api.replace({**lease, **_KIND, "spec": {**spec, **renewed}})
        except ConflictError:
            return False
        return True

    def _expired(self, spec: dict[str, Any]) -> bool:
        """Whether the holder has not renewed for the time of the Lease, by this candidate's own clock."""
        renewal = f"{spec.get('holderIdentity')} {spec.get('renewTime')}"
        if self._seen is None or self._seen[0] != renewal:
            self._seen = (renewal, self._steady())
            return not spec.get("renewTime")
        return self._steady() - self._seen[1] > (spec.get("leaseDurationSeconds") or LEASE_SECONDS)

    def _spec(self, transitions: int, acquired: str | None) -> dict[str, Any]:
        now = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": LEASE_SECONDS,
            "acquireTime": acquired or now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }


_KIND = {"apiVersion": LEASES.api_version, "kind": LEASES.name}


def renewed_at(lease: dict[str, Any]) -> float:
    """Unix seconds of the newest renewal of a Lease; 0 where there is none."""
    return unix_seconds(str((lease.get("spec") or {}).get("renewTime", "")))
