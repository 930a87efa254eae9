"""What can go wrong with an object. The class says whether to try again, the message says what to do next.

Messages name the object by its URI and never hold credentials: of a server's answer only
the code is kept.
"""

from __future__ import annotations


class StorageError(Exception):
    """Storage did not do what was asked. `retryable` says whether the same call may succeed later."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class InvalidURIError(StorageError, ValueError):
    """The text is not a URI that storage can address."""


class ObjectNotFoundError(StorageError):
    """There is no such object."""


class ObjectExistsError(StorageError):
    """A write with `if_absent` lost: the object is there already, written by somebody else."""


class ObjectChangedError(StorageError):
    """The object was replaced while it was read. What was read so far is of no use."""


class IntegrityError(StorageError):
    """The object has another size or another sha256 than expected, also when read again."""


class CredentialsError(StorageError):
    """Credentials are missing, wrong or expired, and reading them again did not help."""
