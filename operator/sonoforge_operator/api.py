"""The custom resources as Python types: what a person writes. The CRDs are generated from them.

One file may hold several documents: the PretrainJob, and the PretrainRuntime and EvalSuite that it names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sonoforge_trainer.contract import (
    VALIDATION_PREFIX,
    CheckpointConfig,
    ContractError,
    Evaluation,
    ExecutionConfig,
    Misfit,
    Part,
    RunConfig,
    TrainConfig,
    is_validation_score,
    load_yaml_documents,
    refuse,
)

GROUP = "sonoforge.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"


def _a_network(text: str) -> str:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("not a network in CIDR notation; write for example 10.20.0.0/16") from None
    return text


def _number_as_text(value: object) -> object:
    """YAML reads `cpu: 8` as a number; a quantity is a text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Duration = Annotated[str, Field(pattern=r"^([0-9]+(s|m|h|d))+$", max_length=32)]
Count = Annotated[int, Field(ge=0)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
OptionalObjectName = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=253)]
_QUALIFIED = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
QualifiedName = Annotated[str, Field(pattern=f"^{_QUALIFIED}$", max_length=317)]
"""Name of a label, taint or resource, with or without a DNS prefix."""
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
_AMOUNT = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"
_INT_OR_STRING: dict[str, Any] = {"x-kubernetes-int-or-string": True}
Quantity = Annotated[
    str,
    Field(pattern=f"^{_AMOUNT}$", max_length=32, json_schema_extra=_INT_OR_STRING),
    BeforeValidator(_number_as_text),
]
"""An amount of a resource as Kubernetes writes it: 500m, 8, 32Gi."""
OptionalQuantity = Annotated[
    str,
    Field(pattern=f"^({_AMOUNT})?$", max_length=32, json_schema_extra=_INT_OR_STRING),
    BeforeValidator(_number_as_text),
]
Cidr = Annotated[str, AfterValidator(_a_network), Field(max_length=64, json_schema_extra={"format": "cidr"})]
Port = Annotated[int, Field(ge=1, le=65_535)]
NodeSelector = Annotated[dict[QualifiedName, LabelValue], Field(max_length=64)]
Resources = Annotated[dict[QualifiedName, Quantity], Field(max_length=32)]


