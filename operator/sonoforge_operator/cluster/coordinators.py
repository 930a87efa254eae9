"""Visits to the coordinators of jobs: what a run says, and what is asked of it."""

from __future__ import annotations

import errno
import hashlib
import hmac
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import aiohttp

from sonoforge_operator.cluster.names import Names
from sonoforge_trainer.contract import ContractError, Progress, Request

DEFAULT_URL = "http://{service}.{namespace}.svc:8080"
"""Where the coordinator of a job answers, by the name of its Service."""

_SECONDS = 3.0
_LONGEST_WAIT_SECONDS = 60.0
_AGAIN_SECONDS = 30.0
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT)
_LOST_SECONDS = 10.0
_LOST_PART = 10
_MOST_BYTES = 4 * 2**20


def token_of(key: bytes, uid: str) -> str:
    """The bearer token for the coordinator of a job. It follows from the operator's key and is kept nowhere."""
    return hmac.new(key, f"coordinator {uid}".encode(), hashlib.sha256).hexdigest()


def token_digest(token: str) -> str:
    """What the coordinator is given to compare a token with."""
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


class Coordinators:
    """A visitor with the operator's key. Whoever has not answered after `seconds` is left.

    A run that is silent costs that time at every visit, so it is asked again only after it was silent for as long
    again, and at least once a minute; what it says and what it hears apart. `steady` gives seconds.
    """

    def __init__(
        self,
        key: bytes,
        url: str = DEFAULT_URL,
        *,
        seconds: float = _SECONDS,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key, self._url, self._steady = key, url, steady
        self._silent: dict[tuple[str, str], tuple[float, float]] = {}  # since when, and until when it is left alone
        self._heard: dict[str, tuple[str, float]] = {}  # by uid: the newest request that was heard, and when
        self._known: set[str] = set()  # who told its progress
        # A coordinator is inside the cluster: a proxy of the environment must neither be asked nor see the token.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=seconds),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    def digest(self, uid: str) -> str:
        """What the coordinator of a job compares tokens with."""
        return token_digest(token_of(self._key, uid))

    async def progress(self, names: Names) -> Progress | None:
        """What a run says; None where nobody answers in time, or what makes no sense, or it is left alone for now."""
        body = await self._patiently(names, "/progress")
        if body is None:
            return None
        self._known.add(names.uid)
        try:
            return Progress.from_json(body, show_values=False)
        except ContractError:
            return None

    async def ask(self, names: Names, request: Request) -> bool:
        """Ask something of a run. Whether it was heard; if not, ask again: the same request counts once.

        What was heard is sent again only after half a minute, for a coordinator that was replaced. A lost node is told
        once, whether or not the run was silent before.
        """
        now = self._steady()
        newest, when = self._heard.get(names.uid, ("", 0.0))
        if newest == request.id and now - when < _AGAIN_SECONDS:
            return True
        if request.kind == "lost":
            self._silent.pop((names.uid, "/request"), None)
        heard = await self._patiently(names, "/request", request.to_json().encode()) is not None
        if heard:
            self._heard[names.uid] = (request.id, now)
        return heard

    def heard(self, uid: str) -> str:
        """Id of the newest request that the coordinator of a run took; empty where none is known."""
        return self._heard.get(uid, ("", 0.0))[0]

    def lost(self, uid: str) -> bool:
        """Whether a run that told its progress has not answered a visit for ten seconds, as if its node were cut off.

        Where more than one run and more than a tenth are silent, it is our own network that fails: none is lost.
        """
        now = self._steady()
        since, _ = self._silent.get((uid, "/progress"), (now, now))
        if uid not in self._known or now - since < _LOST_SECONDS:
            return False
        silent = sum((known, "/progress") in self._silent for known in self._known)
        return silent <= max(1, len(self._known) // _LOST_PART)

    def forget(self, uid: str) -> None:
        """Forget what a run said and heard: it is gone, or its coordinator is another one."""
        self._heard.pop(uid, None)
        self._known.discard(uid)
        for path in ("/progress", "/request"):
            self._silent.pop((uid, path), None)

    async def _patiently(self, names: Names, path: str, body: bytes | None = None) -> bytes | None:
        """A visit, unless the run was silent there and is left alone for now."""
        key, now = (names.uid, path), self._steady()
        since, until = self._silent.get(key, (now, now))
        if now < until:
            return None
        try:
            found = await self._visit(names, path, body)
        except TimeoutError:
            self._silent[key] = (since, now + min(_LONGEST_WAIT_SECONDS, now - since))
            return None
        self._silent.pop(key, None)
        return found

    async def _visit(self, names: Names, path: str, body: bytes | None = None) -> bytes | None:
        url = self._url.format(service=names.coordinator, namespace=names.key.namespace, job=names.key.name) + path
        headers = {"Authorization": f"Bearer {token_of(self._key, names.uid)}", "Content-Type": "application/json"}
        try:
            method = "POST" if body is not None else "GET"
            async with self._session.request(method, url, data=body, headers=headers, allow_redirects=False) as answer:
                if answer.status not in (200, 202):
                    return None
                found = await answer.content.read(_MOST_BYTES + 1)
                while not answer.content.at_eof() and len(found) <= _MOST_BYTES:
                    found += await answer.content.read(_MOST_BYTES + 1 - len(found))
        except TimeoutError:
            raise
        except aiohttp.ClientConnectorError as error:
            if error.os_error.errno in _UNREACHABLE:
                raise TimeoutError from None  # a router said so, or nobody has its address any more
            return None
        except (aiohttp.ClientError, OSError, ValueError):
            return None
        return found if len(found) <= _MOST_BYTES else None
