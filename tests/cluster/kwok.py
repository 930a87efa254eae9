"""Nodes that are only played, by kwok against the real API server: for whole lives of jobs, and for many pods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from components import Component, free_ports, wait_for
from control_plane import LOOPBACK, ControlPlane

PLAYED = {"cluster.sonoforge.dev/played-by": "kwok"}
"""Annotation of the nodes that kwok plays; others are left alone."""
CAPACITY = {"cpu": "64", "memory": "512Gi", "pods": "250", "nvidia.com/gpu": "4"}
"""What a played node has, where a test does not say."""
STAGES = Path(__file__).parent / "stages.yaml"


class Kwok:
    """kwok as a context manager, and the nodes that were made for it to play."""

    def __init__(self, program: Path, control_plane: ControlPlane, *, stages: Path = STAGES) -> None:
        """Make a kwok that is not started yet. `stages` says how it plays pods; nodes become ready and stay so."""
        self._control_plane = control_plane
        (port,) = free_ports(1)
        selector = ",".join(f"{name}={value}" for name, value in PLAYED.items())
        arguments = [
            f"--kubeconfig={control_plane.directory / 'kwok.kubeconfig'}",
            f"--config={stages.resolve()}",
            f"--manage-nodes-with-annotation-selector={selector}",
            "--node-lease-duration-seconds=40",
            f"--server-address={LOOPBACK}:{port}",
        ]
        self.component = Component(program, arguments, control_plane.directory / "kwok.log")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.component.kill()

    def start(self) -> None:
        """Start it; nodes that exist are played from now on."""
        self._control_plane.kubeconfig_of("kwok", "system:masters").rename(
            self._control_plane.directory / "kwok.kubeconfig"
        )
        self.component.start()

    def add_nodes(
        self,
        count: int,
        *,
        prefix: str = "node",
        capacity: Mapping[str, str] = CAPACITY,
        labels: Mapping[str, str] | None = None,
        taints: list[dict[str, str]] | None = None,
        seconds: float = 60.0,
    ) -> list[str]:
        """Make nodes PREFIX-0, PREFIX-1, ... and wait until all are ready. Their names."""
        names = [f"{prefix}-{number}" for number in range(count)]
        nodes = [_node(name, capacity, labels or {}, taints or []) for name in names]
        self._control_plane.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all(nodes))
        wait_for(lambda: set(names) <= self._ready_nodes(), f"{count} nodes ready", seconds)
        return names

    def _ready_nodes(self) -> set[str]:
        assert self.component.running, f"kwok ended: {self.component.log_end()}"
        return {
            node["metadata"]["name"]
            for node in self._control_plane.get("nodes")["items"]
            if {"Ready"} & {each["type"] for each in node["status"].get("conditions", []) if each["status"] == "True"}
        }


def _node(name: str, capacity: Mapping[str, str], labels: Mapping[str, str], taints: list[dict[str, str]]) -> Any:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": PLAYED,
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                **labels,
            },
        },
        "spec": {"taints": taints},
        "status": {"capacity": dict(capacity), "allocatable": dict(capacity)},
    }
