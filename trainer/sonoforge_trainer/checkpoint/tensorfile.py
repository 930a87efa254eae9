"""The safetensors format, laid out in place: a checkpoint part is one buffer that is also the file.

A file is 8 bytes of header length (little endian), a JSON header, then the tensors without holes
(https://github.com/huggingface/safetensors#format). Tensors are copied from the device straight to their place in the
buffer, and views into a buffer that was read are the loaded tensors, so neither way makes a second copy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFileError(ValueError):
    """The bytes are not a well-formed safetensors file."""


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    """Type of an element."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    start: int
    """First byte, counted from the start of the file."""
    end: int
    """Byte after the last one."""

    def view(self, buffer_u8: Tensor) -> Tensor:
        """The tensor as a view into the file's buffer; a copy only where another writer left it unaligned."""
        flat = buffer_u8[self.start : self.end]
        if (flat.data_ptr() % self.dtype.itemsize) != 0:
            flat = flat.clone()
        return flat.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """A file before its tensors are known: the header, and where each tensor goes."""

    header: bytes
    """Length field and JSON, padded to 8 bytes."""
    places: Mapping[str, Place]
    """By tensor name."""
    size: int
    """Bytes of the whole file."""


def layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Plan the file that holds these tensors: widest type first, so every tensor is aligned, then by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(f"tensor {name!r} has type {tensor.dtype}, which a checkpoint cannot hold")
        offsets[name] = (position, position + tensor.numel() * tensor.dtype.itemsize)
        position = offsets[name][1]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": list(offsets[name]),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    places = {
        name: Place(tensors[name].dtype, tuple(tensors[name].shape), begin + start, begin + end)
        for name, (start, end) in offsets.items()
    }
    return Layout(len(text).to_bytes(8, "little") + text, places, begin + position)


def parse(buffer_u8: Tensor) -> dict[str, Tensor]:
    """The tensors of a file as views into its buffer, a CPU uint8 tensor. Raises TensorFileError."""
    size = buffer_u8.numel()
    if size < 8:
        raise TensorFileError(f"{size} bytes are too few for a header")
    begin = 8 + int.from_bytes(bytes(buffer_u8[:8].tolist()), "little")
    if begin > size:
        raise TensorFileError("the header is longer than the file")
    try:
        header = json.loads(buffer_u8.numpy().data[8:begin].tobytes())
        places = {name: _place(entry, begin) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"the header is malformed ({type(error).__name__})") from None
    position = begin
    for place in sorted(places.values(), key=lambda place: (place.start, place.end)):
        if place.start != position or place.end - place.start != math.prod(place.shape) * place.dtype.itemsize:
            raise TensorFileError("the tensors overlap, leave holes or do not have the size of their shape")
        position = place.end
    if position != size:
        raise TensorFileError(f"the tensors end at byte {position} of {size}")
    return {name: place.view(buffer_u8) for name, place in places.items()}


def _place(entry: dict[str, Any], begin: int) -> Place:
    start, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(side) for side in entry["shape"])
    if any(side < 0 for side in shape):
        raise ValueError("negative side")
    return Place(DTYPES[entry["dtype"]], shape, begin + start, begin + end)


def deal(sizes: Mapping[str, int], world_size: int, first_load: int = 0) -> tuple[tuple[str, ...], ...]:
    """Deal tensors to ranks by bytes: largest first, each to the least loaded rank. The same on every rank.

    `sizes` is bytes by name; `first_load` is what rank 0 has to write besides. Returns the names for each rank.
    """
    loads = [first_load] + [0] * (world_size - 1)
    hands: Sequence[list[str]] = [[] for _ in range(world_size)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(world_size), key=lambda rank: (loads[rank], rank))
        loads[rank] += sizes[name]
        hands[rank].append(name)
    return tuple(tuple(hand) for hand in hands)
