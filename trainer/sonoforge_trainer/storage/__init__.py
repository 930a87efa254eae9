"""Object storage at s3:// and file:// URIs. `Storage` is the interface; what it raises is in one tree."""

from sonoforge_trainer.storage.errors import (
    CredentialsError,
    IntegrityError,
    InvalidURIError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
)
from sonoforge_trainer.storage.objects import ObjectInfo
from sonoforge_trainer.storage.retry import Clock
from sonoforge_trainer.storage.settings import StorageSettings
from sonoforge_trainer.storage.storage import Storage

__all__ = [
    "Clock",
    "CredentialsError",
    "IntegrityError",
    "InvalidURIError",
    "ObjectChangedError",
    "ObjectExistsError",
    "ObjectInfo",
    "ObjectNotFoundError",
    "Storage",
    "StorageError",
    "StorageSettings",
]
