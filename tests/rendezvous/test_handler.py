"""The handler by itself: what it says while the store is away."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters, RendezvousTimeoutError

from sonoforge_trainer.membership import decode, drop_address
from sonoforge_trainer.rendezvous import create_handler
from sonoforge_trainer.store_link import StoreLink, membership_key, serve_store


def handler(endpoint, **options):
    return create_handler(RendezvousParameters("sonoforge", endpoint, "a", 1, 2, "127.0.0.2", **options))


def test_an_outage_of_the_store_is_no_change_until_it_lasts_too_long():
    alone = handler("127.0.0.22:9", store_outage=0.5)
    assert alone.num_nodes_waiting() == 0
    time.sleep(0.6)
    with pytest.raises(RendezvousConnectionError):
        alone.num_nodes_waiting()


def test_a_rendezvous_without_a_store_ends_after_the_same_time():
    with pytest.raises(RendezvousTimeoutError, match="the store has been lost for"):
        handler("127.0.0.22:9", store_outage=0.5).next_rendezvous()


def test_every_round_has_a_new_store_for_its_workers():
    """torch keeps the first round's address (E2, E8): here the second round of one node has another port."""
    store = serve_store("127.0.0.20", 0)
    alone = handler(f"127.0.0.20:{store.port}", first_call_timeout=0.1, last_call_timeout=0.1)
    first = alone.next_rendezvous()
    second = alone.next_rendezvous()
    assert (first.rank, first.world_size, second.rank, second.world_size) == (0, 1, 0, 1)
    assert first.bootstrap_store_info.master_addr == "127.0.0.2"
    assert first.bootstrap_store_info.master_port != second.bootstrap_store_info.master_port
    assert alone.num_nodes_waiting() == 0
    alone.leave()
    assert alone.num_nodes_waiting() == 1, "an agent that was dropped joins again"
    assert alone.shutdown() is True


def test_nodes_exchange_values_in_the_order_of_ranks_and_do_not_wait_for_one_that_left():
    store = serve_store("127.0.0.20", 0)
    endpoint = f"127.0.0.20:{store.port}"

    def parameters(address):
        return RendezvousParameters("sonoforge", endpoint, "a", 2, 2, address)

    low, high = (create_handler(parameters(address)) for address in ("127.0.0.9", "127.0.0.10"))
    with ThreadPoolExecutor(2) as pool:
        rounds = list(pool.map(lambda node: node.next_rendezvous(), (high, low)))
        assert [(r.rank, r.world_size) for r in rounds] == [(1, 2), (0, 2)]
        assert rounds[0].bootstrap_store_info.master_addr == "127.0.0.9"
        assert (
            list(pool.map(lambda node: node.exchange(node._this_node.addr), (high, low)))
            == [["127.0.0.9", "127.0.0.10"]] * 2
        )

    high._round, low._round = 99, 99  # a round in which nobody has given a value yet
    low._state_holder.state.round = 99
    high.leave()
    began = time.monotonic()
    with pytest.raises(RendezvousConnectionError, match="a node was lost while the group formed"):
        low.exchange("x")
    assert time.monotonic() - began < 5
    assert low.num_nodes_waiting() == 1
    low.shutdown()


@pytest.fixture
def three():
    """Handlers of three nodes with a last call that no test waits for, in a complete round."""
    store = serve_store("127.0.0.20", 0)
    endpoint = f"127.0.0.20:{store.port}"

    def made(number):
        options = {"first_call_timeout": "90", "last_call_timeout": "90"}
        return create_handler(RendezvousParameters("sonoforge", endpoint, "a", 1, 3, f"127.0.0.{number}", **options))

    nodes = [made(number) for number in (31, 32, 33)]
    with ThreadPoolExecutor(4) as pool:
        assert {info.world_size for info in pool.map(lambda node: node.next_rendezvous(), nodes)} == {3}
        yield nodes, pool, StoreLink("127.0.0.20", store.port), made
        for node in nodes:
            node._stop_heartbeats()
        nodes[0].shutdown()


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state_in(link):
    return decode(link.get(membership_key("a")))


def test_who_is_left_of_a_loss_forms_a_group_without_a_last_call(three):
    (first, second, lost), pool, link, _ = three
    lost._stop_heartbeats()
    drop_address(link, lost._this_node.addr)
    wait_until(lambda: first.num_nodes_waiting() and second.num_nodes_waiting())
    early = pool.submit(first.next_rendezvous)
    with pytest.raises(TimeoutError):
        early.result(timeout=3)
    assert pool.submit(second.next_rendezvous).result(timeout=30).world_size == 2
    assert early.result(timeout=30).world_size == 2


def test_after_a_loss_nobody_waits_for_a_survivor_that_leaves_by_itself(three):
    (first, second, lost), pool, link, _ = three
    lost._stop_heartbeats()
    drop_address(link, lost._this_node.addr)
    assert first._this_node in state_in(link).awaited
    wait_until(second.num_nodes_waiting)
    second.leave()
    assert state_in(link).awaited == {first._this_node}
    assert pool.submit(first.next_rendezvous).result(timeout=30).world_size == 1


def test_who_comes_in_the_place_of_a_lost_node_before_the_group_has_formed_is_in_it(three):
    (first, second, lost), pool, link, made = three
    lost._stop_heartbeats()
    drop_address(link, lost._this_node.addr)
    successor = made(34)
    waiting = pool.submit(successor.next_rendezvous)
    wait_until(lambda: state_in(link).wait_list)
    formed = [waiting, pool.submit(first.next_rendezvous), pool.submit(second.next_rendezvous)]
    assert {future.result(timeout=30).world_size for future in formed} == {3}
    successor._stop_heartbeats()


def test_the_last_call_is_for_the_successor_of_a_node_that_left_by_itself(three):
    (first, second, left), pool, link, made = three
    left.leave()
    wait_until(lambda: first.num_nodes_waiting() and second.num_nodes_waiting())
    formed = [pool.submit(node.next_rendezvous) for node in (first, second)]
    wait_until(lambda: len(state_in(link).participants) == 2 and not state_in(link).complete)
    with pytest.raises(TimeoutError):
        formed[0].result(timeout=3)
    successor = made(34)
    formed.append(pool.submit(successor.next_rendezvous))
    assert {future.result(timeout=30).world_size for future in formed} == {3}
    successor._stop_heartbeats()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_alive_interval": "0"}, "keep_alive_interval=0.0: give a number of seconds above 0"),
        ({"last_call_timeout": "nan"}, "last_call_timeout=nan: give a number of seconds above 0"),
        ({"keep_alive_max_attempt": "0"}, "keep_alive_max_attempt=0: give a count above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        handler("127.0.0.22:9", **options)


def test_an_agent_must_say_where_it_is_reached():
    with pytest.raises(ValueError, match="give --local-addr"):
        create_handler(RendezvousParameters("sonoforge", "127.0.0.1:1", "a", 1, 1))