class Metadata(Part):
    """The part of an object's metadata that matters here; whatever else a cluster adds is left alone."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=63)]
    """Name of the object."""
    uid: str = ""
    """Identity of the object, given by the cluster; a local run derives one."""
    generation: int = 1
    """Version of the spec."""


class NameRef(Part):
    """A reference to an object in the same namespace."""

    name: ObjectName
    """Name of the object."""


class Workers(Part):
    """The elastic group of nodes."""

    min_nodes: Annotated[int, Field(ge=1)] = 1
    """Training goes on with this many; below it the run waits."""
    max_nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Training grows up to this many. May change while the job runs."""
    gpus_per_node: Annotated[int, Field(ge=1)] = 1
    """Processes on each node, one a GPU. On a machine without GPUs, processes.

    maxNodes x gpusPerNode is at most training.recipe.virtualRanks: a process without a virtual rank has no work."""
    node_selector: NodeSelector = {}
    """Labels that the nodes must have besides those that the runtime asks for, which cannot be changed here."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise ValueError(
                f"minNodes {self.min_nodes} is above maxNodes {self.max_nodes}; lower it or raise maxNodes"
            )
        return self


class EvaluationPolicy(Part):
    """Which evaluations every checkpoint gets, and what follows from the scores."""

    suite_ref: NameRef | None = None
    """The EvalSuite to run on every checkpoint."""
    every: Literal["checkpoint"] = "checkpoint"
    """Every durable checkpoint is evaluated."""
    best_by: Annotated[str, Field(pattern=r"^[a-z0-9][-a-z0-9]*/[a-z0-9_@.]+$")] | None = None
    """Score to be best by, as EVALUATION-PROTOCOL/METRIC, for example planes-knn/f1_macro.

    Checkpoints are compared by its counterpart on the validation split (planes-knn/val_f1_macro); the score itself, on
    the test split, is shown and decides nothing. A score of the health protocol needs no labels and is compared itself.
    """
    best_is: Literal["highest", "lowest"] = "highest"
    """Direction of the score."""
    stop_after_no_gain: Annotated[int, Field(ge=1)] | None = None
    """End the job after this many checkpoints in a row without a better score, compared as for bestBy."""
    floors: bool = True
    """Run the protocols once also without any learning (raw pixels, HOG, the mean mask), while no checkpoint waits."""
    parallel: Annotated[int, Field(ge=1)] = 1
    """Evaluations that may run at the same time."""
    retries: Count = 2
    """Times a failed evaluation is tried again; then it is marked Failed and training goes on."""


class ApplicationBudget(Part):
    """How many application errors a job survives."""

    max: Count = 3
    """Restarts allowed in the window."""
    window: Duration = "1h"
    """Length of the window."""


class NoProgressBudget(Part):
    """How many restarts without a newer checkpoint a job survives."""

    max: Annotated[int, Field(ge=1)] = 3
    """Restarts in a row in which the durable step did not rise."""


class RestartPolicy(Part):
    """When a failing job is given up. Lost nodes and preemptions never count against it."""

    application: ApplicationBudget = ApplicationBudget()
    """How many application errors a job survives."""
    no_progress: NoProgressBudget = NoProgressBudget()
    """How many restarts without a newer checkpoint a job survives."""
    startup_deadline: Duration = "30m"
    """Time from a start to the first step."""
    stall_after: Literal["auto"] | Duration = "auto"
    """Time without a step that counts as a stall; auto is 20 median steps, at least 60 s."""


class PretrainJobSpec(Part):
    """One pretraining run."""

    runtime_ref: NameRef | None = None
    """The PretrainRuntime with the platform's defaults and limits."""
    training: TrainConfig
    """Everything the result of a run depends on."""
    workers: Workers = Workers()
    """The elastic group of nodes."""
    checkpoints: CheckpointConfig
    """When checkpoints are made, where they go and which are kept."""
    evaluation: EvaluationPolicy = EvaluationPolicy()
    """Which evaluations every checkpoint gets, and what follows from the scores."""
    restart_policy: RestartPolicy = RestartPolicy()
    """When a failing job is given up."""
    queue_name: OptionalObjectName = ""
    """Kueue queue. Empty: the runtime's."""
    suspend: bool = False
    """Save a checkpoint and release the nodes; false again continues from there."""
    ttl_after_finished: Duration | None = None
    """Delete the job this long after it finished."""

    @model_validator(mode="after")
    def _every_process_has_work(self) -> Self:
        workers, virtual_ranks = self.workers, self.training.recipe.virtual_ranks
        if workers.max_nodes * workers.gpus_per_node > virtual_ranks:
            gpus = workers.gpus_per_node
            limit = f"at most {virtual_ranks // gpus}" if gpus <= virtual_ranks else "none, lower workers.gpusPerNode"
            why = f"maxNodes x workers.gpusPerNode {gpus} <= training.recipe.virtualRanks {virtual_ranks}"
            refuse(Misfit("workers.maxNodes", workers.max_nodes, f"{limit} ({why})"))
        return self


class PretrainJob(Part):
    """A PretrainJob object."""

    api_version: Literal["sonoforge.dev/v1alpha1"]
    """API group and version."""
    kind: Literal["PretrainJob"]
    """Kind."""
    metadata: Metadata
    """Name and identity."""
    spec: PretrainJobSpec
    """What is wanted."""


class Images(Part):
    """Where the programs come from."""

    trainer: Annotated[str, Field(max_length=512)] = ""
    """Image of every pod of a job, best by digest (NAME@sha256:...). Empty: the operator's default."""
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When a node asks the registry."""
    pull_secrets: Annotated[tuple[ObjectName, ...], Field(max_length=8)] = ()
    """Names of Secrets with the registry's credentials, in the job's namespace."""


class Accelerator(Part):
    """What a process computes on."""

    resource_name: Annotated[str, Field(pattern=f"^({_QUALIFIED})?$", max_length=317)] = "nvidia.com/gpu"
    """Extended resource that stands for one GPU. Empty: CPU only, and gpusPerNode is the number of processes."""


class Limits(Part):
    """What a job may ask for at most."""

    max_nodes: Annotated[int, Field(ge=1)] | None = None
    """Upper bound of a job's maxNodes. Not given: none."""
    max_gpus_per_node: Annotated[int, Field(ge=1)] | None = None
    """Upper bound of a job's gpusPerNode. Not given: none."""
    queues: Annotated[tuple[ObjectName, ...], Field(max_length=64)] = ()
    """Queues that a job may name besides the runtime's own. Empty: only that one."""


