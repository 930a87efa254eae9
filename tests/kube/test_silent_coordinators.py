"""Runs that do not answer: each visit costs seconds, so they are visited less and less often."""

from __future__ import annotations

import asyncio
import errno
from unittest.mock import Mock

import aiohttp
import pytest
from coordinator import NAMES, Run, opened

from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_trainer.contract import Progress, Request


def test_a_silent_run_is_asked_after_twice_the_time_and_at_least_once_a_minute():
    async def story():
        async with opened() as run:
            said = await run.ask_every_second(250)
            assert set(said) == {None}
            assert run.visits == [0, 1, 2, 4, 8, 16, 32, 64, 124, 184, 244]

    asyncio.run(story())


def test_a_run_that_answers_again_is_asked_every_time():
    async def story():
        async with opened() as run:
            await run.ask_every_second(5)
            run.answers = True
            said = await run.ask_every_second(6)
            assert [answer is not None for answer in said] == [False, False, False, True, True, True]
            run.answers = False
            run.visits.clear()
            await run.ask_every_second(12)
            assert run.visits == [*range(11, 18)], "and it starts from the beginning"
            await run.ask_every_second(20)
            assert run.visits[7:] == [23, 35]

    asyncio.run(story())


async def request_every_second(run: Run, seconds: int, id_: str) -> list[bool]:
    heard = []
    for _ in range(seconds):
        heard.append(await run.visitor.ask(NAMES, Request(kind="stop", id=id_)))
        run.now[0] += 1.0
    return heard


def test_a_run_that_takes_no_request_is_asked_less_and_less_often_though_it_tells_its_progress():
    async def story():
        async with opened() as run:
            assert await request_every_second(run, 10, "a") == [False] * 10
            assert run.visits == [0, 1, 2, 4, 8]
            run.answers = True
            assert await run.ask_every_second(1) == [Progress()]
            run.answers = False
            run.visits.clear()
            assert await request_every_second(run, 10, "a") == [False] * 10
            assert run.visits == [16], "what it says does not count for what it hears"

    asyncio.run(story())


def test_what_was_heard_is_sent_again_after_half_a_minute_and_at_once_to_another_coordinator():
    async def story():
        async with opened() as run:
            run.answers = True
            assert await request_every_second(run, 62, "a") == [True] * 62
            assert run.visits == [0, 30, 60]
            assert await request_every_second(run, 1, "b") == [True]
            run.visitor.forget(NAMES.uid)
            assert await request_every_second(run, 1, "b") == [True]
            assert run.visits == [0, 30, 60, 62, 63]

    asyncio.run(story())


def test_a_coordinator_that_was_replaced_is_asked_at_once():
    async def story():
        async with opened() as run:
            await run.ask_every_second(40)
            run.answers = True
            run.visitor.forget(NAMES.uid)
            assert await run.ask_every_second(1) == [Progress()]

    asyncio.run(story())


def test_a_run_that_nobody_serves_costs_nothing_and_is_asked_every_time():
    async def story():
        async with opened() as run:
            now = run.now
            async with Coordinators(b"k" * 32, "http://127.0.0.1:9", steady=lambda: now[0]) as visitor:
                run.visitor = visitor
                assert await run.ask_every_second(5) == [None] * 5
                assert visitor._silent == {}

    asyncio.run(story())


@pytest.mark.parametrize(("number", "silent"), [(errno.EHOSTUNREACH, True), (errno.ECONNREFUSED, False)])
def test_a_host_that_cannot_be_reached_is_silent_and_one_that_refuses_is_not(monkeypatch, number: int, silent: bool):
    async def story():
        async with opened() as run:

            def fail(*_: object, **__: object) -> None:
                raise aiohttp.ClientConnectorError(Mock(), OSError(number, "away"))

            monkeypatch.setattr(run.visitor._session, "request", fail)
            assert await run.ask_every_second(3) == [None] * 3
            assert bool(run.visitor._silent) == silent

    asyncio.run(story())
