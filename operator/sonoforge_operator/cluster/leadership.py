"""Leadership by a Lease: only the holder acts, and one that cannot renew it in time stops at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from sonoforge_operator.cluster.api_client import LEASES, Api, ApiError, NotFoundError
from sonoforge_operator.cluster.names import LABEL_MANAGED, MANAGER

log = structlog.get_logger(__name__)

LEASE_NAME = "sonoforge-operator"
"""Name of the Lease in the operator's namespace."""
_AGAIN_SECONDS = 1.0
"""Time to the next try after a renewal that failed."""


@dataclass(frozen=True)
class Timing:
    """Times of a Lease. Raises ValueError where a holder would not stop before another may take the Lease."""

    lease_seconds: int = 30
    """How long a Lease holds that nobody renews."""
    renew_seconds: float = 20.0
    """How long its holder may go without renewing it before it stops."""
    retry_seconds: float = 5.0
    """Time between two tries to take or to renew it."""

    def __post_init__(self) -> None:
        if not 0 < self.retry_seconds < self.renew_seconds < self.lease_seconds:
            found = f"{self.retry_seconds:g}, {self.renew_seconds:g} and {self.lease_seconds}"
            raise ValueError(f"retry, renew and lease seconds: found {found}. Allowed: each longer than the one before")


class LeadershipLostError(Exception):
    """The Lease could not be renewed in time: another replica may act now."""


class Leadership:
    """One candidate. `clock` gives Unix seconds, `steady` seconds that never jump."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        identity: str,
        *,
        clock: Callable[[], float],
        steady: Callable[[], float],
        timing: Timing = Timing(),
    ) -> None:
        self._api, self._namespace, self._identity = api, namespace, identity
        self._clock, self._steady, self._timing = clock, steady, timing
        self._seen: tuple[str, float] | None = None
        self._renewed = float("-inf")

    @property
    def left(self) -> float:
        """Seconds for which this candidate may act without another renewal; 0 or less where it may not."""
        return self._renewed + self._timing.renew_seconds - self._steady()

    async def win(self) -> None:
        """Return once this candidate holds the Lease."""
        while True:
            try:
                if await self._try():
                    break
            except ApiError as error:
                log.warning("lease-not-taken", status=error.status, reason=error.reason, message=error.message)
            await asyncio.sleep(self._timing.retry_seconds)
        log.info("leading", identity=self._identity)

    async def hold(self) -> None:
        """Renew the Lease until cancelled. Raises LeadershipLostError where that fails for too long."""
        rest = self._timing.retry_seconds
        while True:
            await asyncio.sleep(max(0.0, min(rest, self.left)))
            try:
                async with asyncio.timeout(max(0.0, self.left)):  # an answer that comes later is of no use
                    if not await self._try():
                        raise LeadershipLostError("another replica holds the Lease")
                rest = self._timing.retry_seconds
            except (ApiError, TimeoutError) as error:
                # A conflict decides nothing: it may be our own renewal, whose answer was lost. The Lease itself tells.
                log.warning("lease-not-renewed", error=type(error).__name__)
                rest = min(_AGAIN_SECONDS, self._timing.retry_seconds)
            if self.left <= 0:
                raise LeadershipLostError(f"the Lease was not renewed for {self._timing.renew_seconds:g} s")

    async def release(self) -> None:
        """Give the Lease back, so that the next replica need not wait for it. From now on this one may not act."""
        self._renewed = float("-inf")
        lease = await self._api.get(LEASES, self._namespace, LEASE_NAME)
        if (lease.get("spec") or {}).get("holderIdentity") == self._identity:
            await self._api.replace({**lease, **_KIND, "spec": {**lease["spec"], "holderIdentity": ""}})

    async def _try(self) -> bool:
        """Take or renew the Lease. Whether it is held now; ApiError where that is not known."""
        began = self._steady()
        held = await self._take()
        if held:
            self._renewed = began  # the time of the Lease runs from when it was asked for, not from the answer
        return held

    async def _take(self) -> bool:
        try:
            lease = await self._api.get(LEASES, self._namespace, LEASE_NAME)
        except NotFoundError:
            metadata = {"name": LEASE_NAME, "namespace": self._namespace, "labels": {LABEL_MANAGED: MANAGER}}
            await self._api.create({**_KIND, "metadata": metadata, "spec": self._spec(0, None)})
            return True
        spec: dict[str, Any] = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        mine = holder == self._identity
        if holder and not mine and not self._expired(spec):
            return False
        changes = spec.get("leaseTransitions") or 0
        renewed = self._spec(changes + (not mine), spec.get("acquireTime") if mine else None)
        await self._api.replace({**lease, **_KIND, "spec": {**spec, **renewed}})
        return True

    def _expired(self, spec: dict[str, Any]) -> bool:
        """Whether the holder has not renewed for the time of the Lease, by this candidate's own clock."""
        renewal = f"{spec.get('holderIdentity')} {spec.get('renewTime')}"
        if self._seen is None or self._seen[0] != renewal:
            self._seen = (renewal, self._steady())
            return not spec.get("renewTime")
        return self._steady() - self._seen[1] > (spec.get("leaseDurationSeconds") or self._timing.lease_seconds)

    def _spec(self, transitions: int, acquired: str | None) -> dict[str, Any]:
        now = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._timing.lease_seconds,
            "acquireTime": acquired or now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }


_KIND = {"apiVersion": LEASES.api_version, "kind": LEASES.name}
