"""The handler by itself: what it says while the store is away."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters, RendezvousTimeoutError

from sonoforge_trainer.rendezvous import create_handler
from sonoforge_trainer.store_link import serve_store


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
