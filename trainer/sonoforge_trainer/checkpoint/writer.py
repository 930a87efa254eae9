"""Writing checkpoints while training goes on.

`save` copies the state to host memory and returns; a thread uploads. Every rank writes a part, rank 0 also the
teacher's backbone and its card; when all parts are reported, rank 0 writes the manifest and then COMMIT. Until COMMIT
is there, nothing is: a process killed anywhere leaves the checkpoint before it as the newest.

One upload is in flight at most. The ranks must agree whether a step saves: fold `busy()` of every rank into a flag of
the step's reduction (maximum), and call `save` on all ranks or `skip` on all ranks. Where they disagree all the same,
the rank that left out its part says so, and the checkpoint fails on all ranks instead of hanging.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import structlog
import torch
from torch import Tensor

from sonoforge_trainer.checkpoint.errors import CheckpointFailedError, CheckpointTimeoutError, SupersededError
from sonoforge_trainer.checkpoint.identity import RunIdentity, utc_text
from sonoforge_trainer.checkpoint.once import write_once
from sonoforge_trainer.checkpoint.peers import Board, Peers
from sonoforge_trainer.checkpoint.staging import HostBuffer
from sonoforge_trainer.checkpoint.store import PRUNED, CheckpointStore, manifest_fault, reference
from sonoforge_trainer.checkpoint.tensorfile import deal
from sonoforge_trainer.contract import (
    COMMIT,
    MANIFEST,
    MODEL_CARD,
    QUARANTINE,
    TEACHER,
    CheckpointManifest,
    CheckpointRef,
    ModelCard,
    StoredObject,
    checkpoint_prefix,
    parse_prefix,
)
from sonoforge_trainer.storage import Storage

OUTCOME = "outcome"
"""Key of rank 0's note about how a save ended."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = frozenset({MANIFEST, COMMIT, MODEL_CARD, TEACHER, QUARANTINE, PRUNED})
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds. The tensors are read during `save` only."""

    step: int
    """Optimiser steps done; 0 is the random initialisation."""
    samples: int
    """Images seen."""
    tensors: Mapping[str, Tensor]
    """The whole training state by name, the same on every rank."""
    teacher: Mapping[str, Tensor]
    """The teacher's backbone by plain DINOv2 name."""
    card: ModelCard
    """What the backbone expects."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further objects that this rank writes, such as logs up to this step. No two ranks write the same name."""


@dataclass(frozen=True)
class SaveResult:
    """How a save ended; the same on every rank."""

    step: int
    """Optimiser steps done when it was saved."""
    ref: CheckpointRef | None
    """The committed checkpoint, or None."""
    error: CheckpointFailedError | SupersededError | None
    """Why there is none."""
    stall_seconds: float
    """Time that `save` held up this rank."""
    upload_seconds: float
    """Time from then until the commit was known to this rank."""
    bytes: int
    """Written by this rank."""


@dataclass(frozen=True)
class _Staged:
    """A snapshot in host memory, ready to upload."""

    step: int
    samples: int
    created: str
    board: str
    """Where the ranks leave notes about this try."""
    files: Mapping[str, memoryview]
    """What this rank writes, by object name."""


