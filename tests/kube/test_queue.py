"""The queue of keys: one pass of a key at a time, wishes become one, failures wait longer and hold nobody up."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from sonoforge_operator.cluster.freshness import Freshness
from sonoforge_operator.cluster.jobs import Site
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.names import Key
from sonoforge_operator.cluster.probes import State
from sonoforge_operator.cluster.queue import Queue, back_off
from sonoforge_operator.cluster.reconciler import Reconciler
from sonoforge_operator.cluster.store import Store

A, B = Key("n", "a"), Key("n", "b")


def run(scenario):
    async def timed():
        async with asyncio.timeout(20):
            return await scenario()

    return asyncio.run(timed())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def queue() -> Queue:
    return Queue(clock=asyncio.get_running_loop().time, draw=lambda: 0.5)


async def worked(q, handle, workers=3):
    return [asyncio.create_task(q.work(handle)) for _ in range(workers)]


def test_never_two_passes_of_a_key_at_once_and_wishes_become_one():
    async def scenario():
        q, running, seen, gate = queue(), set(), [], asyncio.Event()

        async def handle(key):
            assert key not in running
            running.add(key)
            seen.append(key)
            await gate.wait()
            running.discard(key)

        tasks = await worked(q, handle)
        q.wake(A)
        await until(lambda: seen == [A])
        for _ in range(10):
            q.wake(A)  # while it runs
        q.wake(B)
        await until(lambda: B in seen)
        gate.set()
        await until(lambda: len(seen) == 3)
        await asyncio.sleep(0.3)
        assert sorted(map(str, seen)) == ["n/a", "n/a", "n/b"]
        for task in tasks:
            task.cancel()

    run(scenario)


def test_a_poisoned_key_waits_longer_and_longer_and_delays_no_other():
    async def scenario():
        q, failures, passes = queue(), [], []
        loop = asyncio.get_running_loop()

        async def handle(key):
            if key == A:
                failures.append(loop.time())
                raise ValueError("poison")
            passes.append(loop.time())
            return 0.0

        tasks = await worked(q, handle, workers=1)
        q.wake(A)
        q.wake(B)
        await until(lambda: len(failures) == 3)
        assert failures[2] - failures[1] > 1.5 * (failures[1] - failures[0])
        assert len(passes) > 5
        assert max(later - earlier for earlier, later in itertools.pairwise(passes)) < 0.5
        for task in tasks:
            task.cancel()

    run(scenario)


def test_an_earlier_wish_replaces_a_later_one_and_a_later_one_does_not():
    async def scenario():
        q, seen = queue(), []

        async def handle(key):
            seen.append(key)

        q.wake(A, 60)
        q.wake(A, 0.05)
        q.wake(A, 30)
        tasks = await worked(q, handle)
        await until(lambda: seen == [A])
        assert q.depth == 0
        for task in tasks:
            task.cancel()

    run(scenario)


@pytest.mark.parametrize("turns", range(5))
def test_workers_end_when_they_are_cancelled_just_as_something_changes(turns):
    async def scenario():
        q = queue()
        q.wake(A, 60.0)

        async def handle(key):
            del key

        tasks = await worked(q, handle)
        await asyncio.sleep(0.01)
        q.wake(B, 50.0)
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=2)
        assert all(task.done() for task in tasks)

    run(scenario)


def test_what_the_server_asks_to_wait_is_waited():
    async def scenario():
        q, seen = queue(), []
        loop = asyncio.get_running_loop()

        class BusyError(Exception):
            retry_after = 1.0

        async def handle(key):
            seen.append(loop.time())
            if len(seen) == 1:
                raise BusyError

        tasks = await worked(q, handle)
        q.wake(A)
        await until(lambda: len(seen) == 2)
        assert seen[1] - seen[0] >= 1.0
        for task in tasks:
            task.cancel()

    run(scenario)


def test_the_wait_after_failures_grows_to_a_minute_and_no_further():
    waits = [back_off(n, 1.0) for n in range(1, 60)]
    assert waits[:3] == [0.5, 1.0, 2.0]
    assert waits == sorted(waits)
    assert waits[-1] == 60.0
    assert back_off(1, 0.0) == 0.25


def test_a_failure_that_passes_soon_is_never_waited_for_long():
    """A pass that loses a race was done in good part: those that follow must not wait longer and longer."""

    async def scenario():
        q, seen = queue(), []

        class RaceError(Exception):
            longest_wait = 0.2

        async def handle(key):
            seen.append(key)
            raise RaceError

        tasks = await worked(q, handle)
        q.wake(A)
        await until(lambda: len(seen) == 10)  # within 20 s; without the limit it takes minutes
        for task in tasks:
            task.cancel()

    run(scenario)


def test_a_pass_that_hangs_is_seen_in_the_age_of_the_oldest_wish():
    async def scenario():
        q, began = queue(), asyncio.Event()

        async def handle(key):
            began.set()
            await asyncio.Event().wait()

        tasks = await worked(q, handle)
        assert q.oldest == 0.0
        q.wake(A)
        await began.wait()
        assert q.depth == 0
        await until(lambda: q.oldest > 0.1)
        for task in tasks:
            task.cancel()

    run(scenario)


def test_a_long_queue_that_moves_is_old_and_not_idle():
    """An operator with much to do must not be taken for one that does nothing: a restart would begin it all again."""

    async def scenario():
        now, ages, idle = [0.0], [], []
        q = Queue(clock=lambda: now[0])

        async def handle(key):
            now[0] += 100.0
            ages.append(q.oldest)
            idle.append(q.idle)

        for number in range(6):
            q.wake(Key("n", str(number)))
        tasks = await worked(q, handle, workers=1)
        await until(lambda: len(ages) == 6)
        assert ages == [100.0, 200.0, 300.0, 400.0, 500.0, 100.0]
        assert idle == [100.0] * 6
        await asyncio.sleep(0)
        now[0] += 1000.0
        assert q.idle == 0.0, "nothing is due"
        for task in tasks:
            task.cancel()

    run(scenario)


def test_a_queue_in_which_no_pass_ends_is_idle_for_as_long_as_one_could():
    async def scenario():
        now, began = [0.0], asyncio.Event()
        q = Queue(clock=lambda: now[0])

        async def handle(key):
            began.set()
            await asyncio.Event().wait()

        q.wake(B, 50.0)
        now[0] = 100.0
        assert q.idle == 50.0, "nobody works"
        tasks = await worked(q, handle)
        await began.wait()
        now[0] = 130.0
        assert q.idle == 30.0
        for task in tasks:
            task.cancel()

    run(scenario)


def test_an_operator_whose_jobs_wait_long_is_healthy_as_long_as_passes_end():
    now, store, metrics = [0.0], Store(), Metrics()
    q = Queue(clock=lambda: now[0])
    freshness = Freshness(None, store, ("n",), metrics, lambda kind, key: None, steady=lambda: 0.0)
    reconciler = Reconciler(None, store, None, Site(default_image="", operator_namespace="n"), metrics)
    state = State(freshness, q, reconciler, metrics, None, stuck_seconds=300.0, started=True)

    seen = []

    async def handle(key):
        now[0] += 200.0
        seen.append((q.oldest, state.healthy))

    async def scenario():
        q.wake(A)
        q.wake(B)
        q.wake(Key("n", "c"))
        tasks = await worked(q, handle, workers=1)
        await until(lambda: len(seen) == 3)
        assert seen == [(200.0, True), (400.0, True), (200.0, True)]
        for task in tasks:
            task.cancel()
        q.wake(A)
        now[0] += 300.0
        assert not state.healthy, "nobody works"

    run(scenario)
