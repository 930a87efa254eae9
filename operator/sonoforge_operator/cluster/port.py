"""The port to a cluster: observes a job, records its status, and makes its children what the plan says.

The order of writes is what makes a pass that is cut anywhere harmless: checkpoints first, then the status of the job,
then children, then events. Every name follows from the status, so what was done before the cut is found done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
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
    ApiError,
    ConflictError,
    Kind,
    Manifest,
    NotFoundError,
)
from sonoforge_operator.cluster.coordinators import Coordinators, believable
from sonoforge_operator.cluster.desired import ClusterJob, digest_of, owner_reference
from sonoforge_operator.cluster.facts import facts, unanswered
from sonoforge_operator.cluster.freshness import LatePods
from sonoforge_operator.cluster.names import LABEL_ATTEMPT, LABEL_CHILD, LABEL_PART, Names
from sonoforge_operator.cluster.objects import address_of, is_active, is_done, is_over, label_of, node_of
from sonoforge_operator.cluster.posting import Posting
from sonoforge_operator.cluster.projection import checkpoint_document, job_document
from sonoforge_operator.cluster.record import recall, weighty
from sonoforge_operator.cluster.store import Store, key_of
from sonoforge_operator.observed import Child, Event, Observed, Plan
from sonoforge_operator.status import CheckpointStatus, JobStatus
from sonoforge_trainer.contract import Request, canonical_json

log = structlog.get_logger(__name__)

_NUMBERS_SECONDS = 10.0
"""Progress alone is written no more often than this."""
_IDLE_NUMBERS_SECONDS = 120.0
"""And while there is none, only the time that is lost."""
_MOST_SENT = 100_000
_NO_ATTEMPT = 0


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
        self._sent: dict[str, tuple[str, int]] = {}
        self._refused: dict[str, str] = {}
        self._late_pods = LatePods(api, store)
        self._posting = Posting(api)

    # --- observe ------------------------------------------------------------------------------------------------------

    async def observe(self, job: ClusterJob, now: float) -> Observed:
        """The facts: children first, progress after, as the plan expects."""
        status = self._status(job, now)
        if status.terminal:
            return Observed(status=status)
        children = facts(await self._late_pods.objects(job.names), status, now)
        deployed = self._store.get(DEPLOYMENTS.name, job.names.key.namespace, job.names.coordinator)
        # One that is not ready would only be waited for.
        ready = bool(deployed and (deployed.get("status") or {}).get("readyReplicas"))
        node, progress = self._node(job.names), None
        if ready:
            await self._coordinators.tell_lost(job.names, node, self._workers(job.names))
            progress = await self._coordinators.progress(job.names, node)
        else:
            self._coordinators.forget(job.names.uid)
        said = believable(progress, job) if progress else None
        uid = job.names.uid
        return Observed(
            status=status,
            children=children,
            progress=said,
            heard=self._coordinators.heard(uid),
            refused=self._refused.get(uid, ""),
        )

    def _status(self, job: ClusterJob, now: float) -> JobStatus:
        """The status as last decided here, or as last written."""
        uid = job.names.uid
        if uid not in self._memory:
            found = recall(self._manifest(job), self._store.checkpoints(job.names), job.file)
            self._memory[uid] = _Memory(found, written=now)
        return self._memory[uid].status

    def forget(self, uid: str) -> None:
        """Forget what was decided for a job: it is gone, or somebody else wrote its status."""
        self._memory.pop(uid, None)
        self._sent.pop(uid, None)
        self._refused.pop(uid, None)
        self._late_pods.forget(uid)
        self._coordinators.forget(uid)

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
        await self._put_status(CHECKPOINTS, found, checkpoint_document(checkpoint, status, job.file))

    async def _record_job(self, job: ClusterJob, observed: Observed, status: JobStatus, now: float) -> None:
        uid, manifest = job.names.uid, self._manifest(job)
        known = self._memory[uid]
        followed = job.generation == (manifest.get("status") or {}).get("observedGeneration")
        if followed and not _rejected(manifest) and weighty(known.status) == weighty(status):
            known.status = status
            interval = _NUMBERS_SECONDS if status.phase == "Running" else _IDLE_NUMBERS_SECONDS
            if status.terminal or now - known.written < interval:
                return
        await self._put_status(JOBS, manifest, job_document(job, status, observed))
        self._memory[uid] = _Memory(status, now)

    async def reject(self, manifest: Mapping[str, Any], document: Manifest) -> None:
        """Write the status of a job that cannot run as it is."""
        await self._put_status(JOBS, manifest, document)

    async def _put_status(self, kind: Kind, manifest: Mapping[str, Any], document: Manifest) -> None:
        """Write a status, unless it is the one that is there or the one that was sent last.

        A server whose resource definition is older drops fields: what comes back is then not what was sent.
        """
        if manifest.get("status") == document:
            return
        uid, sent = str(manifest["metadata"].get("uid", "")), hash(canonical_json(document))
        if self._sent.get(uid) == (_version(manifest), sent):
            return
        written = await self._api.put_status(kind, manifest, document)
        self._store.put(kind.name, written)
        if len(self._sent) > _MOST_SENT:
            self._sent.clear()  # then some are sent again
        self._sent[uid] = (_version(written), sent)

    async def _refresh(self, job: ClusterJob) -> None:
        """Read what changed behind our back, rather than wait for the watch."""
        key = job.names.key
        try:
            self._store.put(JOBS.name, await self._api.get(JOBS, key.namespace, key.name))
        except NotFoundError:
            return
        for found in self._store.checkpoints(job.names):
            try:
                self._store.put(CHECKPOINTS.name, await self._api.get(CHECKPOINTS, key.namespace, key_of(found).name))
            except NotFoundError:
                self._store.remove(CHECKPOINTS.name, found)

    # --- apply --------------------------------------------------------------------------------------------------------

    async def apply(self, job: ClusterJob, observed: Observed, decided: Plan, now: float) -> None:
        """Make the children what the plan says, and tell its events."""
        if not decided.status.terminal:
            await self._apply_all(job, desired.standing_objects(job))
        await self._release(job.names, decided, training_wanted(decided.status), now)
        if any(child.kind == "coordinator" for child in decided.children):
            await self._replace_lost_coordinator(job.names, decided, now)
        await self._start(job, decided)
        self._refused.pop(job.names.uid, None)
        await self._posting.post(job.names, decided.events, now, decided.status.attempt)
        if decided.status.terminal:
            self.forget(job.names.uid)

    async def send(self, job: ClusterJob, decided: Plan) -> None:
        """Pass the requests of a plan that was recorded on. A run that does not listen costs the time of a visit."""
        for request in decided.requests:
            await self._send(job, request)

    async def complain(self, names: Names, error: ApiError, now: float) -> None:
        """Tell the user what the API server refused: a quota, an admission rule, a missing right, what is invalid."""
        if names.uid and 400 <= error.status < 500 and error.status not in (404, 409, 429):
            message = f"{error.reason}: {error.message}"
            self._refused[names.uid] = message
            await self._posting.post(names, (Event("Refused", message, warning=True),), now)

    async def retire(self, names: Names, now: float) -> bool:
        """End whatever a job still holds after its end. Whether nothing is left of it."""
        self.forget(names.uid)
        await self._release(names, Plan(children=(), status=JobStatus(attempt=_NO_ATTEMPT)), False, now)
        objects = self._store.owned(names)
        return not objects.deployments and not any(is_active(pod) for pod in objects.pods)

    async def expire(self, names: Names) -> None:
        """Delete a job that ended long enough ago; what it owns goes with it."""
        await self._api.delete(JOBS, names.key.namespace, names.key.name, uid=names.uid)

    async def _apply_all(self, job: ClusterJob, manifests: Iterable[Manifest]) -> None:
        """Apply what differs from what was applied before, all at once: none needs another to be there."""
        await _together(self._apply(manifest) for manifest in manifests if self._differs(job, manifest))

    def _differs(self, job: ClusterJob, manifest: Manifest) -> bool:
        found = self._store.get(manifest["kind"], job.names.key.namespace, manifest["metadata"]["name"])
        return found is None or digest_of(dict(found)) != digest_of(manifest)

    async def _apply(self, manifest: Manifest) -> None:
        self._store.put(manifest["kind"], await self._api.apply(manifest))

    async def _start(self, job: ClusterJob, decided: Plan) -> None:
        """Make what is wanted and not there. What is there is left alone: no pod is changed while it runs."""
        wanted: dict[tuple[str, str], Manifest] = {}
        attempts = set()
        for child in decided.children:
            if child.kind == "worker":
                if child.attempt in attempts:
                    continue  # one Job has all nodes of an attempt
                attempts.add(child.attempt)
            manifest = self._manifest_of(job, child, decided.status)
            if manifest is not None:
                wanted[manifest["kind"], manifest["metadata"]["name"]] = manifest
        namespace = job.names.key.namespace
        missing = [m for (kind, name), m in wanted.items() if self._store.get(kind, namespace, name) is None]
        await _together(self._apply(manifest) for manifest in missing)

    def _manifest_of(self, job: ClusterJob, child: Child, status: JobStatus) -> Manifest | None:
        match child.kind:
            case "coordinator":
                return desired.coordinator(job)
            case "worker":
                return desired.worker_job(
                    job, child.attempt, child.workers, tuple(node.name for node in status.excluded)
                )
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

    async def _release(self, names: Names, decided: Plan, training: bool, now: float) -> None:
        """End what is not wanted. Pods that ended stay for their logs, as long as they hold nothing."""
        objects = self._store.owned(names)
        wanted = {child.name for child in decided.children}
        status = decided.status
        for found in objects.jobs:
            if found["metadata"].get("deletionTimestamp"):
                continue
            if label_of(found, LABEL_PART) == "worker":
                await self._release_workers(found, status.attempt, training)
            elif label_of(found, LABEL_CHILD) not in wanted and not is_over(found) and not is_done(found, objects.pods):
                await self._delete(BATCH_JOBS, found)
        if not any(child.kind == "coordinator" for child in decided.children):
            for found in objects.deployments:
                if not found["metadata"].get("deletionTimestamp"):
                    await self._delete(DEPLOYMENTS, found)
        attempts = {attempt_of(name) for name in decided.kill}
        for pod in objects.pods:
            # A node that cannot be reached never says that its pods ended; one that failed gets no time to save.
            doomed = label_of(pod, LABEL_ATTEMPT).isdigit() and int(label_of(pod, LABEL_ATTEMPT)) in attempts
            if unanswered(pod, now):
                await self._delete(PODS, pod, grace_seconds=0)
            elif doomed and is_active(pod) and not pod["metadata"].get("deletionTimestamp"):
                await self._delete(PODS, pod, grace_seconds=1)

    async def _replace_lost_coordinator(self, names: Names, decided: Plan, now: float) -> None:
        """Take away the pod of a coordinator that is lost; its Deployment makes another one at once.

        The cluster would do so too, once it holds the node for lost: by default after most of a minute.
        """
        node = self._coordinators.lost(names.uid)
        if node is None:
            return
        lost = [pod for pod in self._pods_of(names, "coordinator") if node_of(pod) == node]
        if lost:
            self._coordinators.mourn(names.uid, node, self._workers(names, node))
        for pod in lost:
            await self._delete(PODS, pod)
        self._coordinators.forget(names.uid)
        if lost:
            event = Event("CoordinatorLost", "the coordinator does not answer any more, and is replaced", warning=True)
            await self._posting.post(names, (event,), now, decided.status.attempt)

    def _node(self, names: Names) -> str:
        """The machine of the coordinator; empty where it has none, or more than one."""
        nodes = {node_of(pod) for pod in self._pods_of(names, "coordinator")}
        return nodes.pop() if len(nodes) == 1 else ""

    def _workers(self, names: Names, node: str = "") -> dict[str, str]:
        """Addresses of the workers, of all or of those on a machine, by the uids of their pods."""
        pods = [pod for pod in self._pods_of(names, "worker") if node in ("", node_of(pod))]
        return {str(pod["metadata"]["uid"]): address_of(pod) for pod in pods if address_of(pod)}

    def _pods_of(self, names: Names, part: str) -> list[Mapping[str, Any]]:
        """The pods of a part of the job that are not on their way out."""
        pods = [pod for pod in self._store.of_job(names, PODS.name) if label_of(pod, LABEL_PART) == part]
        return [pod for pod in pods if is_active(pod) and not pod["metadata"].get("deletionTimestamp")]

    async def _release_workers(self, found: Mapping[str, Any], current: int, training: bool) -> None:
        label = label_of(found, LABEL_ATTEMPT)
        attempt = int(label) if label.isdigit() and len(label) < 10 else 0
        if attempt == current and training:
            return
        if 0 < attempt < current - 1:
            await self._delete(BATCH_JOBS, found)
        elif (found.get("spec") or {}).get("parallelism") != 0 and not is_over(found):
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
        for pod in self._store.of_job(job.names, PODS.name):
            if identity and pod["metadata"].get("uid") == identity:
                return address_of(pod)
        return ""

    def _manifest(self, job: ClusterJob) -> Mapping[str, Any]:
        key = job.names.key
        manifest = self._store.get(JOBS.name, key.namespace, key.name)
        if manifest is None or manifest["metadata"].get("uid") != job.names.uid:
            raise NotFoundError(404, "NotFound", f"the PretrainJob {key} is gone")
        return manifest


async def _together(calls: Iterable[Awaitable[None]]) -> None:
    """Make requests at the same time. Raises what the first one raised, once all have ended."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _version(manifest: Mapping[str, Any]) -> str:
    return str(manifest["metadata"].get("resourceVersion"))


def _rejected(job: Mapping[str, Any]) -> bool:
    """Whether the status says that the job cannot run as it is."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Accepted" and c.get("status") == "False" for c in conditions)
