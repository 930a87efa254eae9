"""Storage: whole objects at s3:// and file:// URIs, by one interface, checked against the sha256 they should have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

import structlog

from sonoforge_trainer.storage.errors import IntegrityError
from sonoforge_trainer.storage.files import FileBackend
from sonoforge_trainer.storage.objects import Backend, ObjectInfo, Pin, scheme_of
from sonoforge_trainer.storage.retry import Clock
from sonoforge_trainer.storage.s3 import S3Backend
from sonoforge_trainer.storage.settings import StorageSettings

_log = structlog.get_logger(__name__)
_Buffer = TypeVar("_Buffer", bytearray, memoryview)


@dataclass(frozen=True)
class _Backends:
    """The backends of one process: connections, locks and threads do not survive a fork."""

    process: int
    file: FileBackend
    s3: S3Backend


class Storage:
    """Reads and writes objects. Safe to share between threads; may be pickled, and used on both sides of a fork.

    Passing faults (connections cut or silent, 5xx, SlowDown, expired credentials) are tried again within the budget of
    the settings. Every method raises a StorageError that names the object; InvalidURIError for a URI it cannot read.
    """

    def __init__(self, settings: StorageSettings = StorageSettings(), clock: Clock = Clock()) -> None:  # noqa: B008 - both are frozen
        self._settings = settings
        self._clock = clock
        self._backends: _Backends | None = None

    @classmethod
    def from_env(cls) -> Self:
        """Storage by SONOFORGE_S3_* and AWS_*. Raises ContractError for a value that cannot be."""
        return cls(StorageSettings.from_env())

    def __reduce__(self) -> tuple[type[Self], tuple[StorageSettings, Clock]]:
        return type(self), (self._settings, self._clock)

    def stat(self, uri: str) -> ObjectInfo:
        """Size and etag. Raises ObjectNotFoundError."""
        return self._backend(uri).stat(uri)

    def read(self, uri: str, *, sha256: str | None = None) -> bytes:
        """The whole object; `sha256` is `sha256:<hex>`. Raises ObjectNotFoundError, IntegrityError."""

        def read() -> bytearray:
            backend = self._backend(uri)
            info = backend.stat(uri)
            buffer = bytearray(info.size)
            backend.fill(uri, memoryview(buffer), 0, Pin(size=info.size, etag=info.etag))
            return buffer

        return bytes(_verified(uri, read, sha256))

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on. Raises IntegrityError where the object ends before."""
        assert offset >= 0, offset
        assert length >= 0, length
        buffer = bytearray(length)
        self._backend(uri).fill(uri, memoryview(buffer), offset, Pin())
        return bytes(buffer)

    def read_into(self, uri: str, buffer: memoryview, *, sha256: str | None = None) -> None:
        """Fill a writable, contiguous buffer of exactly the object's size, in parallel ranges and without a copy.

        Raises ObjectNotFoundError; IntegrityError where size or sha256 differ, the latter after reading everything
        twice. The buffer's content is undefined after an error.
        """
        flat = buffer.cast("B") if len(buffer) else buffer

        def read() -> memoryview:
            self._backend(uri).fill(uri, flat, 0, Pin(size=len(flat)))
            return flat

        _verified(uri, read, sha256)

    def write(self, uri: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        """Write the whole object, which appears at once or not at all.

        `if_absent` never replaces an object: of many writers one wins and the others get ObjectExistsError. Where
        `conditional_put` is false it is a look before the write, which two writers at the same moment both pass.
        """
        view = memoryview(data)
        return self._backend(uri).write(uri, view.cast("B") if len(view) else view, if_absent=if_absent)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object below the prefix, taken as a directory, sorted by URI. Nothing there is not an error."""
        # Sorted here: SeaweedFS lists a/b before a-b, and a directory tree has no such order at all.
        return iter(sorted(self._backend(prefix).list(prefix), key=lambda info: info.uri))

    def delete(self, uri: str) -> None:
        """Remove the object; no error where there is none."""
        self._backend(uri).delete(uri)

    def conditional_put(self, prefix: str) -> bool:
        """Whether `write(if_absent=True)` below the prefix is atomic; found by trying, once for each bucket."""
        return self._backend(prefix).conditional_put(prefix)

    def _backend(self, uri: str) -> Backend:
        scheme = scheme_of(uri)
        backends = self._backends
        if backends is None or backends.process != os.getpid():
            backends = _Backends(os.getpid(), FileBackend(), S3Backend(self._settings, self._clock))
            self._backends = backends
        return backends.s3 if scheme == "s3" else backends.file


def _verified(uri: str, read: Callable[[], _Buffer], sha256: str | None) -> _Buffer:
    """Read and compare; read everything once more where it differs, since what is stored may be right."""
    content = read()
    if sha256 is None or _digest(content) == sha256:
        return content
    _log.warning("storage.reading_again", uri=uri, reason="the sha256 differs")
    content = read()
    found = _digest(content)
    if found != sha256:
        raise IntegrityError(f"{uri}: the content is {found}, expected {sha256}. Restore or upload the object again.")
    return content


def _digest(content: bytearray | memoryview) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
