"""A coordinator of the tests that says nothing until it is told to, and a clock for its visitor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.names import Key, Names
from sonoforge_trainer.contract import Progress, Request

NAMES = Names(Key("n", "x"), "u")


@dataclass
class Run:
    """A coordinator that says nothing until it is told to, and a clock."""

    visitor: Coordinators
    now: list[float]
    visits: list[float] = field(default_factory=list)
    answers: bool = False
    refuses: bool = False
    mute: set[str] = field(default_factory=set)
    """Uids of runs that say nothing, of many."""
    taken: list[Request] = field(default_factory=list)
    """Requests that it took."""

    def lost(self) -> bool:
        return self.visitor.lost(NAMES.uid) is not None

    async def ask_every_second(self, seconds: int) -> list[Progress | None]:
        said = []
        for _ in range(seconds):
            said.append(await self.visitor.progress(NAMES, "node"))
            self.now[0] += 1.0
        return said


@asynccontextmanager
async def opened() -> AsyncIterator[Run]:
    now = [0.0]
    served = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.add(asyncio.current_task())
        run.visits.append(now[0])
        if run.answers:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST") and not run.refuses:
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                run.taken.append(Request.from_json(await reader.readexactly(size)))
            status, body = b"503 Not Yet" if run.refuses else b"200 OK", Progress().to_json().encode()
            writer.write(b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
            writer.write(body)
        else:
            await reader.read()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, Coordinators(b"k" * 32, url, seconds=0.2, steady=lambda: now[0]) as visitor:
        run = Run(visitor, now)
        yield run
    await asyncio.gather(*served)
