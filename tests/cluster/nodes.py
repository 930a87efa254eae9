"""A cluster with real nodes, as a context manager: control plane, DNS, and nodes that run containers.

One at a time on a machine, because addresses are fixed. Its folder is below the cache and not below a test's own:
images are given to the nodes by hard link, and what a killed run left there is ended by the next one.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rack
from components import Component, wait_for
from control_plane import API_SERVER, ControlPlane
from image_store import ImageStore
from leftovers import clear, note_process
from node import Node
from rack import HOST


class RealCluster:
    """Control plane, DNS and nodes."""

    def __init__(self, programs: Path, coredns: Path, store: ImageStore, *, count: int = 3) -> None:
        """Make a cluster that is not started yet.

        Args:
            programs: Folder of the control plane's and the nodes' programs.
            coredns: The program that answers names.
            store: Images of the nodes.
            count: How many nodes.
        """
        self.folder = store.folder.parent / "nodes"
        # Nodes have names that nobody looks up.
        by_address = {API_SERVER: ["--kubelet-preferred-address-types=InternalIP"]}
        self.control_plane = ControlPlane(programs, self.folder / "control-plane", address=HOST, arguments=by_address)
        self.nodes: list[Node] = []
        self._count = count
        self._store = store
        self._dns = Component(coredns, ["-conf=Corefile"], self.folder / "control-plane" / "coredns.log")
        self._lock: int | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all and wait until every node is ready. Raises TimeoutError with what the nodes said."""
        self._acquire()
        try:
            clear(self.folder)
            self.folder.mkdir(parents=True)
            outlets = rack.wire(self._count)
            self.control_plane.start()
            self._start_dns()
            for component in (*self.control_plane.components.values(), self._dns):
                note_process(self.folder, component.pid)
            self.nodes = [Node(self.control_plane, outlet, self.folder) for outlet in outlets]
            for node in self.nodes:  # certificates are made one after the other
                node.prepare()
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda node: node.start(self._store), self.nodes))
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all, and leave nothing behind."""
        for node in self.nodes:
            node.cut_power()
        self._dns.kill()
        self.control_plane.stop()
        clear(self.folder)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def node(self, name: str) -> Node:
        """A node by its name."""
        return next(node for node in self.nodes if node.name == name)

    def ready(self) -> set[str]:
        """Names of the nodes that are ready."""
        return {
            node["metadata"]["name"]
            for node in self.control_plane.get("nodes")["items"]
            if any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", []))
        }

    def wait_until_ready(self, names: Sequence[str] = (), seconds: float = 60.0) -> None:
        """Wait until the named nodes, or all, are ready. Raises TimeoutError with what they said."""
        wanted = set(names) or {node.name for node in self.nodes}
        try:
            wait_for(lambda: wanted <= self.ready(), f"{', '.join(sorted(wanted))} ready", seconds)
        except TimeoutError as error:
            said = "\n".join(node.log_end() for node in self.nodes if node.name in wanted)
            raise TimeoutError(f"{error}\n{said}") from None

    def pods(self, namespace: str, selector: str = "") -> list[Any]:
        """The pods of a namespace."""
        found: list[Any] = self.control_plane.get("pods", f"--namespace={namespace}", f"--selector={selector}")["items"]
        return found

    def _start_dns(self) -> None:
        kubeconfig = self.control_plane.kubeconfig_of("coredns", "system:masters")
        (self.control_plane.directory / "Corefile").write_text(
            f""".:53 {{
    bind {HOST}
    errors
    ready {HOST}:8181
    cache 5
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {kubeconfig} test
        pods insecure
        ttl 5
    }}
}}
"""
        )
        self._dns.start()

    def _acquire(self) -> None:
        """Wait for another run on this machine to end."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another run with nodes on this machine", file=sys.stderr, flush=True)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
