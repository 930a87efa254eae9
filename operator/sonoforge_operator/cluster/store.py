"""What the operator knows of the cluster: the newest object of every name, and which job each belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sonoforge_operator.cluster.facts import Objects
from sonoforge_operator.cluster.names import LABEL_UID, Key, Names

Manifest = Mapping[str, Any]
_Place = tuple[str, str, str]  # kind, namespace, name


class Store:
    """Objects by kind and name. What is older than what is known is not taken over.

    Watches and our own writes both bring objects here, so that the next pass never decides on what was before its
    own last write.
    """

    def __init__(self) -> None:
        self._objects: dict[_Place, Manifest] = {}
        self._by_job: dict[tuple[str, str], set[_Place]] = {}
        self._gone: dict[_Place, str] = {}

    def put(self, kind: str, manifest: Manifest) -> bool:
        """Take over an object as it is now. Whether that is news."""
        place = _place(kind, manifest)
        before = self._objects.get(place)
        uid = _uid(manifest)
        if before is not None and _uid(before) == uid and _version(manifest) < _version(before):
            return False
        if self._gone.get(place) == uid and uid:
            return False
        if before is not None:
            self._forget(place, before)
        self._objects[place] = trimmed(kind, manifest)
        self._by_job.setdefault(_job_of(manifest), set()).add(place)
        return before is None or _version(before) != _version(manifest)

    def remove(self, kind: str, manifest: Manifest) -> None:
        """An object is gone."""
        place = _place(kind, manifest)
        before = self._objects.get(place)
        if before is not None and _uid(before) == _uid(manifest):
            self._forget(place, before)
            del self._objects[place]
        self._gone[place] = _uid(manifest)  # a late answer of ours must not bring it back
        if len(self._gone) > 100_000:
            self._gone.pop(next(iter(self._gone)))

    def forget(self, kind: str, manifest: Manifest) -> None:
        """Know nothing of an object any more, whether it is there or not."""
        place = _place(kind, manifest)
        before = self._objects.pop(place, None)
        if before is not None:
            self._forget(place, before)

    def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """An object, where it is known."""
        return self._objects.get((kind, namespace, name))

    def all(self, kind: str) -> Iterator[Manifest]:
        """Every known object of a kind."""
        return (manifest for place, manifest in self._objects.items() if place[0] == kind)

    def of_job(self, job: Names, kind: str) -> Iterator[Manifest]:
        """Objects of a kind, in the namespace of a job, that carry its uid."""
        places = [place for place in self._by_job.get((job.key.namespace, job.uid), ()) if place[0] == kind]
        return (self._objects[place] for place in sorted(places))

    def checkpoints(self, job: Names) -> tuple[Manifest, ...]:
        """The Checkpoints of a job that it really owns."""
        return tuple(found for found in self.of_job(job, "Checkpoint") if _owner(found) == job.uid)

    def owned(self, job: Names) -> Objects:
        """The children of a job that it, or one of its checkpoints, really owns. Labels alone make nobody a child."""
        owners = {job.uid, *(_uid(checkpoint) for checkpoint in self.checkpoints(job))}
        jobs = tuple(found for found in self.of_job(job, "Job") if _owner(found) in owners)
        deployments = tuple(found for found in self.of_job(job, "Deployment") if _owner(found) in owners)
        job_uids = {_uid(found) for found in jobs}
        # A Deployment owns its pods through a ReplicaSet, which is not worth a watch of its own: its name tells whose.
        replicas = tuple(f"{key_of(found).name}-" for found in deployments)
        pods = tuple(
            pod
            for pod in self.of_job(job, "Pod")
            if _owner(pod) in job_uids or (_owner_kind(pod) == "ReplicaSet" and _owner_name(pod).startswith(replicas))
        )
        return Objects(jobs=jobs, pods=pods, deployments=deployments)

    def versions(self, kind: str) -> dict[tuple[str, str], str]:
        """Resource version of every known object of a kind, by namespace and name."""
        return {
            place[1:]: str(manifest["metadata"].get("resourceVersion"))
            for place, manifest in self._objects.items()
            if place[0] == kind
        }

    def _forget(self, place: _Place, manifest: Manifest) -> None:
        job = _job_of(manifest)
        places = self._by_job.get(job)
        if places is not None:
            places.discard(place)
            if not places:
                del self._by_job[job]


def trimmed(kind: str, manifest: Manifest) -> Manifest:
    """What is worth keeping of an object. Thousands of pods are held in memory."""
    metadata = manifest.get("metadata")
    kept = {k: v for k, v in metadata.items() if k != "managedFields"} if isinstance(metadata, Mapping) else {}
    if kind == "Pod":
        spec, status = manifest.get("spec"), manifest.get("status")
        return {
            "metadata": _only(kept, _POD_METADATA),
            "spec": _only(spec, ("nodeName",)),
            "status": _only(status, _POD_STATUS),
        }
    if kind == "Job":
        spec = manifest.get("spec")
        return {**manifest, "metadata": kept, "spec": _only(spec, ("suspend", "parallelism", "completions"))}
    if kind == "Deployment":
        return {"metadata": kept, "status": _only(manifest.get("status"), ("readyReplicas",))}
    if kind in ("ConfigMap", "ServiceAccount", "Service", "NetworkPolicy"):
        return {"metadata": kept}
    return {**manifest, "metadata": kept}


_POD_METADATA = (
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "deletionTimestamp",
    "labels",
    "ownerReferences",
)
_POD_STATUS = ("phase", "reason", "conditions", "containerStatuses", "podIP")


def _only(value: object, keys: Iterable[str]) -> dict[str, Any]:
    return {key: value[key] for key in keys if key in value} if isinstance(value, Mapping) else {}


def key_of(manifest: Manifest) -> Key:
    """Namespace and name of an object."""
    metadata = manifest["metadata"]
    return Key(str(metadata.get("namespace", "")), str(metadata["name"]))


def _place(kind: str, manifest: Manifest) -> _Place:
    key = key_of(manifest)
    return kind, key.namespace, key.name


def _uid(manifest: Manifest) -> str:
    return str(manifest["metadata"].get("uid", ""))


def _job_of(manifest: Manifest) -> tuple[str, str]:
    """Namespace, and the uid of the job that the labels name."""
    labels = manifest["metadata"].get("labels")
    uid = str(labels.get(LABEL_UID, "")) if isinstance(labels, Mapping) else ""
    return key_of(manifest).namespace, uid


def _version(manifest: Manifest) -> int:
    version = str(manifest["metadata"].get("resourceVersion", ""))
    return int(version) if version.isascii() and version.isdigit() else 0


def _controller(manifest: Manifest) -> Mapping[str, Any]:
    owners = manifest["metadata"].get("ownerReferences")
    for owner in owners if isinstance(owners, list) else ():
        if isinstance(owner, Mapping) and owner.get("controller") is True:
            return owner
    return {}


def _owner(manifest: Manifest) -> str:
    return str(_controller(manifest).get("uid", "-"))


def _owner_name(manifest: Manifest) -> str:
    return str(_controller(manifest).get("name", ""))


def _owner_kind(manifest: Manifest) -> str:
    return str(_controller(manifest).get("kind", ""))
