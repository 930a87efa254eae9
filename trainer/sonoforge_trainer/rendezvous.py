"""torch's dynamic rendezvous, repaired: `torchrun --rdzv-backend=sonoforge`, found through `torchrun.handlers`.

What torch 2.15 gets wrong, each one measured:

* a lost node starts nothing while its peers use no collective: here missing participants count as a membership change;
* after rank 0 was lost, or a newcomer sorts first, others keep the old master's address: it is dropped every round;
* an agent dies with the store: here an outage is tolerated for a time, and an empty store is seeded again;
* the state is a pickle: here it is JSON (`membership.py`).

Options of `--rdzv-conf` (seconds, fractions allowed): `keep_alive_interval` 2, `keep_alive_max_attempt` 3 (a count),
`first_call_timeout` 15 and `last_call_timeout` 5 (the wait for more nodes once there are enough, in the first round and
later), `join_timeout` 900, `close_timeout` 10, `read_timeout` 30, `store_timeout` 5, `store_outage` 600.
The store is never hosted here (torch's `is_host=0`), whatever the options say.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import structlog
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # torch exports them silently
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousSettings,
    RendezvousTimeout,
    _Action,
    _RendezvousContext,
)

from sonoforge_trainer.membership import Membership, MembershipHolder, Node
from sonoforge_trainer.store_link import StoreLink, StoreUnavailableError, finished_key, parse_endpoint, serve_store

BACKEND = "sonoforge"
"""Name of the backend in torchrun's registry."""

_LEAVE_SECONDS = 5.0
_POLL_SECONDS = 0.2
_WAIT_SECONDS = 0.05

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Timeouts(RendezvousTimeout):
    """torch's timeouts with a longer last call in the first round, while all agents are still starting."""

    def __init__(self, *, join: float, first_call: float, last_call: float, close: float, heartbeat: float) -> None:
        super().__init__(
            join=timedelta(seconds=join),
            last_call=timedelta(seconds=last_call),
            close=timedelta(seconds=close),
            heartbeat=timedelta(seconds=heartbeat),
        )
        self._first_call = timedelta(seconds=first_call)
        self.first_round = True

    @property
    def last_call(self) -> timedelta:
        """How long a round waits for more nodes once it has enough."""
        return self._first_call if self.first_round else self._last_call


