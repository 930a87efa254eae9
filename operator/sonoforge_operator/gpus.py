"""Which GPUs the nodes of a local run use, so that two nodes of one machine never share one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sonoforge_operator.api import Workers

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVER = Path("/proc/driver/nvidia/gpus")


def gpus_of_node(
    index: int, workers: Workers, *, environ: Mapping[str, str] = os.environ, driver: Path = _DRIVER
) -> dict[str, str]:
    """The environment that gives node `index` its own GPUs; empty where the machine has not enough for every node.

    They are taken from CUDA_VISIBLE_DEVICES, or else from all GPUs of the machine.
    """
    if _VISIBLE in environ:
        devices = [device.strip() for device in environ[_VISIBLE].split(",") if device.strip()]
    else:
        devices = [str(number) for number in range(len(list(driver.iterdir())))] if driver.is_dir() else []
    each = workers.gpus_per_node
    if len(devices) < workers.max_nodes * each:
        return {}
    return {_VISIBLE: ",".join(devices[index * each : (index + 1) * each])}
