"""Plays the kubelet of a pod by hand: says in the pod's status that its containers run, wait or ended.

For tests that decide when and how a pod ends. Where that is known when the pod is made, kwok's stages do it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from components import wait_for
from kubernetes import client


class PodPlayer:
    """The pods of one namespace."""

    def __init__(self, core: client.CoreV1Api, namespace: str) -> None:
        self._core = core
        self._namespace = namespace

    def names(self, selector: str = "") -> list[str]:
        """Names of the pods that are there and not being deleted, sorted."""
        pods = self._core.list_namespaced_pod(self._namespace, label_selector=selector).items
        return sorted(pod.metadata.name for pod in pods if pod.metadata.deletion_timestamp is None)

    def wait_for_phase(self, name: str, phase: str, seconds: float = 30.0) -> None:
        """Wait until the pod is in that phase. Raises TimeoutError."""
        wait_for(lambda: self._read(name).status.phase == phase, f"pod {name} is {phase}", seconds)

    def run(self, name: str) -> None:
        """Its containers run, and it is ready."""
        now = _now()
        self._set(name, "Running", ready=True, start_time=now, state={"running": {"startedAt": now}})

    def hold(self, name: str, reason: str, message: str = "") -> None:
        """Its containers wait for a reason such as ImagePullBackOff."""
        self._set(name, "Pending", ready=False, state={"waiting": {"reason": reason, "message": message}})

    def succeed(self, name: str, message: str = "") -> None:
        """Its containers ended with 0."""
        self._end(name, "Succeeded", 0, "Completed", message)

    def fail(self, name: str, exit_code: int, message: str = "", *, reason: str = "Error") -> None:
        """Its containers ended with a code (1 to 255), for a reason such as Error or OOMKilled."""
        assert 1 <= exit_code <= 255
        self._end(name, "Failed", exit_code, reason, message)

    def disrupt(self, name: str, reason: str = "EvictionByEvictionAPI", exit_code: int = 143) -> None:
        """It was told to make room: its containers ended on SIGTERM, and the pod says who is to blame."""
        condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "lastTransitionTime": _now()}
        self._end(name, "Failed", exit_code, "Error", "", condition)

    def _end(
        self, name: str, phase: str, exit_code: int, reason: str, message: str, *conditions: dict[str, Any]
    ) -> None:
        now = _now()
        ended = {"exitCode": exit_code, "reason": reason, "message": message, "startedAt": now, "finishedAt": now}
        self._set(name, phase, *conditions, ready=False, state={"terminated": ended})

    def _set(
        self,
        name: str,
        phase: str,
        *conditions: dict[str, Any],
        ready: bool,
        state: dict[str, Any],
        start_time: str | None = None,
    ) -> None:
        now = _now()
        each = {"ready": ready, "started": ready, "restartCount": 0, "imageID": "", "state": state}
        containers = self._read(name).spec.containers
        condition = {"status": str(ready), "lastTransitionTime": now}
        status: dict[str, Any] = {
            "phase": phase,
            "conditions": [{"type": "ContainersReady"} | condition, {"type": "Ready"} | condition, *conditions],
            "containerStatuses": [{"name": c.name, "image": c.image} | each for c in containers],
        }
        if start_time:
            status["startTime"] = start_time
        self._core.patch_namespaced_pod_status(name, self._namespace, {"status": status})

    def _read(self, name: str) -> client.V1Pod:
        return self._core.read_namespaced_pod(name, self._namespace)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
