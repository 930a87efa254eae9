"""The membership in the store: JSON, in order, aged by what is heard, and seeded again."""

import contextlib
import json
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousSettings

from sonoforge_trainer.membership import (
    Membership,
    MembershipHolder,
    Node,
    decode,
    drop,
    drop_address,
    encode,
    lose,
)
from sonoforge_trainer.rendezvous import Timeouts
from sonoforge_trainer.store_link import (
    ATTEMPT_KEY,
    StoreLink,
    StoreUnavailableError,
    membership_key,
    parse_endpoint,
    serve_store,
)

FIRST, SECOND, THIRD = Node("10.0.0.9", 1, 5), Node("10.0.0.10", 1, 3), Node("10.0.0.11", 1, 1)
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)


@pytest.fixture
def store():
    return serve_store("127.0.0.20", 0)


@pytest.fixture
def link(store):
    return StoreLink("127.0.0.20", store.port, timeout_seconds=2)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def holder(link, node, clock=None, *, nodes=(1, 3), attempt="a"):
    timeouts = Timeouts(join=60, first_call=9, last_call=3, close=5, heartbeat=5)
    settings = RendezvousSettings(attempt, *nodes, timeouts, timedelta(seconds=2), 3)
    return MembershipHolder(link, node, settings, clock or Clock())


def complete(*nodes, round_=4, lineage="L"):
    """A complete round of some nodes."""
    state = Membership(lineage)
    state.round, state.complete = round_, True
    state.participants = {node: rank for rank, node in enumerate(nodes)}
    state.last_heartbeats = dict.fromkeys(nodes, NOW)
    return state


def written(link, state):
    """Put a state into the store as another agent would."""
    link.set(membership_key("a"), encode(state))
    link.set(ATTEMPT_KEY, "a")


def beat(link, node, seconds):
    """Put a node's heartbeat into the store."""
    state = decode(link.get(membership_key("a")))
    state.last_heartbeats[node] = NOW + timedelta(seconds=seconds)
    written(link, state)


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["10.0.0.10", "10.0.0.9"], ["10.0.0.9", "10.0.0.10"]),
        (["w-0010.job", "w-0002.job", "w-0001.job"], ["w-0001.job", "w-0002.job", "w-0010.job"]),
        (["worker-10", "worker-2"], ["worker-2", "worker-10"]),
        (["fd00::2", "fd00::a", "fd00::1"], ["fd00::1", "fd00::2", "fd00::a"]),
    ],
)
def test_ranks_follow_the_numbers_in_names(names, want):
    assert [node.addr for node in sorted(Node(name, 1, 1) for name in names)] == want


def test_the_state_is_json_that_anybody_can_read():
    state = complete(FIRST, SECOND, lineage="abc")
    state.wait_list = {THIRD}
    state.last_heartbeats[THIRD] = NOW
    assert encode(state) == (
        '{"lineage":"abc","round":4,"complete":true,"deadline":null,"closed":false,'
        '"participants":[["10.0.0.9",1,5,0],["10.0.0.10",1,3,1]],"waiting":[["10.0.0.11",1,1]],"redundant":[],'
        '"awaited_round":-1,"awaited":[],'
        '"heartbeats":[["10.0.0.9",1,5,1767323045.678901],["10.0.0.10",1,3,1767323045.678901],'
        '["10.0.0.11",1,1,1767323045.678901]]}'
    )


nodes = st.builds(Node, st.text(max_size=8), st.integers(0, 2**22), st.integers(0, 2**31))
moments = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))


@settings(deadline=None)  # the machine is shared
@given(st.sets(nodes, max_size=5), st.sets(nodes, max_size=5), moments, st.integers(0, 99), st.booleans())
def test_a_state_survives_the_store(participants, waiting, moment, round_, closed):
    state = Membership("L")
    state.round, state.closed, state.deadline = round_, closed, moment
    state.participants = {node: rank for rank, node in enumerate(participants)}
    state.wait_list = waiting
    state.last_heartbeats = dict.fromkeys(participants | waiting, moment)
    state.awaited_round, state.awaited = round_ + 1, set(participants)
    again = decode(encode(state).encode())
    assert (again.round, again.closed, again.deadline) == (round_, closed, moment)
    assert (again.participants, again.wait_list) == (state.participants, waiting)
    assert again.last_heartbeats == state.last_heartbeats
    assert (again.awaited_round, again.awaited) == (round_ + 1, participants)


@pytest.mark.parametrize(
    "raw",
    [
        b"gASVEAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOULg==",  # a pickle that would run something
        b"[]",
        b"{}",
        b'{"lineage":"L","round":"x","complete":true,"deadline":null,"closed":false,"participants":[],"waiting":[],'
        b'"redundant":[],"heartbeats":[]}',
        b'{"lineage":"L","round":1,"complete":true,"deadline":null,"closed":false,"participants":[["a",true,1,0]],'
        b'"waiting":[],"redundant":[],"heartbeats":[]}',
        b'{"lineage":"L","round":1,"complete":true,"deadline":1e300,"closed":false,"participants":[],"waiting":[],'
        b'"redundant":[],"heartbeats":[]}',
    ],
)
def test_anything_else_in_the_store_is_refused(raw):
    with pytest.raises(RendezvousStateError, match="start a new attempt"):
        decode(raw)


