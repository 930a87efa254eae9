"""What the driver says of a GPU, on a driver that is played."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from sonoforge_trainer.metrics import Gpu


class DriverError(Exception):
    """What pynvml raises."""


@dataclass
class Driver:
    """The part of pynvml that waits for critical errors; nothing else of it answers."""

    xids: list[int] = field(default_factory=list)
    NVMLError = DriverError

    def nvmlEventSetWait_v2(self, events: object, milliseconds: int) -> SimpleNamespace:
        if not self.xids:
            raise DriverError("time-out")
        return SimpleNamespace(eventData=self.xids.pop(0))

    def __getattr__(self, name: str):
        def fail(*_: object) -> None:
            raise DriverError(name)

        return fail if name.startswith("nvmlDevice") else 0


@pytest.fixture
def gpu() -> Gpu:
    made = Gpu(torch.device("cpu"))
    made._nvml, made._handle = Driver(), object()
    return made


def test_an_error_of_the_machine_is_its_fault_also_when_a_record_took_it_before(gpu):
    gpu._nvml.xids = [13, 79, 45]
    assert gpu.read() == {"gpu_xid": 45}
    assert gpu.read() == {}
    assert gpu.fault() == "XID 79, fallen off the bus"


def test_an_error_that_came_since_the_last_record_counts(gpu):
    assert gpu.fault() == ""
    gpu._nvml.xids = [95]
    assert gpu.fault() == "XID 95, uncontained ECC error"


def test_an_error_that_a_faulty_kernel_raises_is_nobodys_fault(gpu):
    gpu._nvml.xids = [13, 31, 43, 45]
    assert gpu.fault() == ""


def test_a_processor_has_no_faults():
    assert Gpu(torch.device("cpu")).fault() == ""
