"""Copying the training state to host memory: the only part of a checkpoint that holds up training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sonoforge_trainer.checkpoint.tensorfile import layout


class HostBuffer:
    """Host memory that holds one tensor file, re-used from one checkpoint to the next.

    Page-locked where the tensors are on a GPU, so that the copies run on a stream of their own at full bus speed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory_u8 = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call] # torch's own

    def begin(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Start to copy `tensors` into the file that they make; returns the file, uint8 [bytes].

        On a GPU the copies are ordered after the work queued so far, and `finish` waits for them. The file stays valid
        until the next call.
        """
        plan = layout(tensors)
        if self._memory_u8.numel() < plan.size:
            self._memory_u8 = torch.empty(plan.size, dtype=torch.uint8, pin_memory=self._stream is not None)
        file_u8 = self._memory_u8[: plan.size]
        file_u8[: len(plan.header)] = torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)
        with torch.no_grad():
            if self._stream is None:
                _copy(tensors, {name: place.view(file_u8) for name, place in plan.places.items()})
            else:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(self._stream):
                    _copy(tensors, {name: place.view(file_u8) for name, place in plan.places.items()})
        return file_u8

    def finish(self) -> None:
        """Wait until the copies have ended: from here on the training state may change."""
        if self._stream is not None:
            self._stream.synchronize()


def _copy(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    for name, place in places.items():
        place.copy_(tensors[name].detach(), non_blocking=True)