def test_a_node_is_dead_when_its_heartbeat_stands_still_whatever_its_clock_says(link):
    """Keep-alive 2 s × 3. THIRD's clock is a year behind, and it lives; SECOND falls silent."""
    written(link, complete(FIRST, SECOND, THIRD))
    clock = Clock()
    mine = holder(link, FIRST, clock)
    mine.sync()
    for second in range(1, 8):
        clock.now += 1
        beat(link, THIRD, second - 365 * 86400)
        mine.sync()
        want = {FIRST, SECOND, THIRD} if second <= 6 else {FIRST, THIRD}
        assert set(mine.state.participants) == want, f"after {second} s"


def test_nobody_dies_of_an_outage_of_the_store(link):
    """After ten minutes without a look at the store every node gets its full time again."""
    written(link, complete(FIRST, SECOND))
    clock = Clock()
    mine = holder(link, FIRST, clock)
    mine.sync()
    clock.now += 600
    mine.sync()
    assert set(mine.state.participants) == {FIRST, SECOND}


def test_the_coordinator_drops_a_lost_address_and_only_that(link):
    successor = Node(SECOND.addr, 1, 77)
    state = complete(FIRST, SECOND, THIRD)
    state.wait_list = {successor}
    written(link, state)
    assert drop_address(link, SECOND.addr) == 2
    with pytest.raises(RendezvousStateError, match="no node at this address has joined"):
        drop_address(link, SECOND.addr)
    left = decode(link.get(membership_key("a")))
    assert set(left.participants) == {FIRST, THIRD}
    assert left.wait_list == set()


def test_a_state_of_an_agent_that_awaits_nobody_is_read():
    document = json.loads(encode(complete(FIRST, SECOND)))
    del document["awaited_round"], document["awaited"]
    again = decode(json.dumps(document).encode())
    assert (again.awaited_round, again.awaited) == (-1, set())


def lost_by_heartbeat(link, *, outage=False, seconds=4):
    """SECOND falls silent so many seconds after this node connected, for the first time or again after an outage."""
    clock = Clock()
    mine = holder(link, FIRST, clock)
    mine.sync()
    if outage:
        link.connections += 1
    for second in range(seconds + 8):
        clock.now += 1
        beat(link, THIRD, clock.now)
        if second < seconds:
            beat(link, SECOND, clock.now)
        mine.sync()
    mine.sync()
    mine.mark_dirty()
    mine.sync()


def lost_long_after_an_outage(link):
    lost_by_heartbeat(link, outage=True, seconds=20)


@pytest.mark.parametrize(
    "happens", [lost_by_heartbeat, lost_long_after_an_outage, lambda link: drop_address(link, SECOND.addr)]
)
def test_after_a_loss_the_next_round_waits_for_those_who_are_left_and_for_nobody_else(link, happens):
    written(link, complete(FIRST, SECOND, THIRD))
    happens(link)
    state = decode(link.get(membership_key("a")))
    assert (state.awaited_round, state.awaited) == (5, {FIRST, THIRD})

    def last_call(*present):
        state.round, state.complete, state.deadline = 5, False, datetime.now(UTC) + timedelta(minutes=1)
        state.participants = dict.fromkeys(present, 0)
        state.last_heartbeats = dict.fromkeys(present, datetime.now(UTC))
        written(link, state)
        mine = holder(link, FIRST)
        mine.sync()
        return mine.state.deadline > datetime.now(UTC)

    assert last_call(FIRST), "THIRD is not here yet"
    assert not last_call(FIRST, THIRD)
    state.wait_list = {SECOND}
    assert last_call(FIRST, THIRD), "SECOND is back and about to join"
    state.wait_list = set()
    state.awaited = {THIRD}
    assert last_call(FIRST, THIRD), "FIRST is new"
    state.awaited, state.awaited_round = {FIRST, THIRD}, 4
    assert last_call(FIRST, THIRD), "another round"


def test_right_after_an_outage_a_silent_node_may_only_be_slower_to_come_back(link):
    written(link, complete(FIRST, SECOND, THIRD))
    lost_by_heartbeat(link, outage=True)
    state = decode(link.get(membership_key("a")))
    assert set(state.participants) == {FIRST, THIRD}
    assert (state.awaited_round, state.awaited) == (-1, set())


def test_two_losses_in_one_round_leave_those_who_are_there_after_both():
    state = complete(FIRST, SECOND, THIRD)
    lose(state, [SECOND])
    drop(state, [FIRST])  # it goes to the next round
    lose(state, [THIRD])
    assert (state.awaited_round, state.awaited) == (5, {FIRST})


