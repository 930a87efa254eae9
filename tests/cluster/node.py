"""A real node: a network namespace with containerd, kubelet and kube-proxy in it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import yaml
from components import Component
from containerd import Containerd
from control_plane import ControlPlane
from image_store import ImageStore
from leftovers import end_pods, note_process
from packages import SEARCH_PATH
from rack import HOST, PODS, Outlet

# The disk of a node's pods is its own, and small enough to be filled.
_DISK_BYTES = 1 << 30
# A cluster's usual 10 s and 40 s make a test of a lost node take a minute.
_LEASE_SECONDS = 20
GPU = "nvidia.com/gpu"
"""The resource that stands for a GPU."""


class Node:
    """A node whose cable can be pulled and whose power can be cut."""

    def __init__(self, plane: ControlPlane, outlet: Outlet, folder: Path) -> None:
        self.name = f"node-{outlet.number}"
        self.outlet = outlet
        self.folder = folder / self.name
        self._run_folder = folder
        self._plane = plane
        self.containerd = Containerd(self.folder, self.folder / "root", outlet.namespace)
        self._kubelet = self._program("kubelet", self._kubelet_arguments())
        self._proxy = self._program("kube-proxy", self._proxy_arguments())

    def prepare(self) -> None:
        """Write what its programs read."""
        disk = self.folder / "kubelet"
        disk.mkdir(parents=True)
        _run("mount", "--types=tmpfs", f"--options=size={_DISK_BYTES}", "tmpfs", str(disk))
        self._write_configuration()

    def start(self, store: ImageStore) -> None:
        """Start its programs with the images of the store. It is ready when the API server says so."""
        store.link_to(self.folder / "root")
        self.switch_on()

    def switch_on(self) -> None:
        """Start its programs, also after its power was cut."""
        self.containerd.start()
        self._kubelet.start()
        self._proxy.start()
        for component in self._components:
            note_process(self._run_folder, component.pid)
        self.outlet.plug()

    def pull_cable(self) -> None:
        """Cut it off from everything. It goes on running."""
        self.outlet.pull()

    def plug_in(self) -> None:
        """Put the cable back."""
        self.outlet.plug()

    def cut_power(self) -> None:
        """End everything in it at once. Its connections are not closed: the cable goes dead before the processes."""
        self.outlet.pull()
        for component in self._components:
            component.kill()
        end_pods(self.folder)

    def fill_disk(self) -> Callable[[], None]:
        """Leave no byte on the disk of its pods. Returns what makes room again."""
        file = self.folder / "kubelet" / "full"
        with file.open("wb", buffering=0) as full, suppress(OSError):
            while True:
                full.write(bytes(1 << 20))
        return partial(file.unlink, missing_ok=True)

    def pids_of(self, pod_uid: str) -> list[int]:
        """Processes of a pod's containers, seen from this machine, without the one that holds its namespaces."""
        listed = self.containerd.ctr("containers", "list", f'labels."io.kubernetes.pod.uid"=={pod_uid}', "--quiet")
        kinds = {each: json.loads(self.containerd.ctr("containers", "info", each))["Labels"] for each in listed.split()}
        ours = {each for each, labels in kinds.items() if labels["io.cri-containerd.kind"] == "container"}
        tasks = [line.split() for line in self.containerd.ctr("tasks", "list").splitlines()[1:]]
        return [int(pid) for each, pid, state in tasks if each in ours and state == "RUNNING"]

    def log_end(self) -> str:
        """The last lines of its programs, for a message."""
        return "\n".join(f"{c.log.name}: {c.log_end()}" for c in self._components)

    @property
    def _components(self) -> list[Component]:
        return [self._proxy, self._kubelet, self.containerd.component]

    def _program(self, name: str, arguments: list[str]) -> Component:
        program = [str(self._plane.programs / name), *arguments]
        command = [f"PATH={SEARCH_PATH}", "nsenter", f"--net={self.outlet.namespace}", *program]
        return Component(Path("/usr/bin/env"), command, self.folder / f"{name}.log")

    def _kubelet_arguments(self) -> list[str]:
        return [
            f"--config={self.folder / 'kubelet.yaml'}",
            f"--kubeconfig={self.folder / 'kubelet.kubeconfig'}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.outlet.address}",
            f"--root-dir={self.folder / 'kubelet'}",
            f"--cert-dir={self.folder / 'certificates'}",
        ]

    def _proxy_arguments(self) -> list[str]:
        return [
            f"--kubeconfig={self.folder / 'kube-proxy.kubeconfig'}",
            f"--hostname-override={self.name}",
            "--proxy-mode=iptables",
            f"--cluster-cidr={PODS}",
            # Limits of connection tracking belong to the machine and not to a namespace.
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0s",
            "--conntrack-tcp-timeout-close-wait=0s",
            f"--healthz-bind-address={self.outlet.address}:10256",
        ]

    def _write_configuration(self) -> None:
        plane = self._plane
        kubeconfigs = {
            "kubelet": plane.kubeconfig_of(f"system:node:{self.name}", "system:nodes"),
            "kube-proxy": plane.kubeconfig_of("system:kube-proxy"),
        }
        for name, kubeconfig in kubeconfigs.items():
            (self.folder / f"{name}.kubeconfig").write_text(kubeconfig.read_text())
        network = {
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [
                {
                    # Every packet between pods is routed, so that a Service is also reached on its own node.
                    "type": "ptp",
                    "ipam": {
                        "type": "host-local",
                        "dataDir": str(self.folder / "addresses"),
                        "ranges": [[{"subnet": self.outlet.pods}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }
            ],
        }
        (self.folder / "cni").mkdir()
        (self.folder / "cni" / "pods.conflist").write_text(json.dumps(network))
        (self.folder / "kubelet.yaml").write_text(yaml.safe_dump(self._kubelet_configuration()))

    def _kubelet_configuration(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.outlet.address,
            "containerRuntimeEndpoint": f"unix://{self.containerd.socket}",
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": str(self._plane.directory / "ca.crt")},
            },
            "clusterDNS": [HOST],
            "clusterDomain": "cluster.local",
            "resolvConf": "",
            "podLogsDir": str(self.folder / "pods"),
            "volumePluginDir": str(self.folder / "volume-plugins"),
            "nodeStatusUpdateFrequency": "3s",
            "nodeLeaseDurationSeconds": _LEASE_SECONDS,
            "syncFrequency": "10s",
            # The nodes share this machine's processors, memory and disk, and none may be frightened by the others.
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "failCgroupV1": False,
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "5%", "imagefs.available": "0%"},
            "evictionPressureTransitionPeriod": "10s",
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        error = subprocess.CalledProcessError(done.returncode, list(command))
        error.add_note(done.stderr)
        raise error


def add_gpus(plane: ControlPlane, node: str, count: int) -> None:
    """Make scheduler and kubelet believe in GPUs of a node. Nothing can be computed on them."""
    patch = {"status": {"capacity": {GPU: str(count)}}}
    try:
        plane.kubectl("patch", "node", node, "--subresource=status", f"--patch={json.dumps(patch)}")
    except subprocess.CalledProcessError as error:
        error.add_note(f"node {node} has to be there before it gets GPUs")
        raise