class Toleration(Part):
    """A taint that pods put up with; the fields are those of a pod."""

    key: Annotated[str, Field(pattern=f"^({_QUALIFIED})?$", max_length=317)] = ""
    """Key of the taint. Empty with the operator Exists: every taint."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Equal compares the value, Exists only looks for the key."""
    value: LabelValue = ""
    """Value of the taint, for Equal."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Effect of the taint. Empty: every effect."""
    toleration_seconds: Count | None = None
    """How long a NoExecute taint is put up with. Not given: for ever."""

    @model_validator(mode="after")
    def _fits_its_operator(self) -> Self:
        if self.operator == "Exists" and self.value:
            raise ValueError("operator Exists compares no value; remove the value or use Equal")
        if self.operator == "Equal" and not self.key:
            raise ValueError("operator Equal needs a key; give one or use Exists")
        return self


class PodSettings(Part):
    """Where the pods of one kind run and what they get."""

    node_selector: NodeSelector = {}
    """Labels that a node must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = ()
    """Taints of nodes that these pods put up with."""
    priority_class_name: OptionalObjectName = ""
    """PriorityClass of the pods. Empty: the cluster's default."""
    runtime_class_name: OptionalObjectName = ""
    """RuntimeClass of the pods. Empty: the node's default."""
    requests: Resources = {}
    """Resources that a pod asks for, for example cpu and memory; GPUs are added from the accelerator."""
    limits: Resources = {}
    """Resources that a pod may not exceed; GPUs are added from the accelerator."""
    shared_memory: OptionalQuantity = ""
    """Size of /dev/shm, which counts as memory. Empty: the container runtime's default."""


class WorkerPods(PodSettings):
    """Where workers run and what each node's pod gets."""

    shared_memory: OptionalQuantity = "8Gi"
    """Size of /dev/shm, through which decode workers and NCCL pass data. It counts as memory."""


class EvaluationPods(PodSettings):
    """Where evaluations run and what each gets."""

    gpus: Count = 0
    """GPUs of an evaluation. 0: it runs on CPUs."""


class StorageSettings(Part):
    """How the pods reach object storage."""

    endpoint_url: Annotated[str, Field(pattern=r"^(https?://[^@\s]+)?$", max_length=1024)] = ""
    """URL of the S3 server. Empty: AWS."""
    region: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]*$", max_length=63)] = ""
    """Region of the buckets. Empty: us-east-1."""
    path_style: bool = False
    """Always address buckets as SERVER/BUCKET. Otherwise only where endpointUrl is set."""
    credentials_secret: OptionalObjectName = ""
    """Secret whose key `credentials` is an AWS credentials file; it is mounted as a file. Empty: no static keys."""
    ca_bundle: OptionalObjectName = ""
    """ConfigMap whose key `ca.crt` has the certificates to trust. Empty: those of the image."""
    role_arn: Annotated[str, Field(pattern=r"^(arn:[^\s]+)?$", max_length=2048)] = ""
    """Role to assume with a projected service account token (web identity). Empty: pods get no token at all."""


class Network(Part):
    """Which traffic of a job's pods is allowed."""

    policies: bool = True
    """Make NetworkPolicies: workers with each other and the coordinator, DNS and storage; nothing else."""
    storage_cidrs: Annotated[tuple[Cidr, ...], Field(max_length=64)] = ()
    """Networks of the storage servers. Empty: any address, on the storage ports only."""
    storage_ports: Annotated[tuple[Port, ...], Field(min_length=1, max_length=16)] = (443,)
    """TCP ports of the storage servers."""
    dns_namespace: ObjectName = "kube-system"
    """Namespace of the cluster's DNS."""


