"""Rank 0's side of the coordinator: progress out, requests in."""

from __future__ import annotations

import json
import threading
from types import TracebackType
from typing import Self

import structlog

from sonoforge_trainer.contract import ContractError, Progress, Request
from sonoforge_trainer.store_link import (
    ACKNOWLEDGED_KEY,
    ATTEMPT_KEY,
    PROGRESS_KEY,
    REQUESTS_KEY,
    StoreLink,
    StoreUnavailableError,
    is_later,
    membership_key,
    parse_endpoint,
)

_ACKNOWLEDGED_KEPT = 256

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ProgressPublisher:
    """Publishes the newest progress about once a second and collects requests, in a thread of its own.

    The training loop never waits for the coordinator: `publish`, `requests` and `acknowledge` return at once, and while
    the coordinator is away or being replaced the newest progress is kept and sent when it is back.
    `endpoint` is HOST:PORT of the store. `attempt` is that of the agents and `address` this node's among them: while
    the others go on without it, or a later attempt is there, this says and takes nothing. Use it as a context manager,
    on rank 0 only.
    """

    def __init__(self, endpoint: str, *, attempt: str = "", address: str = "", interval_seconds: float = 1.0) -> None:
        self._link = StoreLink(*parse_endpoint(endpoint))
        self._attempt, self._address = attempt, address
        self._replaced = False
        self._interval_seconds = interval_seconds
        self._lock = threading.Lock()
        self._newest: Progress | None = None
        self._pending: list[Request] = []
        self._seen: set[str] = set()
        self._acknowledged: list[str] = []
        self._acknowledged_read = False
        self._away = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress-publisher", daemon=True)
        self._thread.start()

    def publish(self, progress: Progress) -> None:
        """Hand over the newest progress; an older one that was not sent yet is dropped."""
        with self._lock:
            self._newest = progress

    def requests(self) -> list[Request]:
        """Requests that arrived since the last call, each one once.

        One that is not acknowledged comes again to the next rank 0, so acknowledge it when it is carried out.
        """
        with self._lock:
            pending, self._pending = self._pending, []
        return pending

    def acknowledge(self, request: Request) -> None:
        """Say that a request was carried out."""
        with self._lock:
            self._acknowledged = [*self._acknowledged, request.id][-_ACKNOWLEDGED_KEPT:]

    def close(self) -> None:
        """Send what is newest once more, and end. Returns within the time that the store is given to answer."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            last = self._stop.wait(self._interval_seconds)
            try:
                self._exchange()
                if self._away:
                    log.info("coordinator-back")
                self._away = False
            except StoreUnavailableError:
                if not self._away:
                    log.warning("coordinator-away")
                self._away = True
            if last:
                return

    def _exchange(self) -> None:
        if self._attempt and self._is_replaced():
            return
        if not self._acknowledged_read:
            known = _strings(self._link.get(ACKNOWLEDGED_KEY))
            with self._lock:
                self._acknowledged = [*known, *self._acknowledged]
                self._seen.update(known)
            self._acknowledged_read = True
        with self._lock:
            progress, acknowledged = self._newest, json.dumps(self._acknowledged)
        if progress is not None:
            self._link.set(PROGRESS_KEY, progress.to_json())
        self._link.set(ACKNOWLEDGED_KEY, acknowledged)
        arrived = [request for request in read_requests(self._link) if request.id not in self._seen]
        with self._lock:
            self._pending.extend(arrived)
        self._seen.update(request.id for request in arrived)

    def _is_replaced(self) -> bool:
        """Whether progress and requests are those of a group without this node, as after its cable was pulled."""
        newest = self._link.get(ATTEMPT_KEY).decode("utf-8", "replace")
        present = _participants(self._link.get(membership_key(self._attempt)))
        replaced = is_later(newest, self._attempt) or (present is not None and self._address not in present)
        if replaced != self._replaced:
            log.warning("progress-of-another-group" if replaced else "progress-of-this-group")
        self._replaced = replaced
        return replaced


def _participants(raw: bytes) -> set[str] | None:
    """Addresses of the nodes in the present round of an attempt; None where that is not known."""
    try:
        # `membership.decode` would import torch's rendezvous, which imports ours: a worker needs neither.
        return {entry[0] for entry in json.loads(raw)["participants"]} if raw else None
    except (ValueError, TypeError, LookupError):
        return None


def read_requests(link: StoreLink) -> list[Request]:
    """The requests in the store, oldest first. What is not readable is left out: the store has no password."""
    try:
        return [Request.parse(entry, show_values=False) for entry in json.loads(link.get(REQUESTS_KEY) or b"[]")]
    except (ContractError, ValueError, TypeError):
        log.warning("requests-unreadable")
        return []


def _strings(raw: bytes) -> list[str]:
    try:
        return [entry for entry in json.loads(raw or b"[]") if isinstance(entry, str)]
    except (ValueError, TypeError):
        return []
