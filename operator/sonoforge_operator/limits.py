"""Whether a job stays inside its runtime: it can narrow what the platform gives, and never widen it."""

from __future__ import annotations

from collections.abc import Iterator

from sonoforge_operator.api import PretrainJob, PretrainRuntimeSpec
from sonoforge_trainer.contract import ContractError


def narrow(job: PretrainJob, runtime: PretrainRuntimeSpec, *, where: str = "PretrainJob") -> None:
    """Refuse a job that asks for more than its runtime allows.

    Raises ContractError with one line for every field that does.
    """
    faults = [f"{where}.spec.{fault}" for check in _CHECKS for fault in check(job, runtime)]
    if faults:
        raise ContractError("\n".join(faults))


def queue_of(job: PretrainJob, runtime: PretrainRuntimeSpec) -> str:
    """The queue a job goes through: its own, or else its runtime's; empty where there is none."""
    return job.spec.queue_name or runtime.queue_name


def _nodes(job: PretrainJob, runtime: PretrainRuntimeSpec) -> Iterator[str]:
    found, limit = job.spec.workers.max_nodes, runtime.limits.max_nodes
    if limit is not None and found > limit:
        yield f"workers.maxNodes: found {found}. Allowed: at most {limit}, the runtime's limits.maxNodes"


def _gpus(job: PretrainJob, runtime: PretrainRuntimeSpec) -> Iterator[str]:
    found, limit = job.spec.workers.gpus_per_node, runtime.limits.max_gpus_per_node
    if limit is not None and found > limit:
        yield f"workers.gpusPerNode: found {found}. Allowed: at most {limit}, the runtime's limits.maxGpusPerNode"


def _queue(job: PretrainJob, runtime: PretrainRuntimeSpec) -> Iterator[str]:
    found = job.spec.queue_name
    allowed = sorted({*runtime.limits.queues, runtime.queue_name} - {""})
    if found and found not in allowed:
        names = f"one of {', '.join(allowed)}" if allowed else "no queue, the runtime names none"
        yield f"queueName: found {found!r}. Allowed: {names}"


def _selector(job: PretrainJob, runtime: PretrainRuntimeSpec) -> Iterator[str]:
    for key, found in sorted(job.spec.workers.node_selector.items()):
        wanted = runtime.workers.node_selector.get(key, found)
        if found != wanted:
            yield f"workers.nodeSelector.{key}: found {found!r}. Allowed: {wanted!r}, which the runtime sets"


_CHECKS = (_nodes, _gpus, _queue, _selector)
