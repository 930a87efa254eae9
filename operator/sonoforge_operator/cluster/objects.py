"""What the operator reads in manifests of pods and Jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def label_of(manifest: Mapping[str, Any], label: str) -> str:
    """A label; empty where there is none."""
    return str((manifest["metadata"].get("labels") or {}).get(label, ""))


def node_of(pod: Mapping[str, Any]) -> str:
    """The machine of a pod; empty where it has none yet."""
    return str((pod.get("spec") or {}).get("nodeName") or "")


def address_of(pod: Mapping[str, Any]) -> str:
    """The address of a pod; empty where it has none yet."""
    return str((pod.get("status") or {}).get("podIP") or "")


def is_over(job: Mapping[str, Any]) -> bool:
    """Whether the status of a Job says that it ended."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    return any(c.get("type") in ("Complete", "Failed") and c.get("status") == "True" for c in conditions)


def is_done(job: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the pods of a Job have ended, and it only was not told yet. Their logs are worth keeping."""
    uid = job["metadata"].get("uid")
    mine = [pod for pod in pods if any(o.get("uid") == uid for o in pod["metadata"].get("ownerReferences") or ())]
    return bool(mine) and not any(is_active(pod) for pod in mine)


def is_active(pod: Mapping[str, Any]) -> bool:
    """Whether a pod has not ended."""
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
