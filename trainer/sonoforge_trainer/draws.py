"""Random numbers as functions of their key: the same key gives the same numbers, in any order, process or machine.

Everything comes from the raw output of Philox4x64-10 (Salmon et al., SC 2011), which NumPy promises not to change; its
distribution methods carry no such promise, so they are not used.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray


class _Key(np.random.bit_generator.ISeedSequence):
    """Hands a ready key to Philox; the constructor's `key` argument would read the system's entropy as well."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        state = np.frombuffer(self._key, dtype=dtype)
        assert len(state) == n_words
        return state


def raw(count: int, seed: int, purpose: str, *key: int) -> NDArray[np.uint64]:
    """`count` uniform 64-bit integers for (seed, purpose, key)."""
    digest = hashlib.blake2b(struct.pack(f"<{1 + len(key)}q", seed, *key), person=purpose.encode(), digest_size=16)
    generator = np.random.Philox(_Key(digest.digest()))  # type: ignore[arg-type]  # the stubs forget ISeedSequence
    return generator.random_raw(count)


def uniforms(count: int, seed: int, purpose: str, *key: int) -> NDArray[np.float64]:
    """`count` numbers uniform in [0, 1) for (seed, purpose, key), multiples of 2^-53."""
    numbers: NDArray[np.float64] = (raw(count, seed, purpose, *key) >> np.uint64(11)).astype(np.float64)
    return numbers * 2.0**-53


def permutation(count: int, seed: int, purpose: str, *key: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1 for (seed, purpose, key)."""
    return np.argsort(raw(count, seed, purpose, *key), kind="stable")
