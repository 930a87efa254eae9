"""PretrainRuntime: what the platform gives to every job that names it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonoforge_operator.api.fields import (
    QUALIFIED,
    Cidr,
    Count,
    LabelValue,
    Metadata,
    NodeSelector,
    ObjectName,
    OptionalObjectName,
    OptionalQuantity,
    Port,
    Resources,
)
from sonoforge_trainer.contract import ExecutionConfig, Misfit, Part, refuse


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

    resource_name: Annotated[str, Field(pattern=f"^({QUALIFIED})?$", max_length=317)] = "nvidia.com/gpu"
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

    key: Annotated[str, Field(pattern=f"^({QUALIFIED})?$", max_length=317)] = ""
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
            refuse(Misfit("value", self.value, "none: the operator Exists compares no value; or use Equal"))
        if self.operator == "Equal" and not self.key:
            refuse(Misfit("key", self.key, "a key: the operator Equal needs one; or use Exists"))
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
