"""How the ranks of a run talk about one checkpoint, apart from the collectives of the training step.

They use keys of a `torch.distributed` store, written and read by the upload threads. The store's client is cloned: a
blocking read holds the client's lock, and the training thread must never wait behind it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined] # torch exports them silently

from sonoforge_trainer.checkpoint.errors import CheckpointFailedError
from sonoforge_trainer.contract import canonical_json

_SLICE_SECONDS = 1.0  # a wait looks up this often whether it was given up


@dataclass(frozen=True)
class Peers:
    """The processes of a run. With one process no store is needed."""

    rank: int = 0
    """Number of this process."""
    world_size: int = 1
    """Processes of the run."""
    store: Store | None = None
    """A store that all of them reach, for example that of the default process group."""
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    """Group for broadcasting a restored state as CPU tensors (gloo); not used for saving."""

    def __post_init__(self) -> None:
        if self.world_size > 1 and self.store is None:
            raise ValueError(f"{self.world_size} processes need a store to agree on checkpoints; give Peers a store")

    def board(self, name: str) -> Board:
        """A fresh set of keys below `name`, on a connection of its own. Only for more than one process."""
        assert self.store is not None
        return Board(self, name, PrefixStore(name, self.store.clone()))


class Board:
    """Notes that the ranks of a run leave for each other. Not safe for several threads at once."""

    def __init__(self, peers: Peers, name: str, store: Store) -> None:
        self._peers = peers
        self._name = name
        self._store = store

    def post(self, key: str, note: dict[str, Any]) -> None:
        """Leave a note for whoever reads this key."""
        self._store.set(key, canonical_json(note))

    def read(self, key: str, timeout_seconds: float, given_up: Callable[[], bool]) -> dict[str, Any]:
        """Wait for a note. Raises CheckpointFailedError after the timeout, or when `given_up` says so."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = deadline - time.monotonic()
            if given_up():
                raise CheckpointFailedError(f"gave up waiting for {self._name}/{key}: this process is leaving")
            if left <= 0:
                raise CheckpointFailedError(
                    f"rank {self._peers.rank} heard nothing on {self._name}/{key} for {timeout_seconds:.0f} s; another "
                    "process is gone or its upload is stuck"
                )
            try:
                self._store.wait([key], timedelta(seconds=min(left, _SLICE_SECONDS)))
            except dist.DistStoreError:
                continue  # nothing yet
            note = json.loads(self._store.get(key))
            assert isinstance(note, dict)
            return note

    def read_all(
        self, keys: Sequence[str], timeout_seconds: float, given_up: Callable[[], bool]
    ) -> list[dict[str, Any]]:
        """Wait for several notes, in order, within one timeout."""
        deadline = time.monotonic() + timeout_seconds
        return [self.read(key, max(0.0, deadline - time.monotonic()), given_up) for key in keys]

    def erase(self, key: str) -> None:
        """Remove a note that everybody has read."""
        self._store.delete_key(key)
