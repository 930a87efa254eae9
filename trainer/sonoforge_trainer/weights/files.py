"""Named tensors out of a file that somebody else wrote.

A safetensors file can hold nothing but tensors. A `.pth` file is a pickle, which could run code, so it is read only by
torch's restricted unpickler (`weights_only=True`), which builds tensors and plain containers and refuses the rest.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from torch import Tensor

from sonoforge_trainer.checkpoint.tensorfile import TensorFileError, parse
from sonoforge_trainer.weights.errors import WeightsError

PICKLED = (".pth", ".pt", ".bin")
"""Endings of files that torch wrote."""

WRAPPERS = ("teacher", "model_ema", "model", "state_dict")
"""Entries of a training checkpoint that may hold the weights; the first that is there is used."""


def read_tensors(name: str, data: bytes) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU. The ending of `name` says what kind of file it is.

    Raises WeightsError for a file that is damaged, of another kind, or that holds more than tensors and plain values.
    """
    if name.endswith(".safetensors"):
        return _safetensors(name, data)
    if name.endswith(PICKLED):
        return _tensors_of(name, _unpickled(name, data))
    raise WeightsError(f"{name}: this kind of file is not known. Allowed: .safetensors, {', '.join(PICKLED)}")


def _safetensors(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return parse(torch.frombuffer(bytearray(data), dtype=torch.uint8)) if data else {}
    except TensorFileError as error:
        raise WeightsError(f"{name}: not a safetensors file ({error}); download it again") from None


def _unpickled(name: str, data: bytes) -> object:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a hostile or cut file fails in many ways, and its text is not repeated
        raise WeightsError(
            f"{name}: refused by the restricted reader ({type(error).__name__}): it is damaged, or it holds more than "
            "tensors and plain values. Convert it to safetensors where you trust it, and give that file"
        ) from None


def _tensors_of(name: str, content: object) -> dict[str, Tensor]:
    """The weights inside what a training run saved: a mapping of tensors, alone or as one entry among others."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"{name}: found a {type(content).__name__}. Allowed: a mapping of names to tensors")
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    tensors = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(sorted(str(key) for key in content)[:10])
        raise WeightsError(f"{name}: no tensors; its entries are {keys}. Allowed: weights, or {', '.join(WRAPPERS)}")
    return tensors