class PretrainRuntimeSpec(Part):
    """Defaults and limits of a platform that jobs refer to by name. A job can narrow them and never widen them.

    A run on one machine uses only `execution`.
    """

    execution: ExecutionConfig = ExecutionConfig()
    """How workers execute; nothing here changes a result beyond rounding."""
    images: Images = Images()
    """Where the programs come from."""
    accelerator: Accelerator = Accelerator()
    """What a process computes on."""
    limits: Limits = Limits()
    """What a job may ask for at most."""
    workers: WorkerPods = WorkerPods()
    """Pods that train, one a node."""
    coordinator: PodSettings = PodSettings()
    """The pod that workers meet at. It needs no GPU and should be on a node that stays."""
    evaluation: EvaluationPods = EvaluationPods()
    """Pods that evaluate a checkpoint."""
    queue_name: OptionalObjectName = ""
    """Kueue queue of jobs that name none. Empty: no queue."""
    storage: StorageSettings = StorageSettings()
    """How the pods reach object storage."""
    network: Network = Network()
    """Which traffic of a job's pods is allowed."""
    hash_key_secret: OptionalObjectName = ""
    """Secret whose key `key` (16 bytes or more) hashes sample keys in logs. Empty: a key is drawn for each group."""
    user_id: Annotated[int, Field(ge=1)] = 65_532
    """User that the processes run as; never root."""
    group_id: Annotated[int, Field(ge=1)] = 65_532
    """Group of the processes and of the volumes."""


class PretrainRuntime(Part):
    """A PretrainRuntime object."""

    api_version: Literal["sonoforge.dev/v1alpha1"]
    """API group and version."""
    kind: Literal["PretrainRuntime"]
    """Kind."""
    metadata: Metadata
    """Name."""
    spec: PretrainRuntimeSpec = PretrainRuntimeSpec()
    """What the platform gives."""


