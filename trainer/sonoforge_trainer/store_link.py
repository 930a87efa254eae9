"""The coordinator's key-value store as everybody uses it: bounded in time, reconnecting, and never waiting for a key.

torch's TCPStore client has two properties that a long-lived process cannot use: an operation on a store that stopped
answering blocks for ever, and a connection that broke once stays broken. Values are JSON; nothing is unpickled.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch exports it without saying so

ATTEMPT_KEY = "sonoforge/attempt"
"""Identity of the newest attempt: of two without an order, the one whose nodes wrote last."""
PROGRESS_KEY = "sonoforge/progress"
"""The newest `contract.Progress`, JSON."""
REQUESTS_KEY = "sonoforge/requests"
"""Requests to rank 0: a JSON list of `contract.Request`, written by the coordinator alone."""
ACKNOWLEDGED_KEY = "sonoforge/acknowledged"
"""Identities of the requests that were carried out: a JSON list, written by rank 0 alone."""

_NUMBERED = re.compile(r"(.*)-([0-9]{1,9})", re.DOTALL)
_RETRY_SECONDS = 1.0
_CONNECT_SECONDS = 2.0
"""A connection that takes longer is to a node that is gone; the next may reach the coordinator that took its place."""


def membership_key(attempt: str) -> str:
    """The key that holds who takes part in an attempt."""
    return f"sonoforge/membership/{attempt}"


def finished_key(attempt: str) -> str:
    """The key that is there once the work of an attempt is done."""
    return f"sonoforge/finished/{attempt}"


def is_later(attempt: str, other: str) -> bool:
    """Whether an attempt was begun after another: NAME-2 after NAME-1. Names of another form have no order."""
    mine, others = _NUMBERED.fullmatch(attempt), _NUMBERED.fullmatch(other)
    return bool(mine and others and mine[1] == others[1] and int(mine[2]) > int(others[2]))


class StoreUnavailableError(ConnectionError):
    """The store did not answer within its time; the operation may or may not have happened."""


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Split `HOST:PORT` (also `[v6]:PORT`). Raises ValueError."""
    host, _, port = endpoint.strip().rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"store endpoint {endpoint!r}: give HOST:PORT, such as 127.0.0.1:29400")
    return host.strip("[]"), int(port)


def serve_store(host: str, port: int) -> TCPStore:
    """Start a store server that listens on one address only (torch's own listens on all of them).

    `port` 0 takes a free one; the result's `.port` says which. Raises OSError where the address cannot be bound.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        bound_port = listener.getsockname()[1]
    except OSError:
        listener.close()
        raise
    return TCPStore(
        str(address[0]), bound_port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


class StoreLink:
    """A client of the store that survives its loss and replacement. Safe to use from several threads.

    Every method raises StoreUnavailableError within about `timeout_seconds`; the next call after a pause of a second
    connects anew. `connections` counts the connections made, so that a caller notices that the store may be another.
    """

    def __init__(self, host: str, port: int, *, timeout_seconds: float = 5.0) -> None:
        self._host = host
        self._port = port
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._client: TCPStore | None = None
        self._retry_at = 0.0
        self.connections = 0

    def get(self, key: str) -> bytes:
        """The value of a key; empty where there is none."""
        # Comparing with nothing and setting nothing reads without waiting for the key, which `get` would.
        value: bytes = self._call(lambda client: client.compare_set(key, "", ""))
        return value

    def has(self, key: str) -> bool:
        """Whether there is a key. Unlike `get`, leaves no empty value behind, so it suits keys that others wait for."""
        return bool(self._call(lambda client: client.check([key])))

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._call(lambda client: client.set(key, value))

    def swap(self, key: str, expected: bytes, value: str) -> bytes:
        """Set a key if its value is `expected` (empty: if there is none) and return what it holds now."""
        current: bytes = self._call(lambda client: client.compare_set(key, expected.decode(), value))
        if current == expected and current != value.encode():
            # torch answers a comparison with an absent key by the expected value, as if it were there.
            return self.get(key)
        return current

    def client(self, *, wait_seconds: float) -> TCPStore:
        """A connection of its own for an owner that needs a torch store; its reads wait up to `wait_seconds`."""
        client = _bounded(lambda: self._connect(wait_seconds), self._timeout_seconds)
        assert isinstance(client, TCPStore)
        return client

    def _connect(self, wait_seconds: float) -> TCPStore:
        # torch retries a refused connection until its time is up; a plain connection fails at once.
        socket.create_connection((self._host, self._port), timeout=min(_CONNECT_SECONDS, self._timeout_seconds)).close()
        return TCPStore(self._host, self._port, is_master=False, timeout=timedelta(seconds=wait_seconds))

    def _call(self, operation: Callable[[TCPStore], Any]) -> Any:
        with self._lock:
            if self._client is None and time.monotonic() < self._retry_at:
                raise StoreUnavailableError(f"the store at {self._host}:{self._port} did not answer a moment ago")
            try:
                if self._client is None:
                    self._client = self.client(wait_seconds=self._timeout_seconds)
                    self.connections += 1
                client = self._client
                return _bounded(lambda: operation(client), self._timeout_seconds)
            except StoreUnavailableError:
                self._client = None
                self._retry_at = time.monotonic() + _RETRY_SECONDS
                raise


def _bounded(function: Callable[[], Any], seconds: float) -> Any:
    """Run a call that may block for ever in a thread of its own, and leave it behind when its time is up."""
    results: list[Any] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except (OSError, RuntimeError, ValueError) as error:  # what pybind makes of a store's failures
            failures.append(error)

    thread = threading.Thread(target=run, name="store-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    if failures:
        raise StoreUnavailableError(f"the store failed: {type(failures[0]).__name__}") from failures[0]
    raise StoreUnavailableError(f"the store did not answer within {seconds:g} s")
