"""Which silent coordinators are lost with their node, and when it is our own network instead."""

from __future__ import annotations

import asyncio
from unittest.mock import AsyncMock, Mock

import pytest
from coordinator import NAMES, Run, opened

from sonoforge_operator.cluster.coordinators import _Visit
from sonoforge_operator.cluster.names import Key, Names
from sonoforge_trainer.contract import Progress


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
