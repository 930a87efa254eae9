"""Jobs that cannot train, each for a reason of its own, and the reason that their status has to give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from faults import kill_operator
from real_site import RealSite, job, secret

_SECONDS = 300


@dataclass(frozen=True)
class WrongJob:
    """A job that is wrong, or that gets a wrong runtime."""

    number: str
    name: str
    reason: str
    """What its status has to say: the reason of Failed, or of Scheduled where the pods never run."""
    change: Callable[[dict[str, Any], dict[str, Any]], None]
    """Spoils the spec of the job, or that of its runtime."""
    without_operator: bool = False
    """Whether the operator is killed once the job has a phase."""

    @property
    def object_name(self) -> str:
        """Name of its objects."""
        return f"wrong-{self.number}"


def _huge_head(spec: dict[str, Any], runtime: dict[str, Any]) -> None:
    """A tensor that no machine has room for: torch refuses it as it refuses one that a GPU has no room for."""
    del runtime
    spec["training"]["recipe"]["head"]["hiddenDim"] = 2**40


def _small_cgroup(spec: dict[str, Any], runtime: dict[str, Any]) -> None:
    del spec
    runtime["workers"] |= {"requests": {"cpu": "50m", "memory": "200Mi"}, "limits": {"memory": "200Mi"}}


def _no_image(spec: dict[str, Any], runtime: dict[str, Any]) -> None:
    del spec
    runtime["images"] = {"trainer": "sonoforge/nobody-built-this:1"}


def _no_key(spec: dict[str, Any], runtime: dict[str, Any]) -> None:
    del spec
    runtime["storage"]["credentialsSecret"] = "s3-wrong"


def _many_gpus(spec: dict[str, Any], runtime: dict[str, Any]) -> None:
    del runtime
    spec["workers"]["gpusPerNode"] = spec["training"]["recipe"]["virtualRanks"] = 8


def _spoilt_data(spec: dict[str, Any], runtime: dict[str, Any]) -> None:
    del runtime
    spec["training"]["data"]["shards"] = spec["training"]["data"]["shards"].replace("/train/", "/spoilt/")


_SINGLE = (
    WrongJob("12a", "torch has no room for a tensor", "OutOfMemory", _huge_head),
    WrongJob("12b", "the cgroup's memory is spent", "OutOfMemory", _small_cgroup),
    WrongJob("12c", "image that is not there", "ImagePull", _no_image),
    WrongJob("12d", "wrong credentials of the storage", "Storage", _no_key),
    WrongJob("12e", "more GPUs than any node has", "Unschedulable", _many_gpus),
    WrongJob("10b", "shards corrupted in S3, never repaired", "Data", _spoilt_data),
)
WRONG_JOBS = (
    *_SINGLE,
    *(replace(w, number=f"13-{w.number}", name=f"{w.name}; operator killed", without_operator=True) for w in _SINGLE),
)


def play(site: RealSite, wrong: WrongJob) -> str:
    """Apply it, and return the reason and message that its status gives once they are not passing ones."""
    runtime = copy.deepcopy(site.runtime())
    manifest = job(wrong.object_name, steps=20, every=20, nodes=1)
    runtime["metadata"]["name"] = manifest["spec"]["runtimeRef"]["name"] = wrong.object_name
    wrong.change(manifest["spec"], runtime["spec"])
    site.apply(secret("s3-wrong", "credentials", _CREDENTIALS), runtime)
    site.spoil_copy_of_data()
    site.apply(manifest)
    try:
        if wrong.without_operator:
            site.wait_for(lambda: site.phase(wrong.object_name), f"{wrong.name}: it has a phase", _SECONDS)
            kill_operator(site, wrong.object_name)
        site.wait_for(lambda: _lasting(site, wrong), f"{wrong.name}: {wrong.reason}", _SECONDS)
        return _reason(site, wrong)
    finally:
        site.kubectl("delete", "pj", wrong.object_name, "--wait=false")


_CREDENTIALS = b"[default]\naws_access_key_id = nobody\naws_secret_access_key = wrong\n"


def _lasting(site: RealSite, wrong: WrongJob) -> bool:
    """Whether the job is over, or says what it waits for."""
    return site.phase(wrong.object_name) in ("Succeeded", "Failed", "Invalid") or _reason(site, wrong).startswith(
        wrong.reason
    )


def _reason(site: RealSite, wrong: WrongJob) -> str:
    conditions = {c["type"]: c for c in site.status(wrong.object_name).get("conditions", ())}
    kind = "Failed" if conditions.get("Failed", {}).get("status") == "True" else "Scheduled"
    found = conditions.get(kind, {})
    return f"{found.get('reason', '')}: {found.get('message', '')}"