class EvalSuiteSpec(Part):
    """A named list of evaluations."""

    evaluations: Annotated[tuple[Evaluation, ...], Field(min_length=1)]
    """One entry a data set; the protocols of an entry share one feature pass."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [e.name for e in self.evaluations]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(f"two evaluations are called {double[0]}; give each its own name")
        return self


class EvalSuite(Part):
    """An EvalSuite object."""

    api_version: Literal["sonoforge.dev/v1alpha1"]
    """API group and version."""
    kind: Literal["EvalSuite"]
    """Kind."""
    metadata: Metadata
    """Name."""
    spec: EvalSuiteSpec
    """The evaluations."""


class JobFile(Part):
    """A PretrainJob together with the objects it names."""

    job: PretrainJob
    """The job."""
    runtime: PretrainRuntimeSpec = PretrainRuntimeSpec()
    """Its runtime."""
    evaluations: tuple[Evaluation, ...] = ()
    """The evaluations of its suite."""

    def run_config(self, uid: str) -> RunConfig:
        """The configuration file of the trainer."""
        spec = self.job.spec
        return RunConfig(
            job=self.job.metadata.name,
            uid=uid,
            training=spec.training,
            checkpoints=spec.checkpoints,
            execution=self.runtime.execution,
        )


def parse_job(document: object, *, where: str = "PretrainJob") -> PretrainJob:
    """A PretrainJob from a plain document; its preset is resolved. Raises ContractError."""
    document = _known_metadata(document)
    if isinstance(document, Mapping) and isinstance(document.get("spec"), Mapping):
        training = document["spec"].get("training")
        if training is not None:
            resolved = TrainConfig.resolve(training, where=f"{where}.spec.training")
            document = {**document, "spec": {**document["spec"], "training": resolved.document()}}
    return PretrainJob.parse(document, where=where)


def parse_runtime(document: object, *, where: str = "PretrainRuntime") -> PretrainRuntime:
    """A PretrainRuntime from a plain document, of a file or of a cluster. Raises ContractError."""
    return PretrainRuntime.parse(_known_metadata(document), where=where)


def parse_suite(document: object, *, where: str = "EvalSuite") -> EvalSuite:
    """An EvalSuite from a plain document, of a file or of a cluster. Raises ContractError."""
    return EvalSuite.parse(_known_metadata(document), where=where)


def parse_job_file(text: str, *, where: str) -> JobFile:
    """Read a YAML file with one PretrainJob and the objects it names. Raises ContractError."""
    documents = [d for d in load_yaml_documents(text, where=where) if d is not None]
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, Mapping) or not isinstance(document.get("kind"), str):
            raise ContractError(
                f"{where}, document {number}: no kind. Allowed: PretrainJob, PretrainRuntime, EvalSuite"
            )
        by_kind.setdefault(document["kind"], []).append(document)
    unknown = sorted(set(by_kind) - {"PretrainJob", "PretrainRuntime", "EvalSuite"})
    if unknown:
        raise ContractError(f"{where}: found kind {unknown[0]!r}. Allowed: PretrainJob, PretrainRuntime, EvalSuite")
    jobs = by_kind.get("PretrainJob", [])
    if len(jobs) != 1:
        raise ContractError(f"{where}: found {len(jobs)} PretrainJob documents. Allowed: exactly one")
    job = parse_job(jobs[0], where=f"{where}: PretrainJob")
    runtimes = [parse_runtime(d, where=f"{where}: PretrainRuntime") for d in by_kind.get("PretrainRuntime", [])]
    suites = [parse_suite(d, where=f"{where}: EvalSuite") for d in by_kind.get("EvalSuite", [])]
    runtime = _named(job.spec.runtime_ref, runtimes, f"{where}: PretrainJob.spec.runtimeRef.name")
    suite = _named(job.spec.evaluation.suite_ref, suites, f"{where}: PretrainJob.spec.evaluation.suiteRef.name")
    file = JobFile(
        job=job,
        runtime=runtime.spec if runtime else PretrainRuntimeSpec(),
        evaluations=suite.spec.evaluations if suite else (),
    )
    check_best_by(job.spec.evaluation, file.evaluations, where=f"{where}: PretrainJob.spec.evaluation.bestBy")
    return file


def check_best_by(policy: EvaluationPolicy, evaluations: Iterable[Evaluation], *, where: str) -> None:
    """Refuse a score that no evaluation makes, and a validation score. Raises ContractError."""
    if policy.best_by is None:
        if policy.stop_after_no_gain:
            raise ContractError(f"{where}: required with stopAfterNoGain; name the score that decides")
        return
    if is_validation_score(policy.best_by):
        raise ContractError(
            f"{where}: found {policy.best_by!r}. Allowed: the score to show, without {VALIDATION_PREFIX!r} before its "
            "metric; checkpoints are compared on validation in any case"
        )
    known = {f"{e.name}-{p}": e.metrics(p) for e in evaluations for p in e.protocols}
    scorer, _, metric = policy.best_by.partition("/")
    if scorer not in known:
        allowed = f"one of {', '.join(sorted(known)) or '(no suite)'}, with /METRIC"
    elif metric not in known[scorer]:
        allowed = f"{scorer}/ with one of {', '.join(known[scorer])}"
    else:
        return
    raise ContractError(f"{where}: found {policy.best_by!r}. Allowed: {allowed}")


def seconds(duration: str) -> int:
    """`1h30m` in seconds."""
    total, number = 0, ""
    for letter in duration:
        if letter.isdigit():
            number += letter
        else:
            total += int(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[letter]
            number = ""
    return total


def _known_metadata(document: object) -> object:
    """Drop what a cluster adds to an object and what is not ours to judge: other metadata, status."""
    if not isinstance(document, Mapping):
        return document
    metadata = document.get("metadata")
    kept = {k: v for k, v in document.items() if k != "status"}
    if isinstance(metadata, Mapping):
        kept["metadata"] = {k: v for k, v in metadata.items() if k in ("name", "uid", "generation")}
    return kept


_Named = TypeVar("_Named", PretrainRuntime, EvalSuite)


def _named(ref: NameRef | None, objects: list[_Named], where: str) -> _Named | None:
    if ref is None:
        return None
    for candidate in objects:
        if candidate.metadata.name == ref.name:
            return candidate
    names = ", ".join(o.metadata.name for o in objects) or "none"
    raise ContractError(f"{where}: found {ref.name!r}. Allowed: an object of that kind in this file ({names})")
