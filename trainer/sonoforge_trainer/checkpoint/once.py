"""Objects that are written once."""

from __future__ import annotations

from sonoforge_trainer.checkpoint.errors import CheckpointFailedError
from sonoforge_trainer.storage import IntegrityError, ObjectExistsError, Storage


def write_once(storage: Storage, uri: str, data: memoryview, digest: str) -> None:
    """Write an object that must not exist with other content. `digest` is the sha256 of `data`.

    The same bytes being there already is success: it is what a second try finds. Raises CheckpointFailedError where the
    object holds something else, StorageError.
    """
    try:
        storage.write(uri, data, if_absent=True)
    except ObjectExistsError:
        try:
            storage.read(uri, sha256=digest)
        except IntegrityError:
            raise CheckpointFailedError(
                f"{uri} exists with other content: another process group writes with the same attempt identity; draw "
                "a new one for every process group"
            ) from None
