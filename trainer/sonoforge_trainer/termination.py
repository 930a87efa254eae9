"""How a worker says why it failed, and how its agent passes that on.

A worker that fails calls `report`, which writes the file torch gives every worker (TORCHELASTIC_ERROR_FILE) in our own
form: torch's would hold the exception's text and stack, and those hold paths and keys. What comes out is the class of
the exception and, for exceptions of our own, whose authors keep identifiers out of messages, the message; for errors of
the system, its words for their number. Where nothing can be written, the exit code has to do.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import structlog

from sonoforge_trainer.contract import ENV_TERMINATION_LOG, ContractError, ExitCode, Termination
from sonoforge_trainer.contract.exits import Cause

_log = structlog.get_logger(__name__)

MAX_BYTES = 4096
"""Size that Kubernetes allows for a termination message."""

EXIT_CODES: dict[Cause, ExitCode] = {
    "config": ExitCode.CONFIG,
    "data": ExitCode.DATA,
    "storage": ExitCode.STORAGE,
    "memory": ExitCode.OUT_OF_MEMORY,
    "hardware": ExitCode.HARDWARE,
    "not-finite": ExitCode.NOT_FINITE,
    "collective": ExitCode.FAILED,
    "application": ExitCode.FAILED,
    "terminated": ExitCode.TERMINATED,
}
"""The exit code of each cause."""

_CAUSES_BY_CODE: dict[int, Cause] = {
    int(code): cause for cause, code in EXIT_CODES.items() if code is not ExitCode.FAILED
}
_OWN_CAUSES: dict[str, Cause] = {
    "ContractError": "config",
    "ObjectNotFoundError": "data",
    "IntegrityError": "data",
    "CredentialsError": "storage",
    "StorageError": "storage",
}
# gloo and NCCL raise plain RuntimeErrors where torch does not wrap them.
_COLLECTIVE_TEXT = re.compile(r"gloo|nccl|connection (closed|reset) by peer|process ?group", re.IGNORECASE)
# cudaGetErrorString of cudaErrorECCUncorrectable and cudaErrorNvlinkUncorrectable, and what NVML and the driver say of
# a GPU that is gone. "Unspecified launch failure" is not among them: an access out of bounds ends in it as well.
_HARDWARE_TEXT = re.compile(
    r"uncorrectable (ECC|NVLink) error|GPU is lost|fallen off the bus|device (is )?lost", re.IGNORECASE
)
# What torch says where the system has no memory for a tensor; for a GPU it has a class of its own.
_NO_MEMORY_TEXT = "DefaultCPUAllocator: can't allocate memory"
# Signals that come from outside, or from torch's watchdog (SIGABRT); others are faults of the worker.
_OUTSIDE_SIGNALS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT}
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_KEY = "sonoforge"
_PR_SET_PDEATHSIG = 1


def classify(
    exception: BaseException, *, rank: int | None = None, step: int | None = None, fault: str = ""
) -> Termination:
    """The termination of a process that an exception ended. `fault` is what the driver says is wrong with its GPU.

    An exception class of this package may name its cause in a class attribute `termination_cause`, and say that the
    end is `termination_final`; a ValueError of ours is a configuration error otherwise.
    """
    cause, message = _cause(exception), _message(exception)
    if cause in ("application", "collective"):  # all else has its reason whatever the GPU does
        said = _HARDWARE_TEXT.search(str(exception)) if isinstance(exception, RuntimeError) else None
        fault = fault or (said.group() if said else "")
        if fault:
            cause, message = "hardware", f"The GPU failed: {fault}."
    return Termination(
        cause=cause,
        message=message,
        exception=type(exception).__name__,
        rank=rank,
        step=step,
        final=_is_ours(type(exception)) and getattr(exception, "termination_final", False),
    )


def exit_code(termination: Termination) -> ExitCode:
    """The code to exit with."""
    return EXIT_CODES[termination.cause]


def report(exception: BaseException, *, rank: int | None = None, step: int | None = None, fault: str = "") -> ExitCode:
    """Tell the agent why this worker fails. Returns the code that the worker must exit with."""
    termination = classify(exception, rank=rank, step=step, fault=fault)
    path = os.environ.get(_ERROR_FILE)
    if path:
        # torch wants `message` and `timestamp`; the agent reads the rest.
        record = {
            "message": termination.exception,
            "timestamp": int(time.time()),
            "time": time.time(),
            _KEY: termination.document(),
        }
        part = Path(f"{path}.part")  # half a report would be none, and torch does not read it
        try:
            part.write_text(json.dumps(record))
            part.rename(path)
        except OSError as error:
            _log.warning("report-not-written", exception=type(error).__name__, error=_system_words(error))
    return exit_code(termination)


def of_worker(exit_status: int, record: Mapping[str, Any], rank: int) -> Termination:
    """Why a worker ended: from its report, or else from its exit status (negative: a signal)."""
    if _KEY in record:
        try:
            return Termination.parse(record[_KEY]).model_copy(update={"rank": rank})
        except ContractError:
            pass  # a broken report is worth as much as none
    if exit_status < 0:
        number = -exit_status
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        cause: Cause = "collective" if number in _OUTSIDE_SIGNALS else "application"
        return Termination(cause=cause, message=f"The worker was ended by {name}.", rank=rank)
    cause = _CAUSES_BY_CODE.get(exit_status, "application")
    return Termination(cause=cause, message=f"The worker exited with code {exit_status} and no report.", rank=rank)


def first(records: list[tuple[float, Termination]]) -> Termination:
    """The root cause among (time, termination) pairs: the earliest that is not the consequence of another's end."""
    consequences = ("collective", "terminated")
    return min(records, key=lambda record: (record[1].cause in consequences, record[0]))[1]


