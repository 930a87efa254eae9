"""A proxy before the real API server that answers for it, cuts it off, silences or delays it, as a test asks."""

from __future__ import annotations

import asyncio
import random
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length", "content-encoding"}


@dataclass
class Faults:
    """What goes wrong. Shares are of requests, 0..1, drawn by a seed."""

    refuse: dict[int, float] = field(default_factory=dict)
    """Share of writes that are refused, by HTTP status."""
    refuse_reads: dict[int, float] = field(default_factory=dict)
    """Share of gets, lists and watches that are refused, by HTTP status."""
    lose: float = 0.0
    """Share of writes that are carried out and whose answer is lost."""
    cut_watch_seconds: float | None = None
    """Watches are cut off after this time, in the middle of a line."""
    gone: float = 0.0
    """Share of watches that are told at once that what they ask for is gone."""
    silence: bool = False
    """Watches stay open and say nothing more."""
    delay_seconds: float = 0.0
    """Every answer is late by this."""
    error: bool = False
    """Watches say that the server failed, and end."""
    hold: str | None = None
    """Writes to paths that match this expression are neither passed on nor answered, as long as this lasts."""
    only: str = ""
    """Refusals and silence are of requests to paths that match this expression alone."""


class FaultProxy:
    """The proxy, on http://127.0.0.1, in a thread with a loop of its own."""

    def __init__(self, url: str, ca_file: str, seed: int = 0) -> None:
        self._target = url
        self._ssl = ssl.create_default_context(cafile=ca_file)
        self._draw = random.Random(seed)
        self.faults = Faults()
        self.counts: Counter[str] = Counter()
        """How often each fault happened."""
        self.passed: list[tuple[float, str]] = []
        """Writes that the server took: the time by time.monotonic, and the path."""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._ready.wait()

    @contextmanager
    def wrong(self, **faults: Any) -> Iterator[None]:
        """These faults happen while this is entered."""
        self.faults = Faults(**faults)
        try:
            yield
        finally:
            self.faults = Faults()

    def close(self) -> None:
        """Stop serving."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await self._runner.cleanup()
        await self._session.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._loop.run_forever()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._ssl, limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._pass)
        # A visitor that leaves ends its request here too; a watch would be kept up for nobody.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        self._ready.set()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        faults, watch = self.faults, request.query.get("watch") in ("true", "1")
        if faults.delay_seconds:
            self.counts["late"] += 1
            await asyncio.sleep(faults.delay_seconds)
        write = request.method != "GET"
        if write and faults.hold is not None and re.search(faults.hold, request.path):
            self.counts["held"] += 1
            while self.faults is faults:  # or until the visitor gives up
                await asyncio.sleep(0.05)
        if re.search(faults.only, request.path):
            kind = "write" if write else "watch" if watch else "read"
            for status, share in (faults.refuse if write else faults.refuse_reads).items():
                if self._draw.random() < share:
                    self.counts[f"refused {status}"] += 1
                    self.counts[f"refused {kind}"] += 1
                    return _refusal(status)
        if watch and self._draw.random() < faults.gone:
            self.counts["gone"] += 1
            return web.json_response({"type": "ERROR", "object": _status(410)})  # as the API server says it
        if watch and faults.error:
            self.counts["failed"] += 1
            return web.json_response({"type": "ERROR", "object": _status(500)})
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        headers["Accept-Encoding"] = "identity"
        body = await request.read() if request.can_read_body else None
        answer = await self._session.request(
            request.method, f"{self._target}{request.path_qs}", data=body, headers=headers
        )
        async with answer:
            if write and answer.status < 400:
                self.passed.append((time.monotonic(), request.path))
            if write and self._draw.random() < faults.lose:
                self.counts["lost"] += 1
                await answer.read()
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            await (self._watch(request, answer, response) if watch else _copy(answer, response))
        return response

    async def _watch(self, request: web.Request, answer: aiohttp.ClientResponse, response: web.StreamResponse) -> None:
        began, rest = self._loop.time(), b""
        while True:
            try:
                async with asyncio.timeout(0.2):
                    data = await answer.content.readany()
            except TimeoutError:
                data = None
            if data == b"":
                return
            # Whole lines are passed on or not: half of one is what only a cut leaves.
            lines, end, rest = (rest + (data or b"")).rpartition(b"\n")
            cut = self.faults.cut_watch_seconds
            if cut is not None and self._loop.time() - began > cut:
                self.counts["cut"] += 1
                await response.write(lines[: len(lines) // 2])
                assert request.transport is not None
                request.transport.abort()
                return
            if self.faults.silence and re.search(self.faults.only, request.path):
                self.counts["silenced"] += bool(lines)
            elif lines:
                await response.write(lines + end)


async def _copy(answer: aiohttp.ClientResponse, response: web.StreamResponse) -> None:
    async for data in answer.content.iter_any():
        await response.write(data)


def _refusal(status: int) -> web.Response:
    headers = {"Retry-After": "1"} if status == 429 else {}
    return web.json_response(_status(status), status=status, headers=headers)


def _status(code: int) -> dict[str, Any]:
    reason = {409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason.get(code, ""),
        "message": "a fault of the test",
        "code": code,
    }
