"""Runs that do not answer: each visit costs seconds, so they are visited less and less often."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from unittest.mock import AsyncMock, Mock

import aiohttp
import pytest

from sonoforge_operator.cluster.coordinators import Coordinators, _Visit
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


LOST = {"worker-2": "10.0.0.2", "worker-3": "10.0.0.3"}


def test_a_new_coordinator_is_told_who_was_lost_with_the_one_before_until_it_takes_it():
    async def story():
        async with opened() as run:
            run.visitor.mourn(NAMES.uid, "node-1", LOST)
            run.answers = run.refuses = True
            await run.visitor.tell_lost(NAMES, "node-2", LOST)  # the survivors have not joined yet
            run.visitor.forget(NAMES.uid)  # it was not ready for a moment
            assert run.taken == []
            run.refuses = False
            for node in ("", "node-1", "node-2", "node-2"):
                await run.visitor.tell_lost(NAMES, node, LOST)
                assert len(run.taken) == (2 if node == "node-2" else 0), "the old one is not meant"
            assert [(told.kind, told.node, told.id) for told in run.taken] == [
                ("lost", "10.0.0.2", "worker-2"),
                ("lost", "10.0.0.3", "worker-3"),
            ]

    asyncio.run(story())


def test_a_worker_that_a_coordinator_does_not_know_holds_up_no_other():
    async def story():
        async with opened() as run:
            run.answers = run.refuses = True
            run.visitor.mourn(NAMES.uid, "node-1", LOST)
            await run.visitor.tell_lost(NAMES, "node-2", LOST)
            assert len(run.visits) == 2

    asyncio.run(story())


def test_a_coordinator_is_told_no_address_that_is_in_use_again():
    async def story():
        async with opened() as run:
            run.answers = True
            run.visitor.mourn(NAMES.uid, "node-1", LOST)
            await run.visitor.tell_lost(NAMES, "node-2", LOST | {"worker-9": "10.0.0.2"})
            assert [told.id for told in run.taken] == ["worker-3"]

    asyncio.run(story())


def test_a_coordinator_is_not_told_of_losses_that_are_long_past():
    async def story():
        async with opened() as run:
            run.answers = True
            run.visitor.mourn(NAMES.uid, "node-1", LOST)
            run.refuses = True
            run.now[0] += 300.0  # its image is pulled
            await run.visitor.tell_lost(NAMES, "node-2", LOST)
            run.refuses = False
            run.now[0] += 60.0
            await run.visitor.tell_lost(NAMES, "node-2", LOST)
            assert run.taken == []
            assert run.visitor.asks_again(NAMES.uid) is None

    asyncio.run(story())


def test_one_visit_in_vain_is_enough_for_a_pass():
    async def story():
        async with opened() as run:
            run.visitor.mourn(NAMES.uid, "node-1", LOST)
            await run.visitor.tell_lost(NAMES, "node-2", LOST)
            assert len(run.visits) == 1

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


def test_a_run_that_answered_is_asked_again_at_once_and_is_lost_after_six_seconds():
    async def story():
        async with opened() as run:
            run.answers = True
            await run.ask_every_second(3)
            run.answers = False
            run.visits.clear()
            for _ in range(7):
                assert not run.lost()
                await run.ask_every_second(1)
                assert (run.visitor.asks_again(NAMES.uid) is None) == run.lost()
            assert (run.lost(), run.visits) == (True, [3, 4, 5, 6, 7, 8, 9])
            await run.ask_every_second(20)
            assert run.visits[7:] == [15, 27], "then it is left alone for longer and longer"
            run.answers = True
            await run.ask_every_second(30)
            assert not run.lost(), "it is back"

    asyncio.run(story())


def test_a_visit_in_vain_and_a_long_time_prove_nothing():
    async def story():
        async with opened() as run:
            run.answers = True
            await run.ask_every_second(1)
            run.answers = False
            await run.ask_every_second(1)
            run.now[0] += 1000.0
            assert not run.lost()

    asyncio.run(story())


def test_a_run_that_never_answered_is_not_lost_and_a_new_coordinator_has_not_answered_yet():
    async def story():
        async with opened() as run:
            await run.ask_every_second(30)
            assert not run.lost()
            run.answers = True
            await run.ask_every_second(60)
            run.answers = False
            run.visitor.forget(NAMES.uid)
            await run.ask_every_second(30)
            assert not run.lost()

    asyncio.run(story())


async def visit(run: Run, names: list[Names], nodes: list[str]) -> list[bool]:
    """Visit these runs, whose coordinators are on these nodes, for twenty seconds. Which of them is lost."""
    for _ in range(20):
        await asyncio.gather(*(run.visitor.progress(*each) for each in zip(names, nodes, strict=True)))
        run.now[0] += 1.0
    return [run.visitor.lost(each.uid) is not None for each in names]


def of_many(run: Run) -> None:
    """Let visits end at once: many of them at the same time would depend on how busy this machine is."""

    async def visit(names: Names, __: str, ___: bytes | None, visit: _Visit) -> bytes:
        visit.named = True
        if names.uid in run.mute or not run.answers:
            raise TimeoutError
        return Progress().to_json().encode()

    run.visitor._visit = visit


def runs(count: int) -> tuple[list[Names], list[str]]:
    return [Names(Key("n", f"x{n}"), f"u{n}") for n in range(count)], [f"node-{n}" for n in range(count)]


@pytest.mark.parametrize(("count", "silent", "lost"), [(2, 1, True), (2, 2, False), (30, 3, True), (30, 4, False)])
def test_where_many_nodes_are_silent_at_once_it_is_our_own_network_and_none_is_lost(
    count: int, silent: int, lost: bool
):
    async def story():
        async with opened() as run:
            of_many(run)
            names, nodes = runs(count)
            run.answers = True
            await visit(run, names, nodes)
            run.mute = {each.uid for each in names[:silent]}
            assert await visit(run, names, nodes) == [lost] * silent + [False] * (count - silent)

    asyncio.run(story())


def test_two_runs_on_a_node_that_is_cut_off_are_lost():
    async def story():
        async with opened() as run:
            of_many(run)
            names, _ = runs(2)
            run.answers = True
            await visit(run, names, ["node-0", "node-0"])
            run.answers = False
            assert await visit(run, names, ["node-0", "node-0"]) == [True, True]
            assert run.visitor.lost(names[0].uid) == "node-0"

    asyncio.run(story())


def test_a_run_is_lost_only_once_one_on_another_node_has_answered_meanwhile():
    """Otherwise it may be our own network, and the others were only not asked yet."""

    async def story():
        async with opened() as run:
            of_many(run)
            names, nodes = runs(3)
            run.answers = True
            await visit(run, names, nodes)
            run.mute = {names[0].uid}
            assert await visit(run, names[:1], nodes[:1]) == [False]
            assert await run.visitor.progress(names[2], nodes[2])
            assert run.visitor.lost(names[0].uid) == nodes[0]

    asyncio.run(story())


def test_after_our_own_network_failed_a_run_that_was_not_asked_again_is_not_lost():
    async def story():
        async with opened() as run:
            of_many(run)
            names, nodes = runs(2)
            run.answers = True
            await visit(run, names, nodes)
            run.answers = False
            await visit(run, names, nodes)
            run.answers, run.mute = True, {names[1].uid}
            run.now[0] += 60.0
            assert await run.visitor.progress(names[0], nodes[0])
            assert run.visitor.lost(names[1].uid) is None
            run.now[0] += 60.0
            await run.visitor.progress(names[1], nodes[1])
            assert run.visitor.lost(names[1].uid) == nodes[1], "one that does not answer still is"

    asyncio.run(story())


def test_two_visits_in_vain_that_are_far_apart_prove_nothing():
    async def story():
        async with opened() as run:
            run.answers = True
            await run.ask_every_second(1)
            run.answers = False
            for _ in range(2):
                assert not run.lost()
                await run.ask_every_second(1)
                run.now[0] += 60.0
            assert not run.lost()
            await run.ask_every_second(1)
            assert run.lost()

    asyncio.run(story())


def test_a_coordinator_on_another_node_is_another_one():
    async def story():
        async with opened() as run:
            run.answers = True
            await run.visitor.progress(NAMES, "before")
            run.answers = False
            await run.ask_every_second(30)
            assert not run.lost(), "it never answered"

    asyncio.run(story())


def test_where_names_are_not_resolved_it_is_our_own_network(monkeypatch):
    async def story():
        async with opened() as run:
            run.answers = True
            await run.ask_every_second(1)

            async def hang(*_: object, **__: object) -> None:
                await asyncio.sleep(3600)

            monkeypatch.setattr(run.visitor, "_url", "http://coordinator.invalid:1")
            monkeypatch.setattr(run.visitor._session.connector, "_resolver", Mock(resolve=hang, close=AsyncMock()))
            await run.ask_every_second(30)
            assert run.visitor._silent
            assert not run.lost()

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
