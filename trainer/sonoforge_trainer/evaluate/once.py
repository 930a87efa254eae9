"""An object that the first of several writers makes."""

from __future__ import annotations

from sonoforge_trainer.storage import ObjectExistsError, ObjectNotFoundError, Storage


def write_first(storage: Storage, prefix: str, uri: str, data: bytes) -> bool:
    """Write an object unless it exists; whether this call made it.

    A conditional put where the server has it below `prefix`; elsewhere a look before the put, which two writers at the
    same moment can both pass. They write equal numbers, and one object stays.
    """
    conditional = storage.conditional_put(prefix)
    if not conditional and _exists(storage, uri):
        return False
    try:
        storage.write(uri, data, if_absent=conditional)
    except ObjectExistsError:
        return False
    return True


def _exists(storage: Storage, uri: str) -> bool:
    try:
        storage.stat(uri)
    except ObjectNotFoundError:
        return False
    return True
