"""Visits to the coordinators of jobs: what a run says, and what is asked of it."""

from __future__ import annotations

import errno
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace, TracebackType
from typing import Self
from urllib.parse import urlsplit

import aiohttp

from sonoforge_operator.cluster.desired import ClusterJob
from sonoforge_operator.cluster.names import Names
from sonoforge_trainer.contract import ContractError, Progress, Request

DEFAULT_URL = "http://{service}.{namespace}.svc:8080"
"""Where the coordinator of a job answers, by the name of its Service."""

_SECONDS = 3.0
_LONGEST_WAIT_SECONDS = 60.0
_AGAIN_SECONDS = 30.0
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ETIMEDOUT)
"""What a connection ends with where nobody has the address any more: silence, told early."""
_LOST_SECONDS = 6.0
"""Between the starts of the first and the last visit in vain. With the time of the last one, about ten of silence."""
_LOST_VISITS = 3
"""Visits in vain that it takes at least."""
_LOST_PART = 10
"""At most one part in so many of the nodes may be silent at once; of fewer nodes, one."""
_DOUBT_SECONDS = 0.2
"""Time at least between two passes over a run that may be lost."""
_TELL_SECONDS, _TELL_AGAIN_SECONDS = 60.0, 1.0
"""For how long a new coordinator is told who was lost with the one before, and how often."""
_MOURN_SECONDS = 600.0
"""For how long the new coordinator may take to come."""
_MOST_BYTES = 4 * 2**20
_MOST_CHECKPOINTS, _LONGEST_URI = 10_000, 1024


@dataclass(frozen=True)
class _Silence:
    """Visits in vain, one after the other."""

    since: float
    """When the first one began."""
    asked: float
    """When the last one began."""
    until: float
    """Until when the run is left alone."""
    visits: int
    """How many there were."""


@dataclass
class _Mourned:
    """Who was lost with a coordinator."""

    node: str
    """The machine that it was on."""
    lost: dict[str, str]
    """Addresses of the workers there that its successor was not told of yet, by the uids of their pods."""
    until: float
    """Until when it is told."""
    told: bool = False
    """Whether the successor was there to be told."""


@dataclass
class _Visit:
    named: bool = False
    """Whether the name of the coordinator was resolved, or is an address."""


