"""One look at every image and mask of a set before anything is written: does it decode, and what is odd about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.datasets.dhash import dhash
from sonoforge_trainer.datasets.findings import Check, Findings
from sonoforge_trainer.datasets.record import Record
from sonoforge_trainer.shards.faults import ImageError
from sonoforge_trainer.shards.images import ImageRule, decode, mode_of, picture

CHECKS = (
    Check("unreadable", "warning", "images or masks cannot be used"),
    Check("alpha", "note", "images have an alpha channel; they were laid over black"),
    Check("colour", "note", "images have real colour (Doppler, or something drawn in); they stay in colour"),
    Check("mask-empty", "note", "masks show no structure"),
)
"""What every set is checked for while its pixels are looked at."""


_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass(frozen=True)
class Look:
    """What one sample shows."""

    digest: str
    """SHA-256 of the pixels, whatever file they are kept in; empty where they cannot be read."""
    size: tuple[int, int]
    """(height, width); (0, 0) where it cannot be read."""
    dhash: bytes
    """What the picture looks like, see `dhash`; empty where it cannot be read."""
    codes: tuple[str, ...]
    """Checks that it trips."""


_UNREADABLE = Look("", (0, 0), b"", ("unreadable",))


def inspect(
    records: Sequence[Record],
    findings: Findings,
    rule: ImageRule,
    further: Callable[[Record, NDArray[np.uint8]], tuple[str, ...]] | None = None,
    workers: int = 1,
    progress: Callable[[int], None] = lambda _done: None,
) -> dict[int, Look]:
    """What every readable sample shows, by row number; findings are counted. `progress` gets their number."""
    seen = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="inspect") as pool:
        looks = pool.map(lambda record: _look(record, rule, further), records)
        for done, (record, look) in enumerate(zip(records, looks, strict=True), 1):
            for code in look.codes:
                findings.add(code, references=(record.row.reference,))
            if look.digest:
                seen[record.row.number] = look
            progress(done)
    return seen


def _look(
    record: Record, rule: ImageRule, further: Callable[[Record, NDArray[np.uint8]], tuple[str, ...]] | None
) -> Look:
    codes: list[str] = []
    try:
        data = record.image.read()
        # As it will be stored: evaluations refuse a stored image that is in two splits.
        pixels = decode(picture(data, rule).data)
        if mode_of(data) in _WITH_ALPHA:
            codes.append("alpha")
        if pixels.ndim == 3 and not (pixels == pixels[..., :1]).all():
            codes.append("colour")
        if further is not None:
            codes += further(record, pixels)
        if record.mask is not None:
            mask = record.mask.read()
            codes += mask.notes
            if mask.indices.shape != pixels.shape[:2]:
                return _UNREADABLE
            if not mask.indices.any():
                codes.append("mask-empty")
    except ImageError:
        return _UNREADABLE  # the builder tells why, and stops or leaves it out as the user said
    digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes())
    height, width = pixels.shape[:2]
    return Look(digest.hexdigest(), (height, width), dhash(pixels), tuple(codes))
