"""NIfTI-1 (.nii, .nii.gz): a header of 348 bytes, then raw values, first dimension fastest."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.shards.faults import ImageError

_HEADER = 348
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}
_LIMIT = 2 * 2**30


@dataclass(frozen=True)
class Nifti:
    """A volume or picture."""

    values: NDArray[np.generic]
    """Slowest dimension first: (height, width) or (frames, height, width). Dimensions of length 1 at the end of the
    header's list are left out. The first dimension of the file, which is the fastest, is the width; libraries that put
    it first show the picture lying on its side."""
    spacing: tuple[float, ...]
    """Of each dimension of `values`, in the header's unit."""


def read_nifti(path: Path) -> Nifti:
    """Read a file. Raises ImageError."""
    try:
        raw = path.read_bytes()
        data = _gunzip(raw) if raw[:2] == b"\x1f\x8b" else raw
    except OSError as error:
        raise ImageError(f"the file cannot be read ({error.strerror or 'broken gzip'})") from None
    except (EOFError, zlib.error):
        raise ImageError("truncated or broken gzip data") from None
    return _parse(data)


def _gunzip(raw: bytes) -> bytes:
    # The trailer's size is what a well-made file has; reading stops there, so that a small file cannot fill the memory.
    size = struct.unpack("<I", raw[-4:])[0]
    if size > _LIMIT:
        raise ImageError(f"NIfTI of more than {_LIMIT} bytes")
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        data = file.read(size + 1)
    if len(data) > size:
        raise ImageError("gzip data of more than one part, or with a wrong length")
    return data


def _parse(data: bytes) -> Nifti:
    if len(data) < _HEADER or data[344:347] != b"n+1":
        raise ImageError("not a NIfTI-1 file of one part")
    order = "<" if struct.unpack("<i", data[:4])[0] == _HEADER else ">"
    if struct.unpack(f"{order}i", data[:4])[0] != _HEADER:
        raise ImageError("not a NIfTI-1 header")
    dims = struct.unpack(f"{order}8h", data[40:56])
    kind = struct.unpack(f"{order}h", data[70:72])[0]
    pixdim = struct.unpack(f"{order}8f", data[76:108])
    offset, slope, intercept = struct.unpack(f"{order}3f", data[108:120])
    if not 1 <= dims[0] <= 7 or any(d < 1 for d in dims[1 : dims[0] + 1]):
        raise ImageError("NIfTI with an empty dimension")
    if kind not in _TYPES:
        raise ImageError("NIfTI values of a kind that is not supported; allowed: whole numbers up to 32 bits, floats")
    shape = list(dims[1 : dims[0] + 1])
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    if len(shape) not in (2, 3):
        raise ImageError(f"NIfTI of {len(shape)} dimensions; allowed: a picture, or pictures one after another")
    if not (math.isfinite(offset) and offset >= _HEADER):
        raise ImageError("NIfTI with a wrong start of its values")
    dtype = np.dtype(order + _TYPES[kind])
    count = math.prod(shape)
    if count * dtype.itemsize > len(data) - int(offset):
        raise ImageError("truncated NIfTI: fewer values than its header says")
    values: NDArray[np.generic] = np.frombuffer(data, dtype, count, int(offset)).reshape(shape[::-1])
    if slope not in (0.0, 1.0) or (slope and intercept):
        if not (math.isfinite(slope) and math.isfinite(intercept)):
            raise ImageError("NIfTI with a scale that is no number")
        values = values * slope + intercept
    return Nifti(values, tuple(float(p) for p in pixdim[1 : len(shape) + 1])[::-1])
