"""Durable training state: write-once prefixes, checksums, a manifest and one COMMIT object.

What loads torch (the writer and the restore) is imported when it is first used, so that listing and pruning stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sonoforge_trainer.checkpoint.errors import (
    AllCheckpointsDamagedError,
    CheckpointError,
    CheckpointFailedError,
    CheckpointTimeoutError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    SupersededError,
    UnknownCheckpointError,
)
from sonoforge_trainer.checkpoint.identity import RunIdentity, fresh_attempt
from sonoforge_trainer.checkpoint.pruning import Pruned, prune
from sonoforge_trainer.checkpoint.store import PRUNED, CheckpointStore, LoadedCheckpoint, LoadedTeacher

if TYPE_CHECKING:
    from sonoforge_trainer.checkpoint.peers import Peers
    from sonoforge_trainer.checkpoint.restoring import restore
    from sonoforge_trainer.checkpoint.writer import CheckpointWriter, SaveResult, Snapshot

_NEEDS_TORCH = {
    "CheckpointWriter": "writer",
    "Peers": "peers",
    "SaveResult": "writer",
    "Snapshot": "writer",
    "restore": "restoring",
}

__all__ = [
    "PRUNED",
    "AllCheckpointsDamagedError",
    "CheckpointError",
    "CheckpointFailedError",
    "CheckpointStore",
    "CheckpointTimeoutError",
    "CheckpointWriter",
    "DamagedCheckpointError",
    "ForeignCheckpointError",
    "LoadedCheckpoint",
    "LoadedTeacher",
    "Peers",
    "Pruned",
    "RunIdentity",
    "SaveResult",
    "Snapshot",
    "SupersededError",
    "UnknownCheckpointError",
    "fresh_attempt",
    "prune",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
