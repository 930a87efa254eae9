"""How a process says why it ended: exit codes and the termination message."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

from sonoforge_trainer.contract.base import Part


class ExitCode(IntEnum):
    """Exit codes of every Sonoforge process. 137 alone never means anything."""

    OK = 0
    """Done."""
    FAILED = 1
    """An application error."""
    CONFIG = 64
    """Configuration error: trying again cannot help."""
    DATA = 65
    """A data set or checkpoint is missing or damaged: trying again may help once it is repaired."""
    STORAGE = 69
    """Storage did not answer within its budget: trying again may help."""
    OUT_OF_MEMORY = 71
    """CUDA or host memory ran out."""
    HARDWARE = 74
    """The GPU failed: trying again may help on another machine."""
    NOT_FINITE = 76
    """Too many steps in a row without a finite gradient."""
    TERMINATED = 143
    """SIGTERM, state saved where there was time."""


Cause = Literal[
    "done",
    "config",
    "data",
    "storage",
    "memory",
    "hardware",
    "not-finite",
    "collective",
    "application",
    "terminated",
]


class Termination(Part):
    """The termination message of a pod: the file at SONOFORGE_TERMINATION_LOG, at most 4096 bytes of JSON."""

    cause: Cause
    """Class of the end; `done` for a process that ended well."""
    message: str = ""
    """One sentence without sample keys, paths of images or pixels."""
    exception: str = ""
    """Class of the exception."""
    rank: int | None = None
    """Global rank that failed first."""
    step: int | None = None
    """Step it was in."""
    final: bool = False
    """The run was asked to stop: starting the process again in its place would undo that."""
    result: dict[str, object] | None = None
    """An evaluation's scores, for a process that ended well."""


ENV_TERMINATION_LOG = "SONOFORGE_TERMINATION_LOG"
ENV_CONFIG = "SONOFORGE_CONFIG"
"""Path of the RunConfig, a JSON or YAML file."""
ENV_TOKEN_FILE = "SONOFORGE_TOKEN_FILE"
"""Path of the coordinator's bearer token."""
ENV_STORE = "SONOFORGE_STORE"
"""HOST:PORT of the coordinator's store."""
ENV_ATTEMPT = "SONOFORGE_ATTEMPT"
"""Identity of the attempt."""
ENV_IMAGE = "SONOFORGE_IMAGE"
"""The container image as the pod was given it, NAME@DIGEST where it is pinned."""
ENV_HASH_KEY_FILE = "SONOFORGE_HASH_KEY_FILE"
"""Path of the key for hashing sample keys in logs; without it a key is drawn for each process group."""