@pytest.mark.parametrize(
    ("there", "newest"),
    [("", "x-9"), ("x-8", "x-9"), ("x-10", "x-10"), ("y-10", "x-9"), ("x", "x-9"), ("x-9-10", "x-9")],
)
def test_a_node_of_an_old_attempt_does_not_make_it_the_newest(link, there, newest):
    link.set(ATTEMPT_KEY, there)
    mine = holder(link, FIRST, attempt="x-9")
    mine.sync()
    mine.mark_dirty()
    assert mine.sync()
    assert link.get(ATTEMPT_KEY).decode() == newest


def test_a_store_that_nobody_joined_takes_no_loss(link):
    """Who seeds it may yet put the lost node back, so it has to be told again."""
    with pytest.raises(RendezvousStateError, match="no node at this address has joined"):
        drop_address(link, SECOND.addr)


def test_the_last_participant_that_goes_opens_the_next_round():
    state = complete(FIRST)
    drop(state, [FIRST])
    assert (state.complete, state.round) == (False, 5)


def replaced(link):
    """An empty store in the place of the one that a link uses."""
    store = serve_store("127.0.0.20", 0)
    link._port, link._client = store.port, None
    return store


def test_a_replaced_store_is_seeded_by_the_first_survivor_and_believed_by_the_next(link):
    written(link, complete(FIRST, SECOND))
    first, second = holder(link, FIRST), holder(link, SECOND)
    first.sync()
    second.sync()
    store = replaced(link)
    for mine in (first, second):
        mine._clock.now += 5
        mine.sync()
        assert (mine.state.round, set(mine.state.participants)) == (4, {FIRST, SECOND})
    assert link.get(ATTEMPT_KEY) == b"a"
    del store


def test_a_newcomer_in_an_empty_store_does_not_take_the_group_away(link):
    """A new agent reached the replaced store first and began a group of its own; the group that trains outranks it."""
    written(link, complete(FIRST, SECOND, round_=0))
    mine = holder(link, FIRST)
    mine.sync()
    store = replaced(link)
    newcomer = Membership("another")
    newcomer.participants = {THIRD: 0}
    newcomer.last_heartbeats = {THIRD: NOW}
    written(link, newcomer)
    mine._clock.now += 5
    mine.sync()
    assert set(mine.state.participants) == {FIRST, SECOND}
    assert set(decode(link.get(membership_key("a"))).participants) == {FIRST, SECOND}
    del store


def test_an_old_state_does_not_put_a_node_back_into_a_round_that_it_left(link):
    """This node gave up round 4; a survivor that did not notice yet seeds the new store with round 4."""
    written(link, complete(FIRST, SECOND))
    mine = holder(link, FIRST)
    mine.sync()
    mine.leave_round()
    store = replaced(link)
    written(link, complete(FIRST, SECOND))
    mine._clock.now += 5
    mine.sync()
    assert set(mine.state.participants) == {SECOND}
    del store


def test_a_link_reads_without_waiting_and_swaps_only_what_it_expects(link):
    assert link.has("k") is False
    assert link.get("k") == b""
    assert link.swap("k", b"", "one") == b"one"
    assert link.swap("k", b"zero", "two") == b"one"
    assert link.swap("k", b"one", "two") == b"two"
    assert link.swap("absent", b"one", "two") == b"", "torch would answer b'one'"


def test_a_store_that_is_gone_is_an_error_within_its_time(link, store):
    port = store.port
    link.get("k")
    away = StoreLink("127.0.0.21", port, timeout_seconds=2)
    with pytest.raises(StoreUnavailableError, match="store failed: ConnectionRefusedError"):
        away.get("k")
    with pytest.raises(StoreUnavailableError, match="did not answer a moment ago"):
        away.get("k")
    with pytest.raises(RendezvousConnectionError):
        holder(away, FIRST).sync()


def test_a_connection_that_nobody_accepts_is_given_up_before_an_answer_would_be():
    """As to a node that is gone: its address answers nothing, not even that nobody listens."""
    with socket.create_server(("127.0.0.22", 0), backlog=0) as listener, contextlib.ExitStack() as full:
        for _ in range(8):
            one = full.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="store failed: TimeoutError"):
            StoreLink(*listener.getsockname(), timeout_seconds=60).get("k")
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x"])
def test_an_endpoint_without_host_or_port_is_refused(endpoint):
    with pytest.raises(ValueError, match="give HOST:PORT"):
        parse_endpoint(endpoint)


def test_endpoints_of_both_families_are_understood():
    assert parse_endpoint("127.0.0.1:29400") == ("127.0.0.1", 29400)
    assert parse_endpoint("[::1]:29400") == ("::1", 29400)


def test_the_store_listens_on_its_address_only(store):
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {row[1] for row in rows if row[3] == "0A"}
    assert f"1400007F:{store.port:04X}" in listening
    assert f"00000000:{store.port:04X}" not in listening
