"""Masks as public sets keep them: values to be renamed, outlines to be filled, several files for one image."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sonoforge_trainer.datasets.ellipse import Ellipse, fit_ellipse
from sonoforge_trainer.datasets.record import Indices, MaskPixels, read_file
from sonoforge_trainer.shards.faults import ImageError
from sonoforge_trainer.shards.images import decode

WHITE = 255


def channel(path: Path) -> NDArray[np.uint8]:
    """A mask file as one channel, [height, width]: equal channels are one, alpha is dropped. Raises ImageError."""
    pixels = decode(read_file(path))
    if pixels.ndim == 3:
        colours = pixels[..., : 3 if pixels.shape[2] >= 3 else 1]
        if not (colours == colours[..., :1]).all():
            raise ImageError("the mask is coloured; give one channel of class numbers")
        pixels = colours[..., 0]
    if pixels.ndim != 2:
        raise ImageError("the mask has no two dimensions")
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(WHITE)
    if pixels.dtype.kind == "f" or pixels.min(initial=0) < 0 or pixels.max(initial=0) > WHITE:
        raise ImageError("the mask has values that are not 0 to 255; give one channel of class numbers")
    return pixels.astype(np.uint8)


def renamed(pixels: NDArray[np.uint8], values: Mapping[int, int]) -> Indices:
    """Values of a file to class indices. Raises ImageError where the file has others."""
    table = np.full(256, WHITE, np.uint8)
    for value, index in values.items():
        table[value] = index
    unknown = [int(v) for v in np.unique(pixels) if int(v) not in values]
    if unknown:
        shown = ", ".join(map(str, unknown[:8])) + (" ..." if len(unknown) > 8 else "")
        allowed = ", ".join(map(str, sorted(values)))
        raise ImageError(f"the mask has the value{'s' * (len(unknown) > 1)} {shown}; allowed: {allowed}")
    return table[pixels]


@dataclass(frozen=True)
class ValueMask:
    """A file whose values mean classes."""

    path: Path
    values: Mapping[int, int] = field(default_factory=dict)
    """Value in the file to class index."""

    def read(self) -> MaskPixels:
        """The class indices. Raises ImageError."""
        return MaskPixels(renamed(channel(self.path), self.values))


@dataclass(frozen=True)
class UnionMask:
    """Several files of one class for one image: a pixel is in where any file says so."""

    paths: tuple[Path, ...]
    threshold: int = 127
    """Values above are in."""

    def read(self) -> MaskPixels:
        """0 and 1. Raises ImageError."""
        notes = set()
        whole: NDArray[np.bool_] | None = None
        for path in self.paths:
            pixels = channel(path)
            if not np.isin(pixels, (0, WHITE)).all():
                notes.add("mask-between")
            inside = pixels > self.threshold
            if whole is not None and whole.shape != inside.shape:
                raise ImageError("the masks of this image have different sizes")
            whole = inside if whole is None else whole | inside
        assert whole is not None
        return MaskPixels(whole.astype(np.uint8), tuple(sorted(notes)))


@dataclass(frozen=True)
class OutlineMask:
    """A file with the thin closed line around one structure, which becomes the area inside."""

    path: Path
    circumference: float | None = None
    """What its table says the ellipse measures, in pixels."""

    def read(self) -> MaskPixels:
        """0 and 1. Raises ImageError.

        A closed line is filled. One that the image's border cuts has no inside: there the ellipse through its pixels is
        filled, as far as it lies in the image.
        """
        line = channel(self.path) > WHITE // 2
        if line.sum() < 8:
            raise ImageError("the annotation has no outline")
        notes = []
        filled = fill(line)
        ellipse = fit_ellipse(*np.nonzero(line)[::-1])
        if ellipse is not None and self.circumference:
            off = abs(ellipse.circumference() / self.circumference - 1)
            if off > 0.03:
                notes.append("circumference")
        if filled.sum() <= 2 * line.sum():
            if ellipse is None:
                raise ImageError("the outline is open and no ellipse fits it")
            filled = _drawn(ellipse, line.shape) | line
            notes.append("outline-open")
        return MaskPixels(filled.astype(np.uint8), tuple(notes))


def fill(line: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The line and everything that it cuts off from the border, [height, width]."""
    # One row and column of outside all round, so that one start reaches every part of it.
    canvas = Image.fromarray(np.pad(line, 1).astype(np.uint8))
    outside = _flooded(np.asarray(canvas).astype(bool))
    return np.asarray(~outside[1:-1, 1:-1])


def _flooded(line: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What can be reached from the corner in steps along rows and columns without touching the line.

    Whole runs of free pixels are reached at once; passes alternate between rows and columns until nothing is new.
    """
    free = ~line
    reached = np.zeros_like(free)
    reached[0, :] = reached[-1, :] = free[0, :]
    reached[:, 0] = reached[:, -1] = True
    while True:
        before = int(reached.sum())
        reached = _spread(reached, free)
        reached = _spread(reached.T, free.T).T
        if int(reached.sum()) == before:
            return reached


def _spread(reached: NDArray[np.bool_], free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every run of free pixels in a row that holds a reached one."""
    starts = np.diff(free, axis=1, prepend=False) & free
    runs = np.cumsum(starts.ravel()).reshape(free.shape)
    hit = np.zeros(int(runs[-1, -1]) + 1, np.bool_)
    hit[runs[reached & free]] = True
    return np.asarray(hit[runs] & free)


def _drawn(ellipse: Ellipse, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    x, y = np.meshgrid(np.arange(shape[1]), np.arange(shape[0]))
    return ellipse.holds(x, y)


def polygon(points: list[float], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of a polygon x0 y0 x1 y1 ... in an image of (width, height) `size`, border included."""
    canvas = Image.new("1", size)
    ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
    return np.asarray(canvas)


def as_png(pixels: NDArray[np.uint8]) -> bytes:
    """An 8-bit image, [height, width] or [height, width, 3], as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
