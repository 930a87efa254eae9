"""Starting a process group from the newest sound checkpoint.

Rank 0 alone reads it and broadcasts the files. If every rank read for itself, the egress would be W times the state,
and a read that fails on one rank only would send the ranks to different checkpoints.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from sonoforge_trainer.checkpoint.errors import CheckpointError
from sonoforge_trainer.checkpoint.peers import Peers
from sonoforge_trainer.checkpoint.store import CheckpointStore, LoadedCheckpoint, merge
from sonoforge_trainer.contract import CheckpointManifest, CheckpointRef
from sonoforge_trainer.contract.exits import Cause

_CHUNK_BYTES = 256 * 2**20


class RestoreError(CheckpointError):
    """Rank 0 could not restore, and says why in its own error; the other ranks end with this one, a consequence."""

    termination_cause: ClassVar[Cause] = "collective"


def restore(
    store: CheckpointStore, peers: Peers, attempt: str, *, timeout_seconds: float = 3600.0
) -> LoadedCheckpoint | None:
    """The newest sound checkpoint, the same on every rank; None where there never was one. All ranks call it together.

    Raises on rank 0 what `CheckpointStore.load_latest` raises, on the others RestoreError. The timeout is for the read;
    the ranks wait for it at the store, not in a collective.
    """
    if peers.world_size == 1:
        return store.load_latest()
    board = peers.board(f"restore/{attempt}")
    if peers.rank == 0:
        try:
            loaded = store.load_latest()
        except Exception as error:
            board.post("outcome", {"error": f"{type(error).__name__}: {error}"})
            raise
        board.post("outcome", _describe(loaded))
        for part_u8 in loaded.parts if loaded else ():
            _broadcast(part_u8, peers.group)
        return loaded
    note = board.read("outcome", timeout_seconds, lambda: False)
    if "error" in note:
        raise RestoreError(f"rank 0 could not restore: {note['error']}")
    if "ref" not in note:
        return None
    ref, manifest = CheckpointRef.parse(note["ref"]), CheckpointManifest.parse(note["manifest"])
    parts = tuple(torch.empty(size, dtype=torch.uint8) for size in note["sizes"])
    for part_u8 in parts:
        _broadcast(part_u8, peers.group)
    return LoadedCheckpoint(ref, manifest, merge(ref.uri, parts), parts)


def _describe(loaded: LoadedCheckpoint | None) -> dict[str, Any]:
    if loaded is None:
        return {}
    return {
        "ref": loaded.ref.document(),
        "manifest": loaded.manifest.document(),
        "sizes": [part_u8.numel() for part_u8 in loaded.parts],
    }


def _broadcast(part_u8: Tensor, group: dist.ProcessGroup | None) -> None:
    """Send a file from rank 0 to all, in pieces: a collective's size has limits that files do not have."""
    for chunk_u8 in torch.split(part_u8, _CHUNK_BYTES):
        dist.broadcast(chunk_u8, src=0, group=group)