def restartable(termination: Termination) -> bool:
    """Whether starting the workers again in the same agents is the answer.

    It is where a peer was lost, or told to go and the others with it; not where the run was asked to stop.
    """
    return termination.cause in ("collective", "terminated") and not termination.final


def write(termination: Termination) -> None:
    """Write the termination message of this pod, cut to the size that Kubernetes allows, if one is asked for.

    Where it cannot be written, the log says so: the process ends as it would have.
    """
    path = os.environ.get(ENV_TERMINATION_LOG)
    if not path:
        return
    text = termination.to_json()
    excess = len(text.encode()) - MAX_BYTES
    if excess > 0:
        kept = termination.message.encode()[: max(0, len(termination.message.encode()) - excess - 3)]
        shorter = termination.model_copy(update={"message": kept.decode(errors="ignore") + "…"})
        text = shorter.to_json()
    try:
        Path(path).write_text(text)
    except OSError as error:
        _log.warning("termination-not-written", exception=type(error).__name__, error=_system_words(error))


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, so that a killed agent leaves no worker that trains on."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("sonoforge_trainer", "sonoforge_operator")


def _cause(exception: BaseException) -> Cause:
    ours = [kind for kind in type(exception).__mro__ if _is_ours(kind)]
    if isinstance(exception, SystemExit) and isinstance(exception.code, int):
        return _CAUSES_BY_CODE.get(exception.code, "application")
    for kind in ours:
        stated = kind.__dict__.get("termination_cause", _OWN_CAUSES.get(kind.__name__))
        if stated in get_args(Cause):
            return stated  # type: ignore[no-any-return] # checked by the line above
    if ours and isinstance(exception, ValueError):
        return "config"
    names = {kind.__name__ for kind in type(exception).__mro__}
    if isinstance(exception, MemoryError) or "OutOfMemoryError" in names:
        return "memory"
    if isinstance(exception, RuntimeError) and _NO_MEMORY_TEXT in str(exception):
        return "memory"
    if isinstance(exception, FloatingPointError):
        return "not-finite"
    if "DistError" in names or (isinstance(exception, RuntimeError) and _COLLECTIVE_TEXT.search(str(exception))):
        return "collective"
    return "application"


def _message(exception: BaseException) -> str:
    if _is_ours(type(exception)):
        return " ".join(str(exception).split())
    what, words = type(exception).__name__, _system_words(exception)
    return f"{what}{words and f': {words}'} (its text is not shown: it may hold paths or keys)."


def _system_words(exception: BaseException) -> str:
    """What the system says of an error by its number; empty where it has none. Other modules count in their own way."""
    number = exception.errno if isinstance(exception, OSError) and type(exception).__module__ == "builtins" else None
    return os.strerror(number) if isinstance(number, int) and number in errno.errorcode else ""
