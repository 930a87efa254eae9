"""The network of the nodes: a bridge of this machine, and a namespace with a cable to it for each node.

Nodes are 10.89.0.11, .12, ... and their pods 10.88.1.0/24, 10.88.2.0/24, ...; the machine is 10.89.0.1. Nothing is
routed further than that: a pod that asks for anything outside gets no answer.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOST = "10.89.0.1"
"""Address of this machine on the bridge: API server, DNS and S3 listen there."""
PODS = "10.88.0.0/16"
"""Addresses of all pods."""
_BRIDGE = "sonoforge0"
_NAMESPACES = Path("/var/run/netns")
_STEM = "sonoforge-node-"


@dataclass(frozen=True)
class Outlet:
    """The place of one node in the rack, by its number from 1."""

    number: int

    @property
    def address(self) -> str:
        """Address of the node."""
        return f"10.89.0.{10 + self.number}"

    @property
    def pods(self) -> str:
        """Addresses of its pods."""
        return f"10.88.{self.number}.0/24"

    @property
    def namespace(self) -> Path:
        """Its network namespace, for nsenter. (`ip netns exec` would hide the cgroups from the kubelet.)"""
        return _NAMESPACES / f"{_STEM}{self.number}"

    @property
    def _cable(self) -> str:
        return f"sonoforge{self.number}"

    def pull(self) -> None:
        """Pull the cable: from now on nothing arrives, and nobody is told."""
        _ip("link", "set", self._cable, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self._cable, "up")

    def wire(self, others: list[Outlet]) -> None:
        """Make the namespace and its cable, with a route to the pods of each other node."""
        name = self.namespace.name
        _ip("netns", "add", name)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", self._cable, "master", _BRIDGE, "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        for other in others:
            self.run("ip", "route", "add", other.pods, "via", other.address)
        self.run("sysctl", "--quiet", "--write", "net.ipv4.ip_forward=1")
        _ip("route", "add", self.pods, "via", self.address)

    def run(self, *command: str) -> None:
        """Run a program in the namespace. Raises CalledProcessError with what it said as a note."""
        _run("nsenter", f"--net={self.namespace}", *command)


def wire(count: int) -> list[Outlet]:
    """Make the bridge and the places of `count` nodes."""
    _ip("link", "add", _BRIDGE, "type", "bridge")
    _ip("address", "add", f"{HOST}/24", "dev", _BRIDGE)
    _ip("link", "set", _BRIDGE, "up")
    outlets = [Outlet(number) for number in range(1, count + 1)]
    for outlet in outlets:
        outlet.wire([other for other in outlets if other != outlet])
    return outlets


def unwire() -> None:
    """Remove what `wire` made, also that of a run that was killed."""
    # Deleting is asynchronous: the end of a cable that is here goes first, or it is met again when it is made anew.
    for cable in _cables():
        _ip("link", "delete", cable)
    for namespace in sorted(_NAMESPACES.glob(f"{_STEM}*")):
        _ip("netns", "delete", namespace.name)
    if Path("/sys/class/net", _BRIDGE).exists():
        _ip("link", "delete", _BRIDGE)


def _cables() -> Iterator[str]:
    for device in sorted(Path("/sys/class/net").glob("sonoforge[1-9]*")):
        yield device.name


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        error = subprocess.CalledProcessError(done.returncode, list(command))
        error.add_note(done.stderr)
        raise error
