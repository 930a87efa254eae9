"""Keys that wait for a pass: never two passes of one key at once, wishes for the same key become one."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from sonoforge_operator.cluster.names import Key

_FIRST_SECONDS, _LONGEST_SECONDS = 0.5, 60.0
_REST_SECONDS = 0.1
"""Rest between two passes of a key, in which further events become one."""


def back_off(failures: int, draw: float) -> float:
    """Seconds to wait after so many failures in a row, with `draw` (0..1) of jitter."""
    longest = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2.0 ** min(failures - 1, 20))
    return longest * (0.5 + 0.5 * draw)


@dataclass
class _Entry:
    due: float = float("inf")
    running: bool = False
    began: float = 0.0
    failures: int = 0
    version: int = 0


@dataclass
class Queue:
    """Passes over keys. `clock` is the event loop's by default."""

    clock: Callable[[], float]
    draw: Callable[[], float] = random.random
    _entries: dict[Key, _Entry] = field(default_factory=dict)
    _heap: list[tuple[float, int, Key]] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _count: itertools.count[int] = field(default_factory=itertools.count)
    _ended: float = float("-inf")

    def wake(self, key: Key, after: float = 0.0) -> None:
        """Ask for a pass over a key. The earliest wish counts."""
        entry = self._entries.setdefault(key, _Entry())
        due = self.clock() + after
        if due < entry.due:
            entry.due = due
            entry.version = next(self._count)
            if due < float("inf"):
                heapq.heappush(self._heap, (due, entry.version, key))
                self._changed.set()

    @property
    def depth(self) -> int:
        """Keys that are due and wait."""
        now = self.clock()
        return sum(entry.due <= now and not entry.running for entry in self._entries.values())

    @property
    def oldest(self) -> float:
        """Seconds for which the oldest wish is not fulfilled: its key waits for a pass, or is in one."""
        now = self.clock()
        since = ((e.began if e.running else e.due) for e in self._entries.values())
        return max((now - began for began in since if began <= now), default=0.0)

    @property
    def idle(self) -> float:
        """Seconds for which no pass ended although one was due or going on. A long queue that moves is not idle."""
        now = self.clock()
        first = min((e.began if e.running else e.due for e in self._entries.values()), default=now)
        return max(0.0, now - max(first, self._ended))

    async def work(self, handle: Callable[[Key], Awaitable[float | None]]) -> None:
        """Make passes until cancelled. `handle` returns the seconds to the next pass; None forgets the key.

        Whatever it raises concerns that key alone: it is tried again, later and later. An exception may carry
        `retry_after` and `longest_wait` in seconds.
        """
        while True:
            key, entry = await self._next()
            entry.running, entry.due, entry.began = True, float("inf"), self.clock()
            after: float | None
            try:
                after = await handle(key)
                entry.failures = 0
            except Exception as error:  # noqa: BLE001 - one poisoned object must not hold up another
                entry.failures += 1
                asked = getattr(error, "retry_after", 0.0)
                longest = getattr(error, "longest_wait", _LONGEST_SECONDS)
                after = max(asked, min(longest, back_off(entry.failures, self.draw())))
            finally:
                entry.running = False
                self._ended = self.clock()
            if after is None and entry.due == float("inf"):
                self._entries.pop(key, None)
                continue
            due = min(entry.due, self.clock() + (float("inf") if after is None else after))
            entry.due = float("inf")
            self.wake(key, max(_REST_SECONDS, due - self.clock()))

    async def _next(self) -> tuple[Key, _Entry]:
        while True:
            wait: float | None = None
            while self._heap:
                due, version, key = self._heap[0]
                entry = self._entries.get(key)
                if entry is None or entry.version != version or entry.due != due:
                    heapq.heappop(self._heap)  # a wish that an earlier one replaced, or that was fulfilled
                    continue
                if entry.running:
                    heapq.heappop(self._heap)  # it asks again when it ends
                    continue
                wait = due - self.clock()
                if wait > 0:
                    break
                heapq.heappop(self._heap)
                return key, entry
            self._changed.clear()
            # Not wait_for, which loses a cancellation that comes together with a change.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()
