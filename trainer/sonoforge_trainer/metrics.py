"""What a run reports while it trains: one record an interval, in the log, in the checkpoint and for TensorBoard."""

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

from sonoforge_trainer.contract import canonical_json

log = structlog.get_logger(__name__)

# Dense bf16 peak of the data-centre GPUs that DINOv2 is trained on, in FLOPs/s (vendor data sheets).
_PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "A40": 150e12}
# Critical XIDs that NVIDIA's catalogue (docs.nvidia.com/deploy/xid-errors) blames on the machine. Those that a faulty
# kernel raises as well, such as 13, 31, 43 and 45, are not among them.
_HARDWARE_XIDS = {
    48: "double-bit ECC error",
    62: "its micro-controller halted",
    64: "row remapping failed",
    74: "NVLink error",
    79: "fallen off the bus",
    80: "corrupted data arrived over the bus",
    94: "contained ECC error",
    95: "uncontained ECC error",
    110: "security fault",
    119: "no answer of its processor",
    120: "error of its processor",
    121: "link error to the CPU",
    140: "unrecovered ECC error",
    143: "initialisation failed",
}
_MOST_XIDS = 1000


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


class Means:
    """Running means of named numbers over an interval."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, values: Mapping[str, float]) -> None:
        """Add one step's values."""
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """The means since the last call; empty where nothing was added."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


class CommittedLog:
    """Lines by step that become durable with the checkpoint that holds their step.

    A log that is durable exactly as far as the weights never shows a step that was lost.
    """

    def __init__(self) -> None:
        self._lines: list[tuple[int, str]] = []

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """Keep a record of the step that ends with `step` steps done."""
        self._lines.append((step, canonical_json(record)))

    def text(self, step: int) -> bytes:
        """The lines up to and with `step`, for the checkpoint of that step."""
        return "".join(line + "\n" for at, line in self._lines if at <= step).encode()

    def forget(self, step: int) -> None:
        """The checkpoint of `step` is committed: its lines are safe there."""
        self._lines = [(at, line) for at, line in self._lines if at > step]


class TensorBoard:
    """TensorBoard event files in a folder; does nothing without one."""

    def __init__(self, folder: Path | None, *, first_step: int = 0) -> None:
        """Write records from `first_step` on; what an earlier process group wrote of these steps is taken back."""
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """Write the numbers of a record."""
        if self._writer is None:
            return
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


class Gpu:
    """NVML readings of this process's GPU; empty where there is none or the driver does not answer."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self._nvml: Any = None
        self._xid_events: Any = None
        self._faults: list[str] = []
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
        xids = self._new_xids()
        if xids:
            found["gpu_xid"] = xids[-1]
        return found

    def fault(self) -> str:
        """The first critical error of this process's GPU that is its machine's fault; empty where there was none."""
        if self._handle is not None:
            self._new_xids()
        return self._faults[0] if self._faults else ""

    def _new_xids(self) -> list[int]:
        """Critical errors since the last call."""
        xids: list[int] = []
        with contextlib.suppress(self._nvml.NVMLError):  # A time-out means that there are no more.
            while len(xids) < _MOST_XIDS:
                xids.append(int(self._nvml.nvmlEventSetWait_v2(self._xid_events, 0).eventData))
        self._faults += [f"XID {xid}, {_HARDWARE_XIDS[xid]}" for xid in xids if xid in _HARDWARE_XIDS]
        return xids


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU in FLOPs/s; None elsewhere, where MFU is not reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in _PEAK_FLOPS.items() if word in name), None)
