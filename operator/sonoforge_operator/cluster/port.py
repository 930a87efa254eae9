"""The port to a cluster: observes a job, records its status, and makes its children what the plan says.

The order of writes is what makes a pass that is cut anywhere harmless: checkpoints first, then the status of the job,
then children, then events. Every name follows from the status, so what was done before the cut is found done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from sonoforge_operator.children import attempt_of, training_wanted
from sonoforge_operator.cluster import desired
from sonoforge_operator.cluster.api_client import (
    BATCH_JOBS,
    CHECKPOINTS,
    DEPLOYMENTS,
    JOBS,
    PODS,
    Api,
    ConflictError,
    Kind,
    Manifest,
    NotFoundError,
)
from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.desired import ClusterJob, digest_of, owner_reference
from sonoforge_operator.cluster.facts import facts, unanswered
from sonoforge_operator.cluster.names import LABEL_ATTEMPT, LABEL_CHILD, LABEL_PART
from sonoforge_operator.cluster.posting import Posting
from sonoforge_operator.cluster.projection import checkpoint_document, job_document
from sonoforge_operator.cluster.record import recall, weighty
from sonoforge_operator.cluster.store import Store, key_of
from sonoforge_operator.observed import Child, Observed, Plan
from sonoforge_operator.status import CheckpointStatus, JobStatus
from sonoforge_trainer.contract import Request

log = structlog.get_logger(__name__)

_NUMBERS_SECONDS = 10.0
"""Progress alone is written no more often than this."""


@dataclass
class _Memory:
    """What was decided for a job by this process."""

    status: JobStatus
    written: float = 0.0


class ClusterPort:
    """Objects of a cluster, for one job at a time. Every method may raise ApiError; the pass is then made again."""

    def __init__(self, api: Api, store: Store, coordinators: Coordinators) -> None:
        self._api, self._store, self._coordinators = api, store, coordinators
        self._memory: dict[str, _Memory] = {}
        self._posting = Posting(api)

    # --- observe ------------------------------------------------------------------------------------------------------

    async def observe(self, job: ClusterJob, now: float) -> Observed:
        """The facts: children first, progress after, as the plan expects."""
        status = self._status(job, now)
        if status.terminal:
            return Observed(status=status)
        children = facts(self._store.owned(job.names.uid), status, now)
        deployed = self._store.get(DEPLOYMENTS.name, job.names.key.namespace, job.names.coordinator)
        progress = await self._coordinators.progress(job.names) if deployed else None
        return Observed(status=status, children=children, progress=progress)

    def _status(self, job: ClusterJob, now: float) -> JobStatus:
        """The status as last decided here, or as last written."""
        uid = job.names.uid
        if uid not in self._memory:
            found = recall(self._manifest(job), self._store.checkpoints(uid), job.file)
            self._memory[uid] = _Memory(found, written=now)
        return self._memory[uid].status

    def forget(self, uid: str) -> None:
        """Forget what was decided for a job: it is gone, or somebody else wrote its status."""
        self._memory.pop(uid, None)

    # --- record -------------------------------------------------------------------------------------------------------

    async def record(self, job: ClusterJob, observed: Observed, decided: Plan, now: float) -> None:
        """Write what was decided, checkpoints before the job."""
        uid, status = job.names.uid, decided.status
        try:
            for checkpoint in status.checkpoints:
                await self._record_checkpoint(job, checkpoint, status)
            await self._record_job(job, observed, status, now)
        except (ConflictError, NotFoundError):
            self.forget(uid)  # the watch brings what somebody else wrote
            await self._refresh(job)
            raise

    async def _record_checkpoint(self, job: ClusterJob, checkpoint: CheckpointStatus, status: JobStatus) -> None:
        namespace, name = job.names.key.namespace, job.names.checkpoint(checkpoint.ref.id)
        found = self._store.get(CHECKPOINTS.name, namespace, name)
        if found is None:
            found = await self._api.apply(desired.checkpoint_object(job, checkpoint.ref))
            self._store.put(CHECKPOINTS.name, found)
        document = checkpoint_document(checkpoint, status, job.file)
        if found.get("status") != document:
            self._store.put(CHECKPOINTS.name, await self._api.put_status(CHECKPOINTS, found, document))

    async def _record_job(self, job: ClusterJob, observed: Observed, status: JobStatus, now: float) -> None:
        uid, manifest = job.names.uid, self._manifest(job)
        known = self._memory[uid]
        followed = manifest["metadata"].get("generation") == (manifest.get("status") or {}).get("observedGeneration")
        if followed and weighty(known.status) == weighty(status):
            known.status = status
            if status.terminal or now - known.written < _NUMBERS_SECONDS:
                return
        document = job_document(job, status, observed, manifest, now)
        if manifest.get("status") != document:
            self._store.put(JOBS.name, await self._api.put_status(JOBS, manifest, document))
        self._memory[uid] = _Memory(status, now)

    async def reject(self, key_manifest: Mapping[str, Any], document: Manifest) -> None:
        """Write the status of a job that cannot run as it is."""
        if key_manifest.get("status") != document:
            self._store.put(JOBS.name, await self._api.put_status(JOBS, key_manifest, document))

    async def _refresh(self, job: ClusterJob) -> None:
        """Read what changed behind our back, rather than wait for the watch."""
        key = job.names.key
        try:
            self._store.put(JOBS.name, await self._api.get(JOBS, key.namespace, key.name))
            for found in list(self._store.of_job(job.names.uid, CHECKPOINTS.name)):
                self._store.put(CHECKPOINTS.name, await self._api.get(CHECKPOINTS, key.namespace, key_of(found).name))
        except NotFoundError:
            return

    # --- apply --------------------------------------------------------------------------------------------------------

    async def apply(self, job: ClusterJob, observed: Observed, decided: Plan, now: float) -> None:
        """Make the children what the plan says, pass its requests on, and tell its events."""
        if not decided.status.terminal:
            await self._apply_all(job, desired.standing_objects(job))
        for request in decided.requests:
            await self._send(job, request)
        await self._release(job, decided, now)
        await self._start(job, decided)
        await self._posting.post(job.names, decided.events, now)
        if decided.status.terminal:
            self.forget(job.names.uid)

    async def expire(self, job: ClusterJob) -> None:
        """Delete a job that ended long enough ago; what it owns goes with it."""
        key = job.names.key
        await self._api.delete(JOBS, key.namespace, key.name, uid=job.names.uid)

    async def _apply_all(self, job: ClusterJob, manifests: Iterable[Manifest]) -> None:
        """Apply what differs from what was applied before."""
        for manifest in manifests:
            kind = manifest["kind"]
            found = self._store.get(kind, job.names.key.namespace, manifest["metadata"]["name"])
            if found is None or digest_of(dict(found)) != digest_of(manifest):
                self._store.put(kind, await self._api.apply(manifest))

    async def _start(self, job: ClusterJob, decided: Plan) -> None:
        """Make what is wanted and not there. What is there is left alone: no pod is changed while it runs."""
        wanted: dict[tuple[str, str], Manifest] = {}
        for child in decided.children:
            manifest = self._manifest_of(job, child, decided.status)
            if manifest is not None:
                wanted.setdefault((manifest["kind"], manifest["metadata"]["name"]), manifest)
        for (kind, name), manifest in wanted.items():
            if self._store.get(kind, job.names.key.namespace, name) is None:
                self._store.put(kind, await self._api.apply(manifest))

    def _manifest_of(self, job: ClusterJob, child: Child, status: JobStatus) -> Manifest | None:
        match child.kind:
            case "coordinator":
                return desired.coordinator(job)
            case "worker":
                return desired.worker_job(job, child.attempt, tuple(node.name for node in status.excluded))
            case "evaluation":
                owner = self._owner_of(job, child, status)
                return desired.small_job(job, child, owner) if owner else None
            case _:
                return desired.small_job(job, child, job.owner())

    def _owner_of(self, job: ClusterJob, child: Child, status: JobStatus) -> Manifest | None:
        """The Checkpoint that an evaluation belongs to."""
        assert child.request is not None
        for checkpoint in status.checkpoints:
            if checkpoint.ref.uri == child.request.checkpoint_uri:
                name = job.names.checkpoint(checkpoint.ref.id)
                found = self._store.get(CHECKPOINTS.name, job.names.key.namespace, name)
                return owner_reference("Checkpoint", name, str(found["metadata"]["uid"])) if found else None
        return None

    async def _release(self, job: ClusterJob, decided: Plan, now: float) -> None:
        """End what is not wanted. Pods that ended stay for their logs, as long as they hold nothing."""
        objects = self._store.owned(job.names.uid)
        wanted = {child.name for child in decided.children}
        status = decided.status
        for found in objects.jobs:
            if found["metadata"].get("deletionTimestamp"):
                continue
            if _label(found, LABEL_PART) == "worker":
                await self._release_workers(job, found, status)
            elif _label(found, LABEL_CHILD) not in wanted and not _over(found) and not _done(found, objects.pods):
                await self._delete(BATCH_JOBS, found)
        if not any(child.kind == "coordinator" for child in decided.children):
            for found in objects.deployments:
                if not found["metadata"].get("deletionTimestamp"):
                    await self._delete(DEPLOYMENTS, found)
        killed = {name for name in decided.kill if "-" in name}
        attempts = {attempt_of(name) for name in killed}
        for pod in objects.pods:
            # A node that cannot be reached never says that its pods ended; one that failed gets no time to save.
            doomed = _label(pod, LABEL_ATTEMPT).isdigit() and int(_label(pod, LABEL_ATTEMPT)) in attempts
            if unanswered(pod, now):
                await self._delete(PODS, pod, grace_seconds=0)
            elif doomed and _active(pod) and not pod["metadata"].get("deletionTimestamp"):
                await self._delete(PODS, pod, grace_seconds=1)

    async def _release_workers(self, job: ClusterJob, found: Mapping[str, Any], status: JobStatus) -> None:
        label = _label(found, LABEL_ATTEMPT)
        attempt = int(label) if label.isdigit() else -1  # a Job that somebody else made to look like ours
        if attempt == status.attempt and training_wanted(job.file, status):
            return
        if attempt < status.attempt - 1:
            await self._delete(BATCH_JOBS, found)
        elif (found.get("spec") or {}).get("parallelism") != 0 and not _over(found):
            key = key_of(found)
            changes: Manifest = {"spec": {"parallelism": 0}}
            self._store.put(BATCH_JOBS.name, await self._api.merge(BATCH_JOBS, key.namespace, key.name, changes))

    async def _delete(self, kind: Kind, found: Mapping[str, Any], grace_seconds: int | None = None) -> None:
        key = key_of(found)
        uid = str(found["metadata"].get("uid", ""))
        await self._api.delete(kind, key.namespace, key.name, uid=uid, grace_seconds=grace_seconds)

    async def _send(self, job: ClusterJob, request: Request) -> None:
        if request.kind == "lost":
            address = self._address(job, request)
            if not address:
                return  # it never had one, so nobody knows it
            request = request.model_copy(update={"node": address})
        await self._coordinators.ask(job.names, request)

    def _address(self, job: ClusterJob, request: Request) -> str:
        """The address of the pod that was lost, by which the other agents know it."""
        known = self._memory.get(job.names.uid)
        lost = known.status.worker_lost if known else ()
        index = int(request.node)
        identity = lost[index] if index < len(lost) else ""
        for pod in self._store.of_job(job.names.uid, PODS.name):
            if identity and pod["metadata"].get("uid") == identity:
                return str((pod.get("status") or {}).get("podIP") or "")
        return ""

    def _manifest(self, job: ClusterJob) -> Mapping[str, Any]:
        key = job.names.key
        manifest = self._store.get(JOBS.name, key.namespace, key.name)
        if manifest is None or manifest["metadata"].get("uid") != job.names.uid:
            raise NotFoundError(404, "NotFound", f"the PretrainJob {key} is gone")
        return manifest


def _label(manifest: Mapping[str, Any], label: str) -> str:
    return str((manifest["metadata"].get("labels") or {}).get(label, ""))


def _over(job: Mapping[str, Any]) -> bool:
    conditions = (job.get("status") or {}).get("conditions") or ()
    return any(c.get("type") in ("Complete", "Failed") and c.get("status") == "True" for c in conditions)


def _done(job: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the pods of a Job have ended, and it only was not told yet. Their logs are worth keeping."""
    uid = job["metadata"].get("uid")
    mine = [pod for pod in pods if any(o.get("uid") == uid for o in pod["metadata"].get("ownerReferences") or ())]
    return bool(mine) and not any(_active(pod) for pod in mine)


def _active(pod: Mapping[str, Any]) -> bool:
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
