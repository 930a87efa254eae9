"""The custom resources as Python types: what a person writes. The CRDs are generated from them.

One file may hold several documents: the PretrainJob, and the PretrainRuntime and EvalSuite that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from sonoforge_trainer.contract import (
    CheckpointConfig,
    ContractError,
    Evaluation,
    ExecutionConfig,
    Misfit,
    Part,
    RunConfig,
    TrainConfig,
    load_yaml_documents,
    refuse,
)

GROUP = "sonoforge.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

Duration = Annotated[str, Field(pattern=r"^([0-9]+(s|m|h|d))+$")]
Count = Annotated[int, Field(ge=0)]


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

    name: str
    """Name of the object."""


class Workers(Part):
    """The elastic group of nodes."""

    min_nodes: Annotated[int, Field(ge=1)] = 1
    """Training goes on with this many; below it the run waits."""
    max_nodes: Annotated[int, Field(ge=1)] = 1
    """Training grows up to this many. May change while the job runs."""
    gpus_per_node: Annotated[int, Field(ge=1)] = 1
    """Processes on each node, one a GPU. On a machine without GPUs, processes.

    maxNodes x gpusPerNode is at most training.recipe.virtualRanks: a process without a virtual rank has no work."""

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
    """Score that decides which checkpoint is best, as EVALUATION-PROTOCOL/METRIC, for example planes-knn/f1_macro."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Direction of the score."""
    stop_after_no_gain: Annotated[int, Field(ge=1)] | None = None
    """End the job after this many checkpoints in a row without a better score."""
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
    """Application errors."""
    no_progress: NoProgressBudget = NoProgressBudget()
    """Restarts without progress."""
    startup_deadline: Duration = "30m"
    """Time from a start to the first step."""
    stall_after: Literal["auto"] | Duration = "auto"
    """Time without a step that counts as a stall; auto is 20 median steps, at least 60 s."""


class PretrainJobSpec(Part):
    """One pretraining run."""

    runtime_ref: NameRef | None = None
    """The PretrainRuntime with the platform's defaults and limits."""
    training: TrainConfig
    """Everything the result depends on. Immutable."""
    workers: Workers = Workers()
    """The elastic group of nodes."""
    checkpoints: CheckpointConfig
    """Durable state."""
    evaluation: EvaluationPolicy = EvaluationPolicy()
    """Evaluation of checkpoints."""
    restart_policy: RestartPolicy = RestartPolicy()
    """When to give up."""
    queue_name: str = ""
    """Kueue queue, where there is one."""
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


class PretrainRuntimeSpec(Part):
    """Defaults and limits of a platform that jobs refer to by name."""

    execution: ExecutionConfig = ExecutionConfig()
    """How workers execute; nothing here changes a result beyond rounding."""


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
    if isinstance(document, Mapping) and isinstance(document.get("spec"), Mapping):
        document = _known_metadata(document)
        training = document["spec"].get("training")
        if training is not None:
            resolved = TrainConfig.resolve(training, where=f"{where}.spec.training")
            document = {**document, "spec": {**document["spec"], "training": resolved.document()}}
    return PretrainJob.parse(document, where=where)


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
    runtimes = [
        PretrainRuntime.parse(_known_metadata(d), where=f"{where}: PretrainRuntime")
        for d in by_kind.get("PretrainRuntime", [])
    ]
    suites = [EvalSuite.parse(_known_metadata(d), where=f"{where}: EvalSuite") for d in by_kind.get("EvalSuite", [])]
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
    """Refuse a score that no evaluation makes. Raises ContractError."""
    if policy.best_by is None:
        if policy.stop_after_no_gain:
            raise ContractError(f"{where}: required with stopAfterNoGain; name the score that decides")
        return
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


def _known_metadata(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drop what a cluster adds to an object and what is not ours to judge: other metadata, status."""
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
