"""The objects of a job, as pure functions of the job: what the operator applies, to the byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sonoforge_operator.api import API_VERSION, JobFile, PretrainRuntimeSpec, Workers
from sonoforge_operator.cluster.names import (
    ANNOTATION_DIGEST,
    ANNOTATION_REQUEST,
    LABEL_ATTEMPT,
    LABEL_CHILD,
    LABEL_PART,
    LABEL_QUEUE,
    LABEL_UID,
    Names,
)
from sonoforge_operator.cluster.network import policies
from sonoforge_operator.cluster.pods import CONFIG_FOLDER, REQUEST_FILE, Manifest, PodPlan, pod_template
from sonoforge_operator.limits import queue_of
from sonoforge_operator.observed import Child
from sonoforge_operator.resources import CheckpointSpec
from sonoforge_trainer.contract import ENV_IMAGE, CheckpointRef, canonical_json

STORE_PORT, HTTP_PORT = 29400, 8080
"""Ports of the coordinator."""
WORKER_GRACE_SECONDS = 120
"""Workers' time to save a checkpoint on SIGTERM."""
_SHUTDOWN_SECONDS = WORKER_GRACE_SECONDS - 15
_KEEP_ENDED_SECONDS = 3600
_NO_LIMIT = 2**31 - 1
_TRAINER = ("python3", "-m", "sonoforge_trainer")
_CHILD_PARTS = {"evaluation": "evaluation", "floor": "evaluation", "retention": "storage", "inventory": "storage"}


@dataclass(frozen=True)
class ClusterJob:
    """A job of a cluster, with everything that its objects follow from."""

    names: Names
    file: JobFile
    token_digest: str
    """What the coordinator compares a visitor's token with; no token is kept in any object."""
    default_image: str
    """Image of the trainer where the runtime names none."""
    operator_namespace: str
    """Namespace whose operator may visit the coordinator."""
    generation: int = 1
    """Generation of the spec that this was read from. A status says so, and no newer one that came meanwhile."""

    @property
    def runtime(self) -> PretrainRuntimeSpec:
        """What the platform gives."""
        return self.file.runtime

    @property
    def image(self) -> str:
        """Image of every pod."""
        return self.runtime.images.trainer or self.default_image

    def owner(self) -> Manifest:
        """The PretrainJob as the owner of an object."""
        return owner_reference("PretrainJob", self.names.key.name, self.names.uid)


def owner_reference(kind: str, name: str, uid: str) -> Manifest:
    """A reference to one of our objects as the only controller of another."""
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def digest_of(manifest: Manifest) -> str:
    """The digest that the operator noted on an object; empty where it made none."""
    digest = (manifest.get("metadata") or {}).get("annotations") or {}
    return str(digest.get(ANNOTATION_DIGEST, ""))


def with_digest(manifest: Manifest) -> Manifest:
    """The object with a note of what was applied, so that an equal one is not applied again."""
    digest = hashlib.sha256(canonical_json(manifest).encode()).hexdigest()[:16]
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), ANNOTATION_DIGEST: digest}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


# --- what every job has -----------------------------------------------------------------------------------------------


def standing_objects(job: ClusterJob) -> Iterator[Manifest]:
    """Objects that are there as long as the job is: they cost nothing and hold no node."""
    names, labels = job.names, job.names.labels
    config = {
        "config.json": job.file.run_config(names.uid).to_json(),
        "token": job.token_digest,
    }
    for manifest in (
        _object(job, "v1", "ConfigMap", names.base, labels("config"), data=config),
        _object(job, "v1", "ServiceAccount", names.base, labels("identity"), automountServiceAccountToken=False),
        _object(
            job,
            "v1",
            "Service",
            names.coordinator,
            labels("coordinator"),
            spec={
                "selector": _selects(names, "coordinator"),
                "ports": [_port("store", STORE_PORT), _port("http", HTTP_PORT)],
            },
        ),
        _object(
            job,
            "v1",
            "Service",
            names.workers,
            labels("worker"),
            spec={
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": _selects(names, "worker"),
            },
        ),
        *(
            _object(job, "networking.k8s.io/v1", "NetworkPolicy", f"{names.base}-{part}", labels(part), spec=spec)
            for part, spec in policies(names, job.runtime.network, job.operator_namespace, STORE_PORT, HTTP_PORT)
        ),
    ):
        yield with_digest(manifest)


def _selects(names: Names, part: str) -> dict[str, str]:
    return {LABEL_UID: names.uid, LABEL_PART: part}


def _port(name: str, number: int) -> Manifest:
    return {"name": name, "port": number, "targetPort": number, "protocol": "TCP"}


def _object(
    job: ClusterJob, api_version: str, kind: str, name: str, labels: Mapping[str, str], **content: object
) -> Manifest:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": job.names.key.namespace,
            "labels": dict(labels),
            "ownerReferences": [job.owner()],
        },
        **content,
    }


# --- children ---------------------------------------------------------------------------------------------------------


