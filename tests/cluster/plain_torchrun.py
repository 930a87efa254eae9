"""What the same faults cost `torchrun` as it comes: three pods, its own rendezvous, no operator.

The pods only sum a tensor, again and again, so what is measured is how long the survivors take to do so in a new group.
The rendezvous is c10d with its defaults, its store in the first pod, and the timeout of gloo is torch's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from build import tag_of
from node import GPU
from real_site import NAMESPACE, RealSite

NAME = "plain"
PATIENCE_SECONDS = 180.0
"""After this it is not waited for any longer."""
_SCRIPT = """
import json, os, time, torch, torch.distributed as dist
began = time.time()
dist.init_process_group("gloo")
step, ones = 0, torch.ones(1 << 16)
while True:
    dist.all_reduce(ones)
    step += 1
    print(json.dumps({"began": began, "time": time.time(), "step": step, "world": dist.get_world_size()}), flush=True)
    time.sleep(0.1)
"""


class PlainTorchrun:
    """Three pods with plain torchrun, made anew for each fault."""

    def __init__(self, site: RealSite) -> None:
        self._site = site

    def process_killed(self) -> float | None:
        """Seconds from the SIGKILL of a process that works to the next step; None where there was none in time."""

        def strike(pods: dict[int, Any]) -> str:
            (agent,) = self._node(pods[1]).pids_of(pods[1]["metadata"]["uid"])
            psutil.Process(agent).children()[0].kill()
            return ""

        return self._measure(strike)

    def pod_deleted(self) -> float | None:
        """The same after a pod without the store was deleted."""
        return self._measure(lambda pods: self._delete(pods[1]))

    def store_deleted(self) -> float | None:
        """The same after the pod with the store was deleted."""
        return self._measure(lambda pods: self._delete(pods[0]))

    def cable_pulled(self) -> float | None:
        """The same after the cable of a node without the store was pulled, which is not plugged in."""
        struck = []

        def strike(pods: dict[int, Any]) -> str:
            struck.append(self._node(pods[1]))
            struck[0].pull_cable()
            return str(struck[0].name)

        try:
            return self._measure(strike)
        finally:
            for node in struck:
                node.plug_in()
                self._site.cluster.wait_until_ready([node.name])

    def _measure(self, strike: Callable[[dict[int, Any]], str]) -> float | None:
        self._site.apply(*_manifests())
        try:
            self._site.wait_for(
                lambda: any(r["world"] == 3 and r["step"] > 20 for r in self._records()), "plain torchrun steps", 300
            )
            pods = {int(p["metadata"]["labels"][_INDEX]): p for p in self._pods()}
            began = time.time()
            without = strike(pods)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while time.monotonic() < deadline:
                later = [r["time"] for r in self._records(without) if r["began"] > began]
                if later:
                    return float(min(later) - began)
                time.sleep(0.2)
            return None
        finally:
            self._site.kubectl("delete", "job,service,configmap", NAME, "--wait=false")
            self._site.kubectl("delete", "pods", f"--selector={_APP}", "--force", "--grace-period=0", "--wait=false")

    def _records(self, without: str = "") -> Iterator[dict[str, Any]]:
        for node in self._site.cluster.nodes:
            if node.name == without:
                continue
            for file in node.folder.glob(f"pods/{NAMESPACE}_{NAME}-*/main/*.log"):
                for line in file.read_text(errors="replace").splitlines():
                    text = line.split(" ", 3)[-1]
                    if text.startswith('{"began"') and text.endswith("}"):
                        yield json.loads(text)

    def _pods(self) -> list[Any]:
        return self._site.cluster.pods(NAMESPACE, _APP)

    def _node(self, pod: Any) -> Any:
        return self._site.cluster.node(pod["spec"]["nodeName"])

    def _delete(self, pod: Any) -> str:
        self._site.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
        return ""


_APP = f"app={NAME}"
_INDEX = "batch.kubernetes.io/job-completion-index"


def _manifests() -> list[dict[str, Any]]:
    labels = {"app": NAME}
    command = [
        *("python3", "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1", "--max-restarts=100"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={NAME}-0.{NAME}:29400", f"--rdzv-id={NAME}"),
        "/scripts/steps.py",
    ]
    container = {
        "name": "main",
        "image": tag_of("trainer"),
        "command": command,
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        "resources": {"limits": {GPU: 1}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "scripts", "mountPath": "/scripts"}],
    }
    pod = {
        "restartPolicy": "Never",
        "subdomain": NAME,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "scripts", "configMap": {"name": NAME}}],
    }
    job = {"completions": 3, "parallelism": 3, "completionMode": "Indexed", "backoffLimit": 100}
    template = {"metadata": {"labels": labels}, "spec": pod}
    ports = [{"name": "store", "port": 29400}]
    service = {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True, "ports": ports}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NAME}, "data": {"steps.py": _SCRIPT}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME}, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": NAME}, "spec": {**job, "template": template}},
    ]
