"""MetaImage (.mha): a text header, then raw or zlib-compressed values. One-file images only.

Written from the description of the format (ITK's MetaIO documentation): `Key = Value` lines up to
`ElementDataFile = LOCAL`, values in the order of DimSize, first dimension fastest.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.shards.faults import ImageError

_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_HEADER_LIMIT = 64 * 2**10
_LIMIT = 2 * 2**30
_CHUNK = 2**20


@dataclass(frozen=True)
class MetaHeader:
    """What the header says."""

    shape: tuple[int, ...]
    """Slowest dimension first, as numpy has it: (frames, height, width), with channels last where there are several."""
    spacing: tuple[float, ...]
    """Millimetres between values, in the order of `shape` without channels."""
    dtype: np.dtype[np.generic]
    """Of the values, with byte order."""
    compressed: bool
    """Whether the values are one zlib stream."""
    offset: int
    """First byte of the values."""

    @property
    def frame_bytes(self) -> int:
        """Bytes of one step of the slowest dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(path: Path) -> MetaHeader:
    """The header of a file. Raises ImageError."""
    try:
        with path.open("rb") as file:
            return _header(file)
    except OSError as error:
        raise ImageError(f"the file cannot be read ({error.strerror})") from None


def read_array(path: Path) -> NDArray[np.generic]:
    """All values. Raises ImageError."""
    return np.stack(list(frames(path)))


def frames(path: Path) -> Iterator[NDArray[np.generic]]:
    """Steps of the slowest dimension, one in memory at a time. Raises ImageError, also where bytes are missing."""
    try:
        with path.open("rb") as file:
            header = _header(file)
            file.seek(header.offset)
            values = _inflated(file) if header.compressed else iter(lambda: file.read(_CHUNK), b"")
            yield from _cut(values, header)
    except OSError as error:
        raise ImageError(f"the file cannot be read ({error.strerror})") from None


def _header(file: IO[bytes]) -> MetaHeader:
    keys: dict[str, str] = {}
    while file.tell() < _HEADER_LIMIT:
        line = file.readline(_HEADER_LIMIT)
        name, equals, value = line.decode("latin-1").partition("=")
        if not equals:
            break
        keys[name.strip()] = value.strip()
        if name.strip() == "ElementDataFile":
            return _described(keys, file.tell())
    raise ImageError("not a MetaImage file: its header does not end with ElementDataFile")


def _described(keys: dict[str, str], offset: int) -> MetaHeader:
    if keys["ElementDataFile"] != "LOCAL":
        raise ImageError("MetaImage with values in another file is not supported; write it as one .mha file")
    if keys.get("BinaryData", "True") != "True":
        raise ImageError("MetaImage with values as text is not supported")
    kind = keys.get("ElementType", "")
    if kind not in _TYPES:
        raise ImageError(f"MetaImage values of an unknown kind; allowed: {', '.join(_TYPES)}")
    try:
        size = [int(part) for part in keys["DimSize"].split()]
        spacing = [float(part) for part in keys.get("ElementSpacing", " ".join("1" for _ in size)).split()]
        channels = int(keys.get("ElementNumberOfChannels", "1"))
    except (KeyError, ValueError):
        raise ImageError("MetaImage header without a readable DimSize or ElementSpacing") from None
    if len(size) not in (2, 3) or min(size) < 1 or channels < 1 or len(spacing) != len(size):
        raise ImageError("MetaImage of other than two or three dimensions, or with an empty one")
    big = "True" in (keys.get("BinaryDataByteOrderMSB"), keys.get("ElementByteOrderMSB"))
    header = MetaHeader(
        (*reversed(size), *([channels] if channels > 1 else [])),
        tuple(reversed(spacing)),
        np.dtype((">" if big else "<") + _TYPES[kind]),
        keys.get("CompressedData", "False") == "True",
        offset,
    )
    if header.shape[0] * header.frame_bytes > _LIMIT:
        raise ImageError(f"MetaImage of more than {_LIMIT} bytes")
    return header


def _inflated(file: IO[bytes]) -> Iterator[bytes]:
    """Pieces of bounded size, so that a small file cannot fill the memory."""
    inflate = zlib.decompressobj()
    try:
        while data := file.read(_CHUNK):
            while data:
                yield inflate.decompress(data, _CHUNK)
                data = inflate.unconsumed_tail
        yield inflate.flush()
    except zlib.error:
        raise ImageError("truncated or broken MetaImage (zlib)") from None


def _cut(values: Iterator[bytes], header: MetaHeader) -> Iterator[NDArray[np.generic]]:
    rest = bytearray()
    left = header.shape[0]
    for piece in values:
        rest += piece
        while left and len(rest) >= header.frame_bytes:
            yield np.frombuffer(bytes(rest[: header.frame_bytes]), header.dtype).reshape(header.shape[1:])
            del rest[: header.frame_bytes]
            left -= 1
        if not left:
            return
    if left:
        raise ImageError("truncated MetaImage: fewer values than its header says")