def _tracing_names() -> aiohttp.TraceConfig:
    async def named(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        context.trace_request_ctx.named = True

    traced = aiohttp.TraceConfig()
    traced.on_dns_resolvehost_end.append(named)
    return traced


def _is_address(url: str) -> bool:
    try:
        ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return False
    return True


def token_of(key: bytes, uid: str) -> str:
    """The bearer token for the coordinator of a job. It follows from the operator's key and is kept nowhere."""
    return hmac.new(key, f"coordinator {uid}".encode(), hashlib.sha256).hexdigest()


def token_digest(token: str) -> str:
    """What the coordinator is given to compare a token with."""
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


class Coordinators:
    """A visitor with the operator's key. Whoever has not answered after `seconds` is left.

    A run that is silent costs that time at every visit, so it is asked again only after it was silent for as long
    again, and at least once a minute; what it says and what it hears apart. Only who told its progress before is asked
    again at once, until it is decided whether it is lost. `steady` gives seconds.
    """

    def __init__(
        self,
        key: bytes,
        url: str = DEFAULT_URL,
        *,
        seconds: float = _SECONDS,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key, self._url, self._seconds, self._steady = key, url, seconds, steady
        self._silent: dict[tuple[str, str], _Silence] = {}
        self._heard: dict[str, tuple[str, float]] = {}  # by uid: the newest request that was heard, and when
        self._known: dict[str, str] = {}  # by uid, of who told its progress: the node of its coordinator
        self._answered: dict[str, float] = {}  # by uid, of who told its progress: when it last did
        self._mourned: dict[str, _Mourned] = {}  # by uid
        self._doubted = float("-inf")  # when our own network was last at fault
        # A coordinator is inside the cluster: a proxy of the environment must neither be asked nor see the token.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=seconds),
            # Without its cache each visit resolves the name for itself, so that its end tells whether it could.
            connector=aiohttp.TCPConnector(limit=0, force_close=True, use_dns_cache=False),
            trust_env=False,
            trace_configs=[_tracing_names()],
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

    async def progress(self, names: Names, node: str = "") -> Progress | None:
        """What a run says; None where nobody answers in time, or what makes no sense, or it is left alone for now.

        `node` names the machine of its coordinator. Where it is another one than before, so is the coordinator.
        """
        if node and self._known.get(names.uid, node) not in ("", node):
            self.forget(names.uid)
        body = await self._patiently(names, "/progress")
        if body is None:
            return None
        self._known[names.uid], self._answered[names.uid] = node, self._steady()
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

    def lost(self, uid: str) -> str | None:
        """The node of a coordinator that told its progress and is silent since, as if the node were cut off, or None.

        Visits decide, not the time between them, and where coordinators on other nodes are known, one of them has
        answered meanwhile. Where visits to more than one node and more than a tenth of them fail at once, or names are
        not resolved, it is our own network that is at fault: silence before that does not count.
        """
        node, silence = self._known.get(uid, ""), self._silent.get((uid, "/progress"))
        if not node or silence is None or silence.visits < _LOST_VISITS:
            return None
        if silence.asked - max(silence.since, self._doubted) < _LOST_SECONDS:
            return None
        others = [each for each, where in self._known.items() if where not in ("", node)]
        if others and max(self._answered[each] for each in others) < silence.since + self._seconds:
            return None
        return node

    def asks_again(self, uid: str) -> float | None:
        """Seconds until a run should be visited again that cannot wait for its turn; None for all others."""
        silence, mourned = self._silent.get((uid, "/progress")), self._mourned.get(uid)
        if silence is not None and self._in_doubt(uid, silence):
            return max(_DOUBT_SECONDS, silence.until - self._steady())
        return _TELL_AGAIN_SECONDS if mourned is not None and mourned.told else None

    def _in_doubt(self, uid: str, silence: _Silence) -> bool:
        """Whether a coordinator that told its progress is silent since, but not yet for long enough to be lost."""
        return uid in self._known and silence.asked - silence.since < _LOST_SECONDS

    def _doubt(self, *, named: bool, now: float) -> None:
        """Note whether it is our own network that is at fault, after a visit in vain."""
        nodes = {node for node in self._known.values() if node}
        silent = {node for uid, node in self._known.items() if node and (uid, "/progress") in self._silent}
        if not named or len(silent) > max(1, len(nodes) // _LOST_PART):
            self._doubted = now

    def mourn(self, uid: str, node: str, lost: Mapping[str, str]) -> None:
        """Remember who was lost with a coordinator on this node: addresses of workers by the uids of their pods.

        Its successor begins with what the survivors know, and would wait for the heartbeats of those workers.
        """
        now = self._steady()
        for over in [each for each, mourned in self._mourned.items() if now >= mourned.until]:
            del self._mourned[over]
        self._mourned[uid] = _Mourned(node, dict(lost), now + _MOURN_SECONDS)

    async def tell_lost(self, names: Names, node: str, present: Mapping[str, str]) -> None:
        """Tell a coordinator on this node who was lost with the one before, until it takes it, for a minute.

        `present` are the addresses of the workers that are known, by the uids of their pods: whoever has the address of
        one that was lost is not meant. A visit in vain ends it for now.
        """
        mourned = self._mourned.get(names.uid)
        if mourned is None or node in ("", mourned.node):
            return
        if not mourned.told:
            mourned.told, mourned.until = True, min(mourned.until, self._steady() + _TELL_SECONDS)
        for uid, address in list(mourned.lost.items()):
            if self._steady() >= mourned.until:
                mourned.lost.clear()
                break
            anew = any(address == other for each, other in present.items() if each != uid)
            if anew or await self.ask(names, Request(kind="lost", node=address, id=uid)):
                mourned.lost.pop(uid, None)
            elif (names.uid, "/request") in self._silent:
                return
        if not mourned.lost:
            self._mourned.pop(names.uid, None)

    def forget(self, uid: str) -> None:
        """Forget what a run said and heard: it is gone, or its coordinator is another one."""
        self._heard.pop(uid, None)
        self._known.pop(uid, None)
        self._answered.pop(uid, None)
        for path in ("/progress", "/request"):
            self._silent.pop((uid, path), None)

    async def _patiently(self, names: Names, path: str, body: bytes | None = None) -> bytes | None:
        """A visit, unless the run was silent there and is left alone for now."""
        key, now = (names.uid, path), self._steady()
        silence = self._silent.get(key)
        if silence is not None and now < silence.until:
            return None
        visit = _Visit()
        try:
            answer = await self._visit(names, path, body, visit)
        except TimeoutError:
            since, visits = (silence.since, silence.visits) if silence is not None else (now, 0)
            found = _Silence(since, asked=now, until=now, visits=visits + 1)
            again = self._seconds if path == "/progress" and self._in_doubt(names.uid, found) else now - since
            self._silent[key] = replace(found, until=now + min(_LONGEST_WAIT_SECONDS, again))
            self._doubt(named=visit.named, now=now)
            return None
        self._silent.pop(key, None)
        return answer

    async def _visit(self, names: Names, path: str, body: bytes | None, visit: _Visit) -> bytes | None:
        url = self._url.format(service=names.coordinator, namespace=names.key.namespace, job=names.key.name) + path
        visit.named = _is_address(url)
        headers = {"Authorization": f"Bearer {token_of(self._key, names.uid)}", "Content-Type": "application/json"}
        try:
            method = "POST" if body is not None else "GET"
            async with self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=visit
            ) as answer:
                if answer.status not in (200, 202):
                    return None
                found = await answer.content.read(_MOST_BYTES + 1)
                while not answer.content.at_eof() and len(found) <= _MOST_BYTES:
                    found += await answer.content.read(_MOST_BYTES + 1 - len(found))
        except TimeoutError:
            raise
        except aiohttp.ClientConnectorError as error:
            if error.os_error.errno in _UNREACHABLE:
                raise TimeoutError from None
            return None
        except (aiohttp.ClientError, OSError, ValueError):
            return None
        return found if len(found) <= _MOST_BYTES else None


def believable(progress: Progress, job: ClusterJob) -> Progress:
    """What a coordinator says, without checkpoints that cannot be this job's."""
    spec = job.file.job.spec
    place = spec.checkpoints.uri.rstrip("/") + "/"

    def ours(uri: str) -> bool:
        return uri.startswith(place) and len(uri) <= _LONGEST_URI

    refs = [ref for ref in progress.checkpoints if ours(ref.uri) and 0 <= ref.step <= spec.training.recipe.steps]
    damaged = [uri for uri in progress.quarantined if ours(uri)]
    return progress.model_copy(
        update={"checkpoints": tuple(refs[:_MOST_CHECKPOINTS]), "quarantined": tuple(damaged[:_MOST_CHECKPOINTS])}
    )
