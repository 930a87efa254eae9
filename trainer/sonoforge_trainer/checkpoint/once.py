"""Objects that are written once."""

from __future__ import annotations

from sonoforge_trainer.checkpoint.errors import CheckpointFailedError
from sonoforge_trainer.storage import IntegrityError, ObjectExistsError, ObjectNotFoundError, Storage


def write_once(storage: Storage, base: str, uri: str, data: memoryview, digest: str) -> None:
    """Write an object that must not exist with other content. `digest` is that of `data`.
    `base` is the prefix at which the server is asked, once, whether it has conditional puts.

    A conditional put where the server has it; elsewhere a look before the put, which two writers at the same moment can
    both pass. The same bytes being there already is success: it is what a repeated request finds. Raises
    CheckpointFailedError where the object holds something else, StorageError.
    """
    conditional = storage.conditional_put(base)
    exists = False
    if not conditional:
        try:
            storage.stat(uri)
            exists = True
        except ObjectNotFoundError:
            pass
    if not exists:
        try:
            storage.write(uri, data, if_absent=conditional)
        except ObjectExistsError:
            exists = True
    if exists:
        try:
            storage.read(uri, sha256=digest)
        except IntegrityError:
            raise CheckpointFailedError(
                f"{uri} exists with other content: another process group writes with the same attempt identity; draw "
                "a new one for every process group"
            ) from None