def coordinator(job: ClusterJob) -> Manifest:
    """The coordinator: a Deployment of one. The cluster replaces its pod also while the operator is away."""
    names = job.names
    labels = names.labels("coordinator")
    plan = PodPlan(
        part="coordinator",
        command=(
            *_TRAINER,
            "coordinator",
            "--host=0.0.0.0",
            f"--store-port={STORE_PORT}",
            f"--http-port={HTTP_PORT}",
            f"--token-file={CONFIG_FOLDER}/token",
        ),
        settings=job.runtime.coordinator,
        # No group forms without it, and another one in its place costs no step.
        unreachable_seconds=0,
        # One that is taken away because its node is silent leaves a pod there, until the node says otherwise.
        apart=_selects(names, "coordinator"),
        restart="Always",
        ports={"store": STORE_PORT, "http": HTTP_PORT},
        ready_path="/healthz",
        storage=False,
    )
    template = pod_template(plan, job.runtime, job.image, names.base, labels)
    spec = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": _selects(names, "coordinator")},
        "template": template,
    }
    return with_digest(_object(job, "apps/v1", "Deployment", names.coordinator, labels, spec=spec))


def worker_job(job: ClusterJob, attempt: int, workers: Workers, avoid_nodes: tuple[str, ...] = ()) -> Manifest:
    """The workers of an attempt: an Indexed Job that replaces what it loses, also while the operator is away."""
    names, runtime = job.names, job.runtime
    labels = names.labels("worker") | {LABEL_ATTEMPT: str(attempt)}
    gpus = workers.gpus_per_node if runtime.accelerator.resource_name else 0
    plan = PodPlan(
        part="worker",
        command=(
            "python3",
            "-m",
            "sonoforge_trainer.launch",
            f"--nodes={workers.min_nodes}:{workers.max_nodes}",
            f"--nproc-per-node={workers.gpus_per_node}",
            f"--endpoint={names.coordinator}:{STORE_PORT}",
            f"--attempt={names.uid}-{attempt}",
            "--local-addr=$(POD_IP)",
            f"--job={names.key.name}",
            f"--shutdown-timeout={_SHUTDOWN_SECONDS}",
        ),
        settings=runtime.workers,
        grace_seconds=WORKER_GRACE_SECONDS,
        gpus=gpus,
        environment={"POD_IP": {"fieldRef": {"fieldPath": "status.podIP"}}, ENV_IMAGE: job.image},
        node_selector=workers.node_selector,
        avoid_nodes=avoid_nodes,
        subdomain=names.workers,
    )
    spec = {
        "completionMode": "Indexed",
        "completions": workers.max_nodes,
        "parallelism": workers.max_nodes,
        # The operator counts and classifies: the Job replaces as long as it is wanted, and at once, not only when a
        # node that cannot be reached has answered.
        "backoffLimit": _NO_LIMIT,
        "podReplacementPolicy": "TerminatingOrFailed",
        "template": pod_template(plan, runtime, job.image, names.base, labels),
    }
    return _job(job, names.worker_job(attempt), labels, spec, job.owner())


def small_job(job: ClusterJob, child: Child, owner: Manifest) -> Manifest:
    """A process that runs once: an evaluation, floors, retention or an inventory. A second try has another name."""
    names, runtime = job.names, job.runtime
    part = _CHILD_PARTS[child.kind]
    labels = names.labels(part) | {LABEL_CHILD: child.name}
    uri = job.file.job.spec.checkpoints.uri
    command: tuple[str, ...]
    annotations = {}
    match child.kind:
        case "retention":
            command = ("checkpoints", "prune", uri, *(f"--delete={checkpoint}" for checkpoint in child.prune))
        case "inventory":
            command = ("checkpoints", "list", uri, *(f"--known={checkpoint}" for checkpoint in child.known))
        case _:
            assert child.request is not None
            annotations[ANNOTATION_REQUEST] = child.request.to_json()
            best_by = job.file.job.spec.evaluation.best_by
            decides = (f"--best-by={best_by}",) if best_by and child.kind == "evaluation" else ()
            floors = ("--floors",) if child.kind == "floor" and child.request.baseline is None else ()
            command = ("eval", *floors, *decides, "--request", REQUEST_FILE)
    plan = PodPlan(
        part=part,
        command=(*_TRAINER, *command),
        settings=runtime.evaluation if part == "evaluation" else runtime.coordinator,
        gpus=runtime.evaluation.gpus if part == "evaluation" else 0,
        request_annotation=ANNOTATION_REQUEST if annotations else "",
    )
    template = pod_template(plan, runtime, job.image, names.base, labels)
    template["metadata"]["annotations"] = annotations
    spec = {
        "backoffLimit": 0,
        # Never two of one evaluation at a time.
        "podReplacementPolicy": "Failed",
        "ttlSecondsAfterFinished": _KEEP_ENDED_SECONDS,
        "template": template,
    }
    return _job(job, names.child(child.name), labels, spec, owner, queued=part == "evaluation")


def checkpoint_object(job: ClusterJob, ref: CheckpointRef) -> Manifest:
    """The object of a committed checkpoint."""
    names = job.names
    manifest = _object(job, API_VERSION, "Checkpoint", names.checkpoint(ref.id), names.labels("checkpoint"))
    return with_digest(
        {
            **manifest,
            "spec": CheckpointSpec.of(ref, job=names.key.name, job_uid=names.uid).document(),
        }
    )


def _job(
    job: ClusterJob, name: str, labels: Mapping[str, str], spec: Manifest, owner: Manifest, *, queued: bool = True
) -> Manifest:
    queue = queue_of(job.file.job, job.runtime) if queued else ""
    metadata_labels = {**labels, **({LABEL_QUEUE: queue} if queue else {})}
    manifest = _object(job, "batch/v1", "Job", name, metadata_labels, spec=spec)
    manifest["metadata"]["ownerReferences"] = [owner]
    return with_digest(manifest)
