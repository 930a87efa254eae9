"""Keyed hashes: how a sample, clip or patient is named in logs, metrics and errors without being known from them."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sonoforge_trainer.contract import ENV_HASH_KEY_FILE, ContractError

_MIN_KEY_BYTES = 16
_HEX_DIGITS = 12


@dataclass(frozen=True)
class KeyHasher:
    """Hashes texts with a secret key. Picklable, so that worker processes name a sample alike; never shows its key."""

    key: bytes = field(repr=False)
    """The secret, at least 16 bytes. Who has it can test guesses of sample keys against a log."""

    def __post_init__(self) -> None:
        if len(self.key) < _MIN_KEY_BYTES:
            raise ContractError(
                f"the hash key has {len(self.key)} bytes; give at least {_MIN_KEY_BYTES}, "
                f"for example the output of `openssl rand -hex 32`"
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The key in the file that `SONOFORGE_HASH_KEY_FILE` names, without white space around it, or a drawn one.

        With a drawn key, hashes of two processes cannot be compared. Raises ContractError where the file is missing,
        unreadable or too short.
        """
        path = environ.get(ENV_HASH_KEY_FILE)
        if not path:
            return cls(secrets.token_bytes(32))
        try:
            key = Path(path).read_bytes().strip()
        except OSError as error:
            raise ContractError(
                f"{ENV_HASH_KEY_FILE}: the key file {path} cannot be read ({error.strerror}); mount it or unset "
                f"{ENV_HASH_KEY_FILE}"
            ) from None
        try:
            return cls(key)
        except ContractError as error:
            raise ContractError(f"{ENV_HASH_KEY_FILE}: {error}") from None

    def hash(self, text: str) -> str:
        """The first 12 hex digits of HMAC-SHA256 of the text."""
        return hmac.new(self.key, text.encode(), hashlib.sha256).hexdigest()[:_HEX_DIGITS]
