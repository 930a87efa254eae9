"""Run kopf's watches until one of its tasks ends, and then end all of them.

kopf's own way cancels its tasks once and waits for them without limit, and one cancellation can get lost: a watch that
waits for new credentials takes it for a pause where the pause was cancelled in the same moment, and begins again. The
operator would have given up, and would still hold its Lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Set

_TIDY_SECONDS = 2.0
"""Time for kopf's root tasks to end what they began, and to close their connections."""
_AGAIN_SECONDS = 0.1


async def watch(roots: Collection[asyncio.Task[object]], others: Set[asyncio.Task[object]]) -> None:
    """Wait until one of kopf's root tasks ends, and raise what it raised.

    Whenever this returns or raises, every task is over that is not among `others`: kopf makes tasks that it names to
    nobody.
    """
    try:
        done, _ = await asyncio.wait(roots, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await _end(roots, others)


async def _end(roots: Collection[asyncio.Task[object]], others: Set[asyncio.Task[object]]) -> None:
    for task in roots:
        task.cancel()
    await asyncio.wait(roots, timeout=_TIDY_SECONDS)
    while left := asyncio.all_tasks() - others - {asyncio.current_task()}:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_AGAIN_SECONDS)
