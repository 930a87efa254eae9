"""The secret that turns patients into keyed hashes: given, or made once for this user and kept."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from sonoforge_trainer.contract import ENV_HASH_KEY_FILE
from sonoforge_trainer.redact import KeyHasher


def load_hash_key(file: Path | None, environ: Mapping[str, str] = os.environ) -> tuple[KeyHasher, str]:
    """The hasher, and a sentence for the user where a key was made (else empty).

    The key is read from `file`, or from the file that SONOFORGE_HASH_KEY_FILE names, or from `sonoforge/hash.key` in
    the user's configuration folder, which is made with mode 0600 at the first use. With one key, patients of different
    data sets can be compared; it lies outside every data set. Raises ValueError where a key is unreadable or too short.
    """
    if file is not None:
        return KeyHasher.from_env({ENV_HASH_KEY_FILE: str(file)}), ""
    if environ.get(ENV_HASH_KEY_FILE):
        return KeyHasher.from_env(environ), ""
    config = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "~").expanduser() / ".config")
    path = config / "sonoforge" / "hash.key"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Linked into place when complete, so that a second process never reads half a key.
    fresh = path.with_name(f"hash.key.{secrets.token_hex(4)}")
    note = ""
    if not path.exists():
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:  # noqa: PTH123 - a descriptor
            stream.write(secrets.token_hex(32) + "\n")
        try:
            os.link(fresh, path)
            note = f"Made a key for patient hashes: {path}. Keep it secret, and keep it: other keys give other hashes."
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return KeyHasher.from_env({ENV_HASH_KEY_FILE: str(path)}), note
