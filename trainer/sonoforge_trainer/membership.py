"""Who takes part in an attempt, as JSON in the coordinator's store.

torch keeps the state of its dynamic rendezvous as a pickle, so whoever reaches the store runs code in every agent. Here
the same state travels as JSON that is checked field by field. Two more things differ from torch's holder of that state:

* a node is dead when this process has not seen its heartbeat *change* for keep-alive x attempts, measured on this
  process's own monotonic clock, so neither clock skew between nodes nor an outage of the store kills anybody;
* a store that was replaced by an empty one is seeded again from what the survivors know.
"""

from __future__ import annotations

import functools
import json
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousSettings,
    _NodeDesc,
    _remove_participant_epilogue,
    _RendezvousState,
    _RendezvousStateHolder,
)

from sonoforge_trainer.store_link import ATTEMPT_KEY, StoreLink, StoreUnavailableError, is_later, membership_key

_CACHE_SECONDS = 1.0


@functools.total_ordering
class Node(_NodeDesc):
    """An agent: its address (`--local-addr`), its process and a random number, so that a successor is another node.

    Ranks follow the order of nodes. Numbers inside addresses compare as numbers: worker-2 comes before worker-10, and
    10.0.0.9 before 10.0.0.10.
    """

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Node):
            return NotImplemented
        return self._order() < other._order()

    def _order(self) -> tuple[list[tuple[int, int, str]], int, int]:
        parts = [p for p in re.split(r"(\d+)", self.addr) if p]
        keys = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
        return keys, self.pid, self.local_id


class Membership(_RendezvousState):
    """torch's rendezvous state plus what torch does not know.

    `lineage` tells a state from one that was begun anew in an empty store. `awaited` are those who are left of a round
    that lost a node: once they are all in the next one, `awaited_round`, nobody else is waited for.
    """

    def __init__(self, lineage: str = "") -> None:
        super().__init__()
        self.lineage = lineage or uuid.uuid4().hex
        self.awaited_round = -1
        self.awaited: set[_NodeDesc] = set()


def encode(state: Membership) -> str:
    """The state as JSON. Equal states give equal text."""

    def listed(nodes: Iterable[_NodeDesc]) -> list[list[Any]]:
        return [[n.addr, n.pid, n.local_id] for n in sorted(nodes)]

    return json.dumps(
        {
            "lineage": state.lineage,
            "round": state.round,
            "complete": state.complete,
            "deadline": state.deadline.timestamp() if state.deadline else None,
            "closed": state.closed,
            "participants": [[n.addr, n.pid, n.local_id, rank] for n, rank in sorted(state.participants.items())],
            "waiting": listed(state.wait_list),
            "redundant": listed(state.redundancy_list),
            "awaited_round": state.awaited_round,
            "awaited": listed(state.awaited),
            "heartbeats": [
                [n.addr, n.pid, n.local_id, t.timestamp()] for n, t in sorted(state.last_heartbeats.items())
            ],
        },
        separators=(",", ":"),
    )


def decode(raw: bytes) -> Membership:
    """Read what `encode` wrote. Raises RendezvousStateError for anything else."""

    def node(entry: list[Any]) -> Node:
        address, pid, number = entry[:3]
        if not (isinstance(address, str) and type(pid) is int and type(number) is int):
            raise TypeError("a node is an address and two numbers")
        return Node(address, pid, number)

    try:
        document = json.loads(raw)
        state = Membership(str(document["lineage"]))
        state.round = int(document["round"])
        state.complete = document["complete"] is True
        state.closed = document["closed"] is True
        if document["deadline"] is not None:
            state.deadline = datetime.fromtimestamp(document["deadline"], UTC)
        state.participants = {node(entry): int(entry[3]) for entry in document["participants"]}
        state.wait_list = {node(entry) for entry in document["waiting"]}
        state.redundancy_list = {node(entry) for entry in document["redundant"]}
        # Not written by every version; a coordinator may be newer than the agents.
        state.awaited_round = int(document.get("awaited_round", -1))
        state.awaited = {node(entry) for entry in document.get("awaited", ())}
        state.last_heartbeats = {node(e): datetime.fromtimestamp(e[3], UTC) for e in document["heartbeats"]}
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, OSError) as error:
        raise RendezvousStateError("the membership in the store is not readable; start a new attempt") from error
    # torch deletes the heartbeat of every node that leaves, so every node must have one.
    for member in (*state.participants, *state.wait_list, *state.redundancy_list):
        state.last_heartbeats.setdefault(member, datetime.now(UTC))
    return state


def drop(state: Membership, gone: Iterable[_NodeDesc], minimum: RendezvousSettings | None = None) -> None:
    """Take nodes out of a state, as if they had left. `minimum` cancels a last call that too few nodes are left for."""
    participant_left = False
    for node in gone:
        participant_left |= state.participants.pop(node, None) is not None
        state.wait_list.discard(node)
        state.redundancy_list.discard(node)
        state.last_heartbeats.pop(node, None)
    if not participant_left:
        return
    if minimum is not None:
        _remove_participant_epilogue(state, minimum)
    elif state.complete and not state.participants:
        state.complete = False
        state.round += 1


def lose(state: Membership, lost: Collection[_NodeDesc], minimum: RendezvousSettings | None = None) -> None:
    """Take nodes out of a state that did not leave by themselves, and have the next round wait for the others alone.

    Whoever takes their place soon has come by now: a loss is known only after seconds of silence.
    """
    if state.complete and state.awaited_round <= state.round and any(node in state.participants for node in lost):
        state.awaited_round = state.round + 1
        state.awaited = {*state.participants, *state.wait_list}
    state.awaited.difference_update(lost)
    drop(state, lost, minimum)


