"""A new coordinator is told which workers were lost with the one before."""

from __future__ import annotations

import asyncio

from coordinator import NAMES, opened

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
