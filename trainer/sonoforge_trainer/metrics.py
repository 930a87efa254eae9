"""What a run reports while it trains: one JSON record an interval, on stdout, in the checkpoint and for TensorBoard.

Values arrive as device tensors and are read once an interval, so that the step never waits for the host.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from sonoforge_trainer.contract import canonical_json

log = structlog.get_logger(__name__)

# Dense bf16 peak of the data-centre GPUs that DINOv2 is trained on, in FLOPs/s (vendor data sheets).
_PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "A40": 150e12}


class StepClock:
    """Times of steps: median, throughput and the part spent waiting for data, over the last interval."""

    def __init__(self, keep: int = 100) -> None:
        self._seconds: deque[float] = deque(maxlen=keep)
        self._waits: deque[float] = deque(maxlen=keep)
        self._began = 0.0
        self._waited = 0.0

    def begin(self) -> None:
        """A step begins: from here until `ready` it waits for data."""
        self._began = time.monotonic()

    def ready(self) -> None:
        """The step's data is there."""
        self._waited = time.monotonic() - self._began

    def end(self) -> None:
        """The step ended."""
        self._seconds.append(time.monotonic() - self._began)
        self._waits.append(self._waited)

    @property
    def median_seconds(self) -> float:
        """Median step time; 0 before the first step."""
        return statistics.median(self._seconds) if self._seconds else 0.0

    def samples_per_second(self, global_batch: int) -> float:
        """Throughput of the whole run."""
        total = sum(self._seconds)
        return global_batch * len(self._seconds) / total if total else 0.0

    @property
    def data_wait(self) -> float:
        """Part of the time spent waiting for data, 0..1."""
        total = sum(self._seconds)
        return sum(self._waits) / total if total else 0.0


class Mean:
    """Running means of named device tensors, read once an interval. All names of an interval come with each step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's values, scalars on any device. Does not wait for them."""
        self._count += 1
        for name, value in values.items():
            value = value.detach().float()
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.clone()

    def take(self) -> dict[str, float]:
        """The means since the last call; waits for the device. Empty where nothing was added."""
        if not self._count:
            return {}
        stacked = torch.stack(list(self._sums.values())).div_(self._count).cpu().tolist()
        names = list(self._sums)
        self._sums, self._count = {}, 0
        return dict(zip(names, stacked, strict=True))


class Records:
    """The metric records since the last checkpoint; they are committed with it.

    A log that is durable exactly as far as the weights are never shows a step that was lost.
    """

    def __init__(self, tensorboard: Path | None = None) -> None:
        self._lines: list[str] = []
        self._writer: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard))

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep a record, print it and pass its numbers to TensorBoard."""
        self._lines.append(canonical_json(record))
        log.info("metrics", **record)
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, record["step"])

    def take(self) -> bytes:
        """The records since the last call, as JSON lines."""
        text = "".join(line + "\n" for line in self._lines)
        self._lines = []
        if self._writer is not None:
            self._writer.flush()
        return text.encode()


class Gpu:
    """NVML readings of this process's GPU; empty where there is none or the driver does not answer."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self._nvml: Any = None
        self._xid_events: Any = None
        if device.type != "cuda":
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml
            self._xid_events = pynvml.nvmlEventSetCreate()
            pynvml.nvmlDeviceRegisterEvents(self._handle, pynvml.nvmlEventTypeXidCriticalError, self._xid_events)
        except pynvml.NVMLError as error:
            log.warning("nvml.unavailable", error=str(error))
            self._handle = None

    def read(self) -> dict[str, float]:
        """Utilisation in %, memory in bytes, temperature in C, uncorrected ECC errors, throttle bits, last XID."""
        if self._handle is None:
            return {}
        nvml, handle = self._nvml, self._handle
        found: dict[str, float] = {}
        with contextlib.suppress(nvml.NVMLError):
            found["gpu_utilisation"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            found["gpu_memory_bytes"] = nvml.nvmlDeviceGetMemoryInfo(handle).used
            found["gpu_temperature_c"] = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        with contextlib.suppress(nvml.NVMLError):
            found["gpu_throttle_bits"] = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        with contextlib.suppress(nvml.NVMLError):
            found["gpu_ecc_uncorrected"] = nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        with contextlib.suppress(nvml.NVMLError):  # A time-out means that there was none.
            found["gpu_xid"] = nvml.nvmlEventSetWait_v2(self._xid_events, 0).eventData
        return found


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU in FLOPs/s; None elsewhere, where MFU is not reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in _PEAK_FLOPS.items() if word in name), None)