def drop_address(link: StoreLink, address: str) -> int:
    """Take the nodes at an address out of the newest attempt, so that its survivors form anew at once.

    Returns how many there were. A node that is dropped though it lives sees that and joins again. Raises
    StoreUnavailableError, and RendezvousStateError, also where nobody at that address has joined: in the store of a new
    coordinator the survivors first put what they know, with those that are gone.
    """
    key = membership_key(link.get(ATTEMPT_KEY).decode())
    while True:
        raw = link.get(key)
        state = decode(raw) if raw else Membership()
        gone = [node for node in state.last_heartbeats if node.addr == address]
        if not gone:
            raise RendezvousStateError("no node at this address has joined")
        lose(state, gone)
        changed = encode(state)
        if link.swap(key, raw, changed) == changed.encode():
            return len(gone)


class MembershipHolder(_RendezvousStateHolder):
    """The local copy of the membership, exchanged with other nodes through compare-and-swap on one key.

    `sync` raises RendezvousConnectionError while the store cannot be reached. `clock` is monotonic, in seconds.
    """

    def __init__(
        self, link: StoreLink, node: Node, settings: RendezvousSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._key = membership_key(settings.run_id)
        self._node = node
        self._settings = settings
        self._clock = clock
        self._state = Membership()
        self._token = b""
        self._known = False
        self._dirty = False
        self._synced_at = float("-inf")
        self._connections = 0
        self._reconnected_at = float("-inf")
        self._left_round = -1
        self._seen: dict[_NodeDesc, tuple[datetime, float]] = {}

    @property
    def state(self) -> Membership:
        """See base class."""
        return self._state

    def mark_dirty(self) -> None:
        """See base class."""
        self._dirty = True

    def leave_round(self) -> None:
        """Remember that this node gave up the present round, so that an old state never puts it back."""
        if self._state.complete:
            self._left_round = self._state.round

    def sync(self) -> bool | None:
        """See base class."""
        if not self._dirty and self._clock() - self._synced_at < _CACHE_SECONDS:
            return None
        try:
            accepted = self._exchange()
        except StoreUnavailableError as error:
            # A change that may not have arrived is decided again from a state that was read.
            self._dirty = False
            self._synced_at = float("-inf")
            raise RendezvousConnectionError("the coordinator's store does not answer") from error
        self._dirty = False
        self._synced_at = self._clock()
        return accepted

    def _exchange(self) -> bool | None:
        proposed: str | None = encode(self._state) if self._dirty else None
        current = self._link.get(self._key) if proposed is None else self._link.swap(self._key, self._token, proposed)
        reconnected = self._link.connections != self._connections
        if reconnected:
            self._connections = self._link.connections
            if self._known:
                self._reconnected_at = self._clock()
            self._seen.clear()
        if not current and self._known:
            current = self._seed(b"")
        elif reconnected and self._known and self._outranks(decode(current)):
            current = self._seed(current)
        accepted = None if proposed is None else current == proposed.encode()
        if current:
            self._state = decode(current)
            self._known = True
        else:
            self._state = Membership()
        self._token = current
        self._drop_dead()
        self._end_last_call()
        if accepted:
            self._announce()
        return accepted

    def _announce(self) -> None:
        """Say that this is the newest attempt, unless a later one is there, as a node of an old one may come back."""
        if not is_later(self._link.get(ATTEMPT_KEY).decode("utf-8", "replace"), self._settings.run_id):
            self._link.set(ATTEMPT_KEY, self._settings.run_id)

    def _seed(self, over: bytes) -> bytes:
        """Put what this node knows in the place of what the store holds, unless another node was quicker."""
        now = datetime.now(UTC)
        self._state.last_heartbeats = dict.fromkeys(self._state.last_heartbeats, now)
        seeded = self._link.swap(self._key, over, encode(self._state))
        self._announce()
        return seeded

    def _outranks(self, found: Membership) -> bool:
        """Whether this node knows more than a store that it has just connected to."""
        known = self._state
        if found.lineage == known.lineage:
            return found.round < known.round

        def weight(state: Membership) -> tuple[int, bool, int, str]:
            return state.round, state.complete, len(state.participants), state.lineage

        return weight(found) < weight(known)

    def _drop_dead(self) -> None:
        now = self._clock()
        silence = (self._settings.keep_alive_interval * self._settings.keep_alive_max_attempt).total_seconds()
        if now - self._synced_at > silence / 2:
            self._seen.clear()  # nobody could be heard in the meantime
        heartbeats = self._state.last_heartbeats
        self._seen = {
            node: seen if (seen := self._seen.get(node)) and seen[0] == stamp else (stamp, now)
            for node, stamp in heartbeats.items()
        }
        dead = [node for node, (_, since) in self._seen.items() if now - since > silence and node != self._node]
        # After an outage others may only be slower to come back.
        certain = now - self._reconnected_at > 2 * silence
        (lose if certain else drop)(self._state, dead, self._settings)
        if self._state.complete and self._state.round <= self._left_round and self._node in self._state.participants:
            drop(self._state, [self._node], self._settings)

    def _end_last_call(self) -> None:
        """Wait for nobody else once all who are left of a round that lost a node are here, and all who came since."""
        state = self._state
        if state.complete or state.deadline is None or state.round != state.awaited_round:
            return
        expected = state.awaited | state.wait_list | state.redundancy_list
        if self._node in state.awaited and expected <= state.participants.keys():
            state.deadline = min(state.deadline, datetime.now(UTC))
