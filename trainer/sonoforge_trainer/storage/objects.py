"""The words storage speaks in: where an object is, what is known of it, and what a backend can do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote_to_bytes

from sonoforge_trainer.storage.errors import IntegrityError, InvalidURIError, ObjectChangedError

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_PATH_SAFE = "/-._~:@!$&'()*+,;="  # RFC 3986 pchar and the slash

TEMPORARY = ".sonoforge-tmp-"
"""Prefix of the names of unfinished files. They are not objects: no URI names them and no listing shows them."""


@dataclass(frozen=True)
class ObjectInfo:
    """What is known of an object without reading it."""

    uri: str
    """The object, s3:// or file://."""
    size: int
    """Bytes."""
    etag: str
    """Changes when the content changes; without quotes. Not a digest one can rely on."""
    modified: float = 0.0
    """Unix time of the last write by the storage's clock, S3's in whole seconds. 0 where an answer does not say it."""


@dataclass
class Pin:
    """The one version of an object that a read is about. Filled by the first answer, checked against all others."""

    size: int | None = None
    """Bytes; None until known."""
    etag: str = ""
    """Empty until known."""

    def check(self, uri: str, *, size: int | None, etag: str) -> None:
        """Take over what is not known yet, and raise IntegrityError or ObjectChangedError for what differs."""
        if self.etag and etag and etag != self.etag:
            raise ObjectChangedError(
                f"{uri}: the object was replaced while it was read. Find out what rewrites it, and read again."
            )
        if size is not None and self.size is not None and size != self.size:
            raise IntegrityError(
                f"{uri}: the object has {size} bytes, expected {self.size}. Restore or upload it again."
            )
        self.etag = self.etag or etag
        self.size = size if self.size is None else self.size


class Backend(Protocol):
    """One scheme. Methods behave as those of `Storage`; `fill` is the one way to read."""

    def stat(self, uri: str) -> ObjectInfo:
        """See Storage.stat."""
        ...

    def fill(self, uri: str, buffer: memoryview, offset: int, pin: Pin) -> None:
        """Fill the whole buffer with the bytes from `offset` on, all of the version that `pin` names."""
        ...

    def write(self, uri: str, data: memoryview, *, if_absent: bool) -> ObjectInfo:
        """See Storage.write."""
        ...

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        """See Storage.list; in any order."""
        ...

    def delete(self, uri: str) -> None:
        """See Storage.delete."""
        ...

    def conditional_put(self, prefix: str) -> bool:
        """See Storage.conditional_put."""
        ...


def scheme_of(uri: str) -> str:
    """`s3` or `file`. Raises InvalidURIError for everything else, without quoting it: it may hold a password."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme not in ("s3", "file"):
        raise InvalidURIError(
            "a storage URI begins with s3:// or file://, for example s3://bucket/key or file:///data/x"
        )
    return scheme


def parse_s3(uri: str, *, prefix: bool = False) -> tuple[str, str]:
    """Split `s3://bucket/key`; the key is taken literally, as S3 does. A prefix may be empty or end with a slash."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidURIError(
            "an S3 URI is s3://BUCKET/KEY with a plain bucket name; server and credentials belong in the environment "
            "(AWS_ENDPOINT_URL_S3, AWS_SHARED_CREDENTIALS_FILE), not in the URI"
        )
    if prefix:
        return bucket, f"{key.rstrip('/')}/" if key.rstrip("/") else ""
    if not key or key.endswith("/"):
        raise InvalidURIError(f"{uri}: this names a prefix, not an object; give the object's full key")
    if any(part in (".", "..") for part in key.split("/")):
        raise InvalidURIError(f"{uri}: '.' and '..' are not allowed in a key, since gateways resolve them differently")
    return bucket, key


def parse_file(uri: str, *, prefix: bool = False) -> Path:
    """The absolute path of `file:///path` or `file://localhost/path`; percent-encoding is decoded (RFC 8089).

    Refuses other hosts, `.` and `..` (also when encoded), encoded slashes and NUL, so that what a URI says and where it
    points are the same; `?` and `#` are plain characters.
    """
    host, slash, encoded = uri.removeprefix("file://").partition("/")
    if host not in ("", "localhost") or not slash:
        raise InvalidURIError(f"{uri}: a file URI is file:///ABSOLUTE/PATH, with three slashes and no host")
    stripped = encoded.rstrip("/") if prefix else encoded
    names = []
    for part in stripped.split("/") if stripped else []:
        name = unquote_to_bytes(part).decode("utf-8", "surrogateescape")
        if name in ("", ".", "..") or "/" in name or "\0" in name or name.startswith(TEMPORARY):
            raise InvalidURIError(f"{uri}: the part {part!r} of the path is not allowed; write the plain absolute path")
        names.append(name)
    if not names and not prefix:
        raise InvalidURIError(f"{uri}: this names a directory, not an object")
    return Path("/", *names)


def join_file(prefix: str, relative: Path) -> str:
    """The URI of a file below a prefix. The prefix stays as it was given, so that it remains a prefix of the result."""
    return f"{prefix.rstrip('/')}/{quote(relative.as_posix().encode('utf-8', 'surrogateescape'), safe=_PATH_SAFE)}"
