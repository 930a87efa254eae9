"""Shards on local disk: fetched once a node, verified, kept within a size limit.

A shard's file is named by its digest, so two data sets never mistake each other's shards. A process that reads a file
holds a shared lock on it; a file under a lock is not evicted. A download holds an exclusive lock on its temporary file;
one without a lock belongs to a dead process and is removed. Locks end with their process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, ClassVar, NamedTuple

import structlog

from sonoforge_trainer.contract.exits import Cause
from sonoforge_trainer.storage import IntegrityError, ObjectChangedError, ObjectNotFoundError, Storage

_log = structlog.get_logger(__name__)

_SHARD, _PARTIAL = ".tar", ".part"
_LOCKS = 64
_OWNER = "owner"


class DataError(ValueError):
    """A shard is missing or damaged: `ExitCode.DATA`. The message names the object and says what to do."""

    termination_cause: ClassVar[Cause] = "data"


class ShardFile(NamedTuple):
    """What identifies a shard's bytes."""

    name: str
    """File name, beside the manifest."""
    bytes: int
    """Size."""
    sha256: str
    """Digest, `sha256:<hex>`."""


class ShardCache:
    """Reads members of shards, through verified copies in a folder that any number of processes share.

    Safe to use from several threads; picklable, each process keeps its own open files.
    """

    def __init__(self, folder: Path, limit_bytes: int, storage: Storage, base_uri: str) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._storage, self._base_uri = storage, base_uri.rstrip("/")
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, tuple[IO[bytes], mmap.mmap]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_open")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    def uri(self, shard: ShardFile) -> str:
        """Where a shard comes from."""
        return f"{self._base_uri}/{shard.name}"

    def read(self, shard: ShardFile, offset: int, length: int) -> bytes:
        """Bytes of a shard, fetched if it is not there. Raises DataError and StorageError."""
        with self._lock:
            while (opened := self._opened(shard)) is None:
                self._lock.release()
                try:
                    self.fetch(shard)
                finally:
                    self._lock.acquire()
            return opened[1][offset : offset + length]

    def fetch(self, shard: ShardFile) -> None:
        """Make sure that the folder holds the shard. Raises DataError and StorageError."""
        path = self._path(shard)
        with self._fetching(shard):
            if self._is_intact(path, shard):
                return
            started = time.monotonic()
            self._download(path, shard)
            _log.debug("cache.fetched", shard=shard.name, bytes=shard.bytes, seconds=time.monotonic() - started)

    def close(self) -> None:
        """Close all files of this process."""
        with self._lock:
            while self._open:
                self._close_oldest()

    def _path(self, shard: ShardFile) -> Path:
        return self._folder / f"{shard.sha256.removeprefix('sha256:')}{_SHARD}"

    def _opened(self, shard: ShardFile) -> tuple[IO[bytes], mmap.mmap] | None:
        if shard.sha256 not in self._open:
            with contextlib.ExitStack() as stack:
                try:
                    file = stack.enter_context(self._path(shard).open("rb"))
                except FileNotFoundError:
                    return None
                fcntl.flock(file, fcntl.LOCK_SH)
                status = os.fstat(file.fileno())
                if not status.st_nlink or not _has_stamp(status, shard):
                    return None  # Evicted between opening and locking, or changed by somebody else.
                os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
                self._open[shard.sha256] = file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                stack.pop_all()
        self._open.move_to_end(shard.sha256)
        return self._open[shard.sha256]

    def _close_oldest(self) -> None:
        _, (file, mapped) = self._open.popitem(last=False)
        mapped.close()
        file.close()

    @contextlib.contextmanager
    def _fetching(self, shard: ShardFile) -> Iterator[None]:
        """One process at a time for a shard. A fixed number of lock files never has to be cleaned up."""
        self._folder.mkdir(parents=True, exist_ok=True)
        number = zlib.crc32(shard.sha256.encode()) % _LOCKS
        with (self._folder / f"lock-{number:02d}").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _is_intact(self, path: Path, shard: ShardFile) -> bool:
        """A file that was written since it was verified is verified again."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if _has_stamp(status, shard):
                    return True
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if status.st_size == shard.bytes and f"sha256:{digest}" == shard.sha256:
                    _stamp(file, shard)
                    return True
        except FileNotFoundError:
            return False
        _log.warning("cache.changed_on_disk", shard=shard.name, action="fetching it again")
        path.unlink(missing_ok=True)
        return False

    def _download(self, path: Path, shard: ShardFile) -> None:
        partial = path.with_suffix(_PARTIAL)
        try:
            with self._room_for(partial, shard.bytes) as file:
                # Not closed here: after an error, the traceback still holds parts of the buffer.
                mapped = mmap.mmap(file.fileno(), shard.bytes)
                self._storage.read_into(self.uri(shard), memoryview(mapped), sha256=shard.sha256)
                mapped.flush()
                os.fsync(file.fileno())
                _stamp(file, shard)
                partial.replace(path)
        except ObjectNotFoundError as error:
            raise DataError(
                f"shard {self.uri(shard)} is missing. Restore it, or build the data set again. ({error})"
            ) from error
        except (IntegrityError, ObjectChangedError) as error:
            raise DataError(
                f"shard {self.uri(shard)} is not the one that the manifest lists. Restore it, or run "
                f"`sonoforge shards verify` and build the data set again. ({error})"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def _room_for(self, partial: Path, size: int) -> IO[bytes]:
        """A locked temporary file of this size. Leftovers, and the files opened longest ago, make room for it."""
        with (self._folder / "lock-room").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            sizes: dict[Path, tuple[int, int]] = {}
            used = 0
            for path in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.suffix == _PARTIAL and not _remove_unlocked(path):
                        used += path.stat().st_size
                    if path.suffix == _SHARD:
                        status = path.stat()
                        sizes[path] = status.st_atime_ns, status.st_size
            used += sum(file_size for _, file_size in sizes.values())
            used -= _evict(sizes, used + size - self._limit_bytes)
            # What is left is in use. This process can do without its own, and open them again.
            with self._lock:
                while self._open and used + size > self._limit_bytes:
                    self._close_oldest()
                    used -= _evict(sizes, used + size - self._limit_bytes)
            file = partial.open("w+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            os.posix_fallocate(file.fileno(), 0, size)
            return file


def _evict(sizes: dict[Path, tuple[int, int]], excess: int) -> int:
    """Remove files that nobody reads, oldest first, until `excess` bytes are gone. Returns the bytes removed."""
    removed = 0
    for path in sorted(sizes, key=sizes.__getitem__):
        if removed < excess and _remove_unlocked(path):
            removed += sizes.pop(path)[1]
    return removed


def _remove_unlocked(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True
    return True


def _stamp_ns(shard: ShardFile) -> int:
    """The modification time of a verified file. Whoever writes to the file later changes it."""
    return (1_000_000_000 + zlib.crc32(shard.sha256.encode()) % 500_000_000) * 1_000_000_000


def _stamp(file: IO[bytes], shard: ShardFile) -> None:
    os.utime(file.fileno(), ns=(time.time_ns(), _stamp_ns(shard)))


def _has_stamp(status: os.stat_result, shard: ShardFile) -> bool:
    return status.st_size == shard.bytes and status.st_mtime_ns == _stamp_ns(shard)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder for this process, removed at the end; those that dead processes left are removed first."""
    parent = Path(tempfile.gettempdir())
    prefix = f"sonoforge-shards-{os.getuid()}-"
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), (left / _OWNER).open("rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name,
        Path(name, _OWNER).open("wb") as owner,
    ):
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield Path(name)