class CheckpointWriter:
    """Saves the state of one process group. Its methods belong to the training thread.

    `attempt` identifies the process group: the same on every rank, never used before (`fresh_attempt`). `restored` is
    the checkpoint that the run continues from.
    """

    def __init__(
        self,
        storage: Storage,
        uri: str,
        identity: RunIdentity,
        attempt: str,
        peers: Peers | None = None,
        *,
        restored: CheckpointRef | None = None,
        device: torch.device | None = None,
        peers_timeout_seconds: float = 900.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if parse_prefix(checkpoint_prefix(uri, 0, attempt)) != (0, attempt):
            raise ValueError(f"attempt {attempt!r} cannot be part of a prefix; use letters and digits only")
        self.skipped = 0
        """Checkpoints left out because the one before was still uploading."""
        self._storage = storage
        self._uri = uri
        self._identity = identity
        self._attempt = attempt
        self._peers = peers or Peers()
        self._previous = restored.manifest_digest if restored else None
        self._newest_step = restored.step if restored else -1  # of the checkpoints that led here
        self._timeout_seconds = peers_timeout_seconds
        self._clock = clock
        device = device or torch.device("cpu")
        self._state_buffer, self._teacher_buffer = HostBuffer(device), HostBuffer(device)
        self._thread: threading.Thread | None = None
        self._step: int | None = None  # of the newest save, which `_failure` says did not work
        self._failure: CheckpointFailedError | SupersededError | None = None
        self._created = ""  # time of that save
        self._tries: dict[int, int] = {}  # saves of the newest step, so that no try reads the notes of another
        self._outcome_board: Board | None = None  # where the newest outcome is
        self._leaving = threading.Event()
        self._results: deque[SaveResult] = deque()  # not yet collected, oldest first

    def busy(self) -> bool:
        """A checkpoint is still uploading. For the step's flags."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, snapshot: Snapshot) -> bool:
        """Copy the state and start the upload; the tensors may change as soon as this returns.

        False where an upload is in flight: this one is left out and counted. True also where this step is on its way
        or was saved last; a step that failed is tried again. Raises the error of the save before where that failed and
        its result was not collected.
        """
        if snapshot.step == self._step and self._failure is None:
            return True
        busy = self.busy()
        if not busy and self._failure is not None and self._results:
            self._results.pop()
            raise self._failure
        tries = self._tries.get(snapshot.step, 0)
        self._tries = {snapshot.step: tries + 1}
        board = f"checkpoint/{self._attempt}/{snapshot.step}/{tries}"
        if busy:
            self.skip(snapshot.step)
            if self._peers.world_size > 1:
                note = {"error": f"rank {self._peers.rank} was still uploading the one before"}
                self._peers.board(board).post(f"part-{self._peers.rank}", note)
            return False
        started = time.perf_counter()
        # A second try writes the same bytes, so that it can finish what the first one began.
        created = self._created if snapshot.step == self._step else utc_text(self._clock())
        staged = self._stage(snapshot, created, board)
        stall_seconds = time.perf_counter() - started
        self._step, self._failure, self._created = snapshot.step, None, created
        self._thread = threading.Thread(
            target=self._run, args=(staged, stall_seconds), name=f"checkpoint-{snapshot.step}", daemon=True
        )
        self._thread.start()
        return True

    def skip(self, step: int) -> None:
        """Count a checkpoint that all ranks left out because one of them was still uploading."""
        self.skipped += 1
        _log.warning("checkpoint skipped: the one before is still uploading", step=step, skipped=self.skipped)

    def poll(self) -> SaveResult | None:
        """The oldest result that was not collected yet, or None. Never blocks."""
        return self._results.popleft() if self._results else None

    def wait(self, timeout_seconds: float) -> SaveResult | None:
        """Wait for the upload in flight, then as `poll`. Raises CheckpointTimeoutError when time is over."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                raise CheckpointTimeoutError(
                    f"the checkpoint of step {self._step} was not committed within {timeout_seconds:.0f} s; "
                    "the one before it is the newest. Give the process more time to end, or faster storage"
                )
        return self.poll()

    def close(self) -> None:
        """Stop waiting for other ranks. An upload that still runs is left behind, uncommitted."""
        self._leaving.set()

    def _stage(self, snapshot: Snapshot, created: str, board: str) -> _Staged:
        rank, world_size = self._peers.rank, self._peers.world_size
        sizes = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in snapshot.tensors.items()}
        teacher_bytes = sum(tensor.numel() * tensor.dtype.itemsize for tensor in snapshot.teacher.values())
        mine = deal(sizes, world_size, first_load=teacher_bytes)[rank]
        files = {
            f"state-{rank:05d}-of-{world_size:05d}.safetensors": self._state_buffer.begin(
                {name: snapshot.tensors[name] for name in mine}
            )
        }
        if rank == 0:
            files[TEACHER] = self._teacher_buffer.begin(snapshot.teacher)
        self._state_buffer.finish()
        self._teacher_buffer.finish()
        views = {name: file_u8.numpy().data for name, file_u8 in files.items()}
        if rank == 0:
            views[MODEL_CARD] = memoryview(snapshot.card.to_json().encode())
        for name, content in snapshot.files.items():
            if name in _RESERVED or name in views or not _FILE_NAME.fullmatch(name):
                raise ValueError(f"a file named {name!r} cannot be a part of a checkpoint; use another name")
            views[name] = memoryview(content)
        return _Staged(snapshot.step, snapshot.samples, created, board, views)

    def _run(self, staged: _Staged, stall_seconds: float) -> None:
        """The upload thread."""
        started = time.perf_counter()
        ref: CheckpointRef | None = None
        failure: CheckpointFailedError | SupersededError | None = None
        try:
            ref = self._upload(staged)
        except SupersededError as error:
            failure = error
            _log.error("checkpoint superseded", step=staged.step, error=str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it must reach the training thread
            failure = CheckpointFailedError(f"the checkpoint of step {staged.step} was not written: {error}")
            failure.__cause__ = error
            _log.error("checkpoint failed", step=staged.step, error=str(error), kind=type(error).__name__)
        written = sum(len(file) for file in staged.files.values())
        seconds = time.perf_counter() - started
        if ref is not None:
            self._previous, self._newest_step = ref.manifest_digest, ref.step
            _log.info("checkpoint committed", id=ref.id, stall_seconds=stall_seconds, upload_seconds=seconds)
        self._failure = failure
        self._results.append(SaveResult(staged.step, ref, failure, stall_seconds, seconds, written))

    def _upload(self, staged: _Staged) -> CheckpointRef:
        """Write this rank's objects, and see the checkpoint committed."""
        if self._peers.world_size == 1:
            return self._commit(staged, self._write_files(staged))
        return self._upload_first(staged) if self._peers.rank == 0 else self._upload_other(staged)

    def _upload_first(self, staged: _Staged) -> CheckpointRef:
        board = self._peers.board(staged.board)
        try:
            objects = self._write_files(staged)
            keys = [f"part-{rank}" for rank in range(1, self._peers.world_size)]
            for note in board.read_all(keys, self._timeout_seconds, self._leaving.is_set):
                _raise_error_of(note)
                objects += [StoredObject.parse(stored) for stored in note["objects"]]
            ref = self._commit(staged, objects)
        except Exception as error:
            board.post(OUTCOME, {"error": str(error), "superseded": isinstance(error, SupersededError)})
            raise
        board.post(OUTCOME, {"ref": ref.document()})
        # All parts of this checkpoint are in, so every rank has read the outcome of the one before.
        if self._outcome_board is not None:
            self._outcome_board.erase(OUTCOME)
        self._outcome_board = board
        return ref

    def _upload_other(self, staged: _Staged) -> CheckpointRef:
        board, key = self._peers.board(staged.board), f"part-{self._peers.rank}"
        try:
            objects = self._write_files(staged)
        except Exception as error:
            board.post(key, {"error": f"rank {self._peers.rank}: {error}"})
            raise
        board.post(key, {"objects": [stored.document() for stored in objects]})
        note = board.read(OUTCOME, self._timeout_seconds, self._leaving.is_set)
        board.erase(key)
        _raise_error_of(note)
        return CheckpointRef.parse(note["ref"])

    def _write_files(self, staged: _Staged) -> list[StoredObject]:
        prefix = checkpoint_prefix(self._uri, staged.step, self._attempt)
        objects = []
        for name, data in staged.files.items():
            digest = _sha256(data)
            write_once(self._storage, f"{prefix}/{name}", data, digest)
            objects.append(StoredObject(name=name, bytes=len(data), sha256=digest))
        return objects

    def _commit(self, staged: _Staged, objects: list[StoredObject]) -> CheckpointRef:
        identity = self._identity
        manifest = CheckpointManifest(
            job=identity.job,
            uid=identity.uid,
            attempt=self._attempt,
            step=staged.step,
            samples=staged.samples,
            seed=identity.seed,
            virtual_ranks=identity.virtual_ranks,
            world_size=self._peers.world_size,
            data_digest=identity.data_digest,
            config_digest=identity.config_digest,
            image_digest=identity.image_digest,
            torch_version=torch.__version__,
            created=staged.created,
            objects=tuple(sorted(objects, key=lambda stored: stored.name)),
            previous=self._previous,
        )
        if fault := manifest_fault(manifest):
            raise CheckpointFailedError(fault)
        prefix, digest = checkpoint_prefix(self._uri, staged.step, self._attempt), manifest.digest()
        self._write_text(f"{prefix}/{MANIFEST}", manifest.to_json())
        self._require_no_other_group()  # as late as can be
        self._write_text(f"{prefix}/{COMMIT}", digest)
        return reference(prefix, digest, manifest)

    def _write_text(self, uri: str, text: str) -> None:
        data = memoryview(text.encode())
        write_once(self._storage, uri, data, _sha256(data))

    def _require_no_other_group(self) -> None:
        """Raise SupersededError where another process group of the run has committed a later step than this one.

        Two can only train at once when the network was parted. What they compute is the same, but the logs of the run
        hold each step once only where each checkpoint follows the one before. Storage has no lock over several
        objects: two groups that pass here before either has written COMMIT, its retries included, both commit.
        """
        for prefix in CheckpointStore(self._storage, self._uri).prefixes():
            if prefix.committed and prefix.attempt != self._attempt and prefix.step > self._newest_step:
                here = f"step {self._newest_step}" if self._newest_step >= 0 else "no checkpoint"
                raise SupersededError(
                    f"another process group of this run committed step {prefix.step}, and this one goes on from "
                    f"{here}; the next group restores the newest checkpoint"
                )


def _sha256(data: memoryview) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _raise_error_of(note: dict[str, Any]) -> None:
    if "error" in note:
        raise (SupersededError if note.get("superseded") else CheckpointFailedError)(note["error"])
