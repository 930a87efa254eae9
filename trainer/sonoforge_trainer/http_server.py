"""What our HTTP servers share: a limit of connections, and bearer tokens from a file."""

from __future__ import annotations

import hashlib
import hmac
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import structlog

from sonoforge_trainer.contract import ContractError

READ_SECONDS = 10.0
"""Longest silence of a visitor in the middle of a request."""

_CONNECTIONS = 32
_DIGEST = "sha256:"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class BoundedServer(ThreadingHTTPServer):
    """Serves a limited number of connections at once, each in a thread, and closes those beyond."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        super().__init__(address, handler)
        self._places = threading.BoundedSemaphore(_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """See base class. Closes connections beyond a limit instead of starting threads without one."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """See base class."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """See base class. A visitor that hangs up is no news."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log.error("http-failed", exception=type(error).__name__)


def admits(token_file: Path, header: str | None) -> bool:
    """Whether an Authorization header holds the token of the file, which is read each time so that it can change."""
    try:
        expected = read_token(token_file)
    except ContractError:
        return False
    given = (header or "").removeprefix("Bearer ") if (header or "").startswith("Bearer ") else ""
    if expected.startswith(_DIGEST):
        given = _DIGEST + hashlib.sha256(given.encode(errors="replace")).hexdigest()
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())


def read_token(path: Path) -> str:
    """Read a token file: the token, or `sha256:` and its hexadecimal digest, which is no secret.

    Raises ContractError where it is missing or holds too little.
    """
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"token file {path}: not readable ({type(error).__name__})") from None
    if len(token) < 16:
        raise ContractError(f"token file {path}: holds {len(token)} characters; put at least 16 random ones into it")
    return token
