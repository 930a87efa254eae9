"""PretrainJob: what a researcher writes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonoforge_operator.api.fields import Count, Duration, Metadata, NameRef, NodeSelector, OptionalObjectName
from sonoforge_trainer.contract import CheckpointConfig, Misfit, Part, TrainConfig, refuse


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
            refuse(Misfit("minNodes", self.min_nodes, f"at most maxNodes {self.max_nodes}"))
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
    """Save a checkpoint, then release the nodes; false again continues from there."""
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
