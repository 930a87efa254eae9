"""What can go wrong with checkpoints. Faults of storage itself keep their own class, `StorageError`."""

from __future__ import annotations

from typing import ClassVar

from sonoforge_trainer.contract.exits import Cause


class CheckpointError(Exception):
    """Base of the faults below."""


class DamagedCheckpointError(CheckpointError):
    """A committed checkpoint does not hold what its manifest says: a missing, shortened or altered object."""

    termination_cause: ClassVar[Cause] = "data"

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"checkpoint {uri} is damaged: {reason}")
        self.uri = uri
        self.reason = reason


class AllCheckpointsDamagedError(CheckpointError):
    """There are checkpoints, and none of them can be used. Starting again from nothing is a decision for a person."""

    termination_cause: ClassVar[Cause] = "data"

    def __init__(self, uri: str, damaged: tuple[str, ...]) -> None:
        super().__init__(
            f"every checkpoint below {uri} is damaged ({', '.join(damaged)}); restore their objects from a copy and "
            "delete the QUARANTINE objects, or start a new job under another checkpoints.uri"
        )
        self.damaged = damaged


class ForeignCheckpointError(CheckpointError, ValueError):
    """The checkpoint belongs to another job, configuration or data set."""


class UnknownCheckpointError(CheckpointError, ValueError):
    """There is no checkpoint of this name."""


class CheckpointFailedError(CheckpointError):
    """A checkpoint could not be written. The ones before it are untouched, and training can go on."""

    termination_cause: ClassVar[Cause] = "storage"


class SupersededError(CheckpointError):
    """Another process group of the run has committed a later step than this one, as when the network was parted.

    This one commits nothing beside it, and ends; the next restores the newest checkpoint.
    """

    termination_cause: ClassVar[Cause] = "collective"


class CheckpointTimeoutError(CheckpointError):
    """A checkpoint was still uploading when the time to wait for it was over."""

    termination_cause: ClassVar[Cause] = "storage"
