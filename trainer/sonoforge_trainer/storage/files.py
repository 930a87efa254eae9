"""file:// as object storage: whole objects only, written at once or not at all, exclusive where asked."""

from __future__ import annotations

import errno
import os
import secrets
import stat as modes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from sonoforge_trainer.storage.errors import (
    IntegrityError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
)
from sonoforge_trainer.storage.objects import TEMPORARY, ObjectInfo, Pin, join_file, parse_file

_log = structlog.get_logger(__name__)

_MAY_PASS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOSPC, errno.EDQUOT}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_READ_BYTES = 2**30  # Linux gives at most 2 GiB - 4 KiB a call


class FileBackend:
    """Plain directories. A crash during a write leaves at most a file whose name begins with `.sonoforge-tmp-`."""

    def stat(self, uri: str) -> ObjectInfo:
        """See Storage.stat."""
        path = parse_file(uri)
        with _explained(uri):
            return _info(uri, path.stat())

    def fill(self, uri: str, buffer: memoryview, offset: int, pin: Pin) -> None:
        """See Backend.fill."""
        path = parse_file(uri)
        with _explained(uri), path.open("rb", buffering=0) as file:
            before = _info(uri, os.fstat(file.fileno()))
            pin.check(uri, size=before.size, etag=before.etag)
            if offset + len(buffer) > before.size:
                raise IntegrityError(
                    f"{uri}: the object has {before.size} bytes, asked for {len(buffer)} from byte {offset} on"
                )
            done = 0
            while done < len(buffer):
                count = os.preadv(file.fileno(), [buffer[done : done + _READ_BYTES]], offset + done)
                if count == 0:
                    break  # cut short meanwhile: the check below says so
                done += count
            if _info(uri, os.fstat(file.fileno())).etag != before.etag:
                raise ObjectChangedError(
                    f"{uri}: the object was replaced while it was read. Find out what rewrites it, and read again."
                )

    def write(self, uri: str, data: memoryview, *, if_absent: bool) -> ObjectInfo:
        """See Storage.write."""
        path = parse_file(uri)
        temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        with _explained(uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb", buffering=0) as file:
                    done = 0
                    while done < len(data):
                        done += os.write(file.fileno(), data[done:])
                    os.fsync(file.fileno())
                if if_absent:
                    self._publish_if_absent(uri, temporary, path)
                else:
                    temporary.replace(path)
                info = _info(uri, path.stat())
            finally:
                temporary.unlink(missing_ok=True)
            _sync_directory(path.parent)
        return info

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        """See Storage.list; in any order."""
        root = parse_file(prefix, prefix=True)
        found = []
        for directory, _, names in os.walk(root, onerror=_raise_unless_missing(prefix)):
            for name in names:
                if name.startswith(TEMPORARY):
                    continue
                path = Path(directory, name)
                uri = join_file(prefix, path.relative_to(root))
                with suppress(ObjectNotFoundError), _explained(uri):
                    found.append(_info(uri, path.stat()))
        return found

    def delete(self, uri: str) -> None:
        """See Storage.delete."""
        path = parse_file(uri)
        with suppress(ObjectNotFoundError), _explained(uri):
            path.unlink()

    def conditional_put(self, prefix: str) -> bool:
        """Whether the file system has hard links, which is how a name is taken exactly once."""
        root = parse_file(prefix, prefix=True)
        first, second = (root / f"{TEMPORARY}{secrets.token_hex(8)}" for _ in range(2))
        with _explained(prefix):
            root.mkdir(parents=True, exist_ok=True)
            try:
                first.touch(exist_ok=False)
                second.hardlink_to(first)
            except OSError as error:
                if error.errno in _NO_LINKS:
                    return False
                raise
            finally:
                first.unlink(missing_ok=True)
                second.unlink(missing_ok=True)
        return True

    @staticmethod
    def _publish_if_absent(uri: str, temporary: Path, path: Path) -> None:
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            # NFS may lose the answer of a link that was made: then the file has both names.
            if temporary.stat().st_nlink < 2:
                raise ObjectExistsError(f"{uri}: the object is there already, so this write was not made") from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                raise ObjectExistsError(f"{uri}: the object is there already, so this write was not made") from None
            _log.warning("storage.write_not_exclusive", uri=uri, reason="the file system has no hard links")
            temporary.replace(path)


def _info(uri: str, stat: os.stat_result) -> ObjectInfo:
    if not modes.S_ISREG(stat.st_mode):
        raise ObjectNotFoundError(f"{uri}: this is a directory or a device, not an object")
    etag = f"{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    return ObjectInfo(uri=uri, size=stat.st_size, etag=etag, modified=stat.st_mtime)


def _sync_directory(directory: Path) -> None:
    """Make the new name last through a power cut. Not every file system can; the content is synced either way."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_missing(prefix: str) -> Callable[[OSError], None]:
    def raise_(error: OSError) -> None:
        # A prefix without objects need not be a directory, and a directory may go while it is walked.
        with suppress(ObjectNotFoundError), _explained(prefix):
            raise error

    return raise_


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the object."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ObjectNotFoundError(f"{uri}: no such object") from None
    except PermissionError:
        raise StorageError(f"{uri}: permission denied; give this user access to the path") from None
    except OSError as error:
        retryable = error.errno in _MAY_PASS
        raise StorageError(
            f"{uri}: {os.strerror(error.errno or 0)} (errno {error.errno})", retryable=retryable
        ) from None
