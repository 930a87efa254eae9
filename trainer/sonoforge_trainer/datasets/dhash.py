"""Which pictures look alike: the next frame of a clip, or a copy with other marks, another size or compression.

A picture's hash has 256 bits: which of two neighbours of its reduction to 17 x 16 gray pixels is brighter (dHash). Two
pictures look alike where at most 10 bits differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DISTANCE = 10
"""Most bits by which the hashes of two pictures that look alike differ."""

_SIDE = 16
_WORDS = _SIDE * _SIDE // 64
_PAIRS = 2**20
"""Pairs that are compared at a time: 8 MiB for the largest temporary array."""


def dhash(pixels: NDArray[np.uint8]) -> bytes:
    """The hash, 32 bytes, of pixels [height, width] or [height, width, 3]. Colour counts by its brightness."""
    gray = Image.fromarray(pixels).convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.LANCZOS)
    reduced = np.asarray(gray)
    return np.packbits(reduced[:, 1:] > reduced[:, :-1]).tobytes()


def alike(hashes: Sequence[bytes]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places (earlier, later) of all pairs of hashes that look alike, in batches.

    Every pair is compared, and nothing is held but the hashes and one batch. Black around the fan makes the same bits 0
    in most images of a set, so that an index by parts of the hash would have nearly all of them in one bucket.
    """
    words = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, _WORDS).T.copy()
    count = len(hashes)
    rows = max(1, _PAIRS // max(1, count))
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        # 256 bits that all differ do not fit into the uint8 that a word's count is.
        bits = np.zeros((stop - start, count - start), np.uint16)
        for word in words:
            bits += np.bitwise_count(word[start:stop, None] ^ word[None, start:])
        first, second = np.nonzero(bits <= DISTANCE)
        after = second > first
        yield first[after] + start, second[after] + start
