"""kopf's tasks end, also those that one cancellation does not reach."""

from __future__ import annotations

import asyncio

import pytest

from sonoforge_operator.cluster.watches import watch


class GivenUpError(Exception):
    """What a root task raises."""


async def _give_up() -> None:
    raise GivenUpError


async def _swallow(times: int, seen: list[int]) -> None:
    """Take so many cancellations for something else and begin again, as a watch of kopf does."""
    for number in range(times):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(number)
    await asyncio.Event().wait()


async def _watched(times: int, seen: list[int], *, cancelled: bool) -> bool:
    """Watch with a root that gives up, or until cancelled, beside a task that swallows. Whether that one ended."""
    others = asyncio.all_tasks()
    roots = [asyncio.ensure_future(asyncio.Event().wait() if cancelled else _give_up())]
    beside = asyncio.create_task(_swallow(times, seen))
    watching = asyncio.create_task(watch(roots, others))
    await asyncio.sleep(0.01)
    if cancelled:
        watching.cancel()
    with pytest.raises(asyncio.CancelledError if cancelled else GivenUpError):
        await watching
    return beside.done()


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_watch_that_takes_its_cancellation_for_a_pause_ends_all_the_same(cancelled):
    seen: list[int] = []
    assert asyncio.run(_watched(3, seen, cancelled=cancelled))
    assert seen == [0, 1, 2]