class ElasticHandler(DynamicRendezvousHandler):
    """The handler that agents use. See the module for what it repairs."""

    _state_holder: MembershipHolder

    def __init__(
        self, node: Node, settings: RendezvousSettings, link: StoreLink, *, read_seconds: float, outage_seconds: float
    ) -> None:
        assert isinstance(settings.timeout, Timeouts)
        # torch keeps the store for the agents' own use; `_get_store` makes a new connection for every round instead.
        super().__init__(node, settings, BACKEND, None, MembershipHolder(link, node, settings))  # type: ignore[arg-type]
        self._timeouts = settings.timeout
        self._link = link
        self._read_seconds = read_seconds
        self._outage_seconds = outage_seconds
        self._outage_since: float | None = None
        self._round = -1
        self._members: dict[Any, int] = {}

    def next_rendezvous(self) -> RendezvousInfo:
        """See base class. Starts over where the store or a peer is lost on the way, for at most the join timeout."""
        failing_since: float | None = None
        self._state_holder.leave_round()
        while True:
            self._bootstrap_store_info = None
            self._shared_tcp_store_server = None
            try:
                self._state_holder.sync()
                failing_since = None
                state = self._state_holder.state
                self._timeouts.first_round = state.round == 0 and not state.complete
                info = super().next_rendezvous()
            except (RendezvousConnectionError, DistError) as error:
                failing_since = failing_since or time.monotonic()
                waited = time.monotonic() - failing_since
                if waited > self._outage_seconds:
                    raise RendezvousTimeoutError(f"the store has been lost for {waited:.0f} s") from error
                log.warning("rendezvous-retry", exception=type(error).__name__, waited_seconds=round(waited, 1))
                time.sleep(_POLL_SECONDS)
                continue
            with self._heartbeat_lock:
                if self.intact():
                    self._outage_since = None
                    return info

    def num_nodes_waiting(self) -> int:
        """Nodes that wait to join; at least 1 where a participant is missing, this one included.

        0 while the store cannot be reached; RendezvousConnectionError once that lasts longer than `store_outage`.
        """
        with self._heartbeat_lock:
            try:
                self._state_holder.sync()
            except RendezvousConnectionError:
                now = time.monotonic()
                if self._outage_since is None:
                    self._outage_since = now
                    log.warning("store-lost", tolerated_seconds=self._outage_seconds)
                if now - self._outage_since > self._outage_seconds:
                    raise
                return 0
            if self._outage_since is not None:
                log.info("store-back", outage_seconds=round(time.monotonic() - self._outage_since, 1))
                self._outage_since = None
            waiting = len(self._state_holder.state.wait_list)
            return waiting if self.intact() else max(waiting, 1)

    def intact(self) -> bool:
        """Whether every participant of the round that this node takes part in is still there, as far as is known."""
        state = self._state_holder.state
        return state.round == self._round and self._members.keys() == state.participants.keys()

    def leave(self) -> None:
        """Take this node out of the membership at once, so that the others need not miss its heartbeats."""
        self._stop_heartbeats()
        try:
            self._op_executor.run(_LeaveOp(), time.monotonic() + _LEAVE_SECONDS)
        except RendezvousError as error:
            log.warning("leave-failed", exception=type(error).__name__)

    def finish(self, timeout_seconds: float) -> bool:
        """Wait until every participant called `finish` or is gone. Returns False where the time ran out first."""
        deadline = time.monotonic() + timeout_seconds
        keys = {node: f"sonoforge/done/{self.get_run_id()}/{self._round}/{r}" for node, r in self._members.items()}
        while time.monotonic() < deadline:
            try:
                if not self._link.get(keys[self._this_node]):  # also again in a store that was replaced
                    self._link.set(keys[self._this_node], "1")
                with self._heartbeat_lock:
                    self._state_holder.sync()
                state = self._state_holder.state
                present = state.participants if state.round == self._round else {}
                if all(node not in present or self._link.get(key) for node, key in keys.items()):
                    return True
            except (StoreUnavailableError, RendezvousConnectionError):
                pass
            time.sleep(_POLL_SECONDS)
        return False

    def close_finished(self) -> None:
        """Close the attempt because its work is done, so that nodes that come now know that nothing failed."""
        try:
            self._link.set(finished_key(self.get_run_id()), "1")
        except StoreUnavailableError:
            log.warning("finish-not-noted")
        self.shutdown()

    def is_finished(self) -> bool:
        """Whether the work of the attempt is done, as far as the store knows."""
        try:
            return self._link.get(finished_key(self.get_run_id())) == b"1"
        except StoreUnavailableError:
            return False

    def exchange(self, value: str) -> list[str]:
        """Give the other nodes of this round a value and get theirs, in the order of ranks.

        Raises RendezvousConnectionError where one is lost meanwhile.
        """
        keys = [f"sonoforge/exchange/{self.get_run_id()}/{self._round}/{rank}" for rank in range(len(self._members))]
        values = [""] * len(keys)

        def complete() -> bool:
            self._link.set(keys[self._members[self._this_node]], value)  # again, in case the store was replaced
            values[:] = [known or self._link.get(key).decode() for known, key in zip(values, keys, strict=True)]
            return all(values)

        self._wait(complete)
        return values

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait for other nodes of this round, but not for nodes that are gone, as waiting on a key would."""
        deadline = time.monotonic() + self._read_seconds
        try:
            while not condition():
                with self._heartbeat_lock:
                    self._state_holder.sync()
                    if not self.intact():
                        raise RendezvousConnectionError("a node was lost while the group formed")
                if time.monotonic() > deadline:
                    raise RendezvousConnectionError("a node did not do its part while the group formed")
                time.sleep(_WAIT_SECONDS)
        except StoreUnavailableError as error:
            raise RendezvousConnectionError("the coordinator's store does not answer") from error

    def _get_world(self) -> tuple[int, int]:
        with self._heartbeat_lock:
            state = self._state_holder.state
            self._round, self._members = state.round, dict(state.participants)
        if self._this_node not in self._members:
            raise RendezvousConnectionError("this node was dropped right after it joined")
        return self._members[self._this_node], len(self._members)

    def _get_store(self) -> Store:
        prefix = f"torch.rendezvous.{self.get_run_id()}.{self._round}"
        if self._members[self._this_node] != 0:
            # Rank 0 writes this last; torch would wait for it for long after rank 0 is lost.
            self._wait(lambda: self._link.has(f"{prefix}/{RendezvousStoreInfo.MASTER_PORT_KEY}"))
        try:
            return PrefixStore(prefix, self._link.client(wait_seconds=self._read_seconds))
        except StoreUnavailableError as error:
            raise RendezvousConnectionError("the coordinator's store does not answer") from error

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        return serve_store(master_addr, master_port)


class _LeaveOp:
    """Remove this node from wherever it is."""

    def __call__(self, ctx: _RendezvousContext, deadline: float) -> _Action:
        if time.monotonic() > deadline:
            return _Action.ERROR_TIMEOUT
        assert isinstance(ctx.state, Membership)
        ctx.state.awaited.discard(ctx.node)
        if ctx.node in ctx.state.participants:
            return _Action.REMOVE_FROM_PARTICIPANTS
        if ctx.node in ctx.state.wait_list:
            return _Action.REMOVE_FROM_WAIT_LIST
        if ctx.node in ctx.state.redundancy_list:
            return _Action.REMOVE_FROM_REDUNDANCY_LIST
        return _Action.FINISH


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Make a handler from torchrun's parameters. `--local-addr` is required. Raises ValueError."""
    if not params.local_addr:
        raise ValueError("give --local-addr: the address at which the other nodes reach this one")
    host, port = parse_endpoint(params.endpoint)

    def seconds(key: str, default: float) -> float:
        value = float(params.get(key, default))
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"rendezvous option {key}={value}: give a number of seconds above 0")
        return value

    attempts = params.get_as_int("keep_alive_max_attempt", 3)
    if not attempts or attempts < 1:
        raise ValueError(f"rendezvous option keep_alive_max_attempt={attempts}: give a count above 0")
    settings = RendezvousSettings(
        params.run_id,
        params.min_nodes,
        params.max_nodes,
        Timeouts(
            join=seconds("join_timeout", 900),
            first_call=seconds("first_call_timeout", 15),
            last_call=seconds("last_call_timeout", 5),
            close=seconds("close_timeout", 10),
            heartbeat=seconds("store_timeout", 5),
        ),
        keep_alive_interval=timedelta(seconds=seconds("keep_alive_interval", 2)),
        keep_alive_max_attempt=attempts,
        # Many agents that write at the same moment get in each other's way less if they wait a little.
        cas_backoff_max_seconds=0.05,
    )
    # A pod that is replaced has the same address and the same process number; the random number tells the two apart.
    node = Node(params.local_addr, os.getpid(), random.getrandbits(31))
    return ElasticHandler(
        node,
        settings,
        StoreLink(host, port, timeout_seconds=seconds("store_timeout", 5)),
        read_seconds=seconds("read_timeout", 30),
        outage_seconds=seconds("store_outage", 600),
    )


def register() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point in `torchrun.handlers` names: returns the factory."""
    return create_handler
