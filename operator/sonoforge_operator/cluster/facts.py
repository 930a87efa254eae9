"""From the objects of a cluster to the facts that a plan is made from. Total: whatever an object holds, it has an
answer, and at worst the fact says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sonoforge_operator.children import coordinator_name, worker_name
from sonoforge_operator.cluster.names import LABEL_ATTEMPT, LABEL_CHILD, LABEL_INDEX, LABEL_PART
from sonoforge_operator.observed import ChildFact
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import ContractError, Termination

Document = Mapping[str, Any]
_Item = TypeVar("_Item")

_PULL = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"}
_UNANSWERED_SECONDS = 15.0
_MOST_INDICES = 100_000


@dataclass(frozen=True)
class Objects:
    """What the cluster has of one job, and only what is really owned by it."""

    jobs: tuple[Document, ...] = ()
    pods: tuple[Document, ...] = ()
    deployments: tuple[Document, ...] = ()


def facts(objects: Objects, status: JobStatus, now: float) -> dict[str, ChildFact]:
    """The children of a job by name, at Unix time `now`."""
    pods_of: dict[str, list[Document]] = {}
    for pod in objects.pods:
        pods_of.setdefault(_owner_uid(pod), []).append(pod)
    found: dict[str, ChildFact] = {}
    for job in objects.jobs:
        pods = pods_of.get(_text(job, "metadata", "uid"), [])
        if _label(job, LABEL_PART) == "worker":
            if _number(_label(job, LABEL_ATTEMPT)) < 1:
                continue  # somebody else made it to look like ours
            found |= {fact.name: fact for fact in _workers(job, pods, status, now)}
        elif _label(job, LABEL_CHILD) and not _label(job, LABEL_CHILD).startswith("worker-"):
            fact = _small(job, pods, now)
            found[fact.name] = fact
    for deployment in objects.deployments:
        coordinators = [pod for pod in objects.pods if _label(pod, LABEL_PART) == "coordinator"]
        fact = _coordinator(deployment, coordinators, coordinator_name(status), now)
        found[fact.name] = fact
    return found


def ended_unheard(objects: Objects) -> set[str]:
    """Uids of the Jobs of small processes that are over, and of whose pods none is known to have ended."""
    heard = {_owner_uid(pod) for pod in objects.pods if _has_ended(pod)}
    small = [job for job in objects.jobs if _label(job, LABEL_PART) != "worker"]
    return {_text(job, "metadata", "uid") for job in small if _is_over(job)} - heard


def pod_fact(pod: Document, name: str, now: float) -> ChildFact:
    """A pod as a fact under a name. One that was told to end and never answered counts as ended."""
    phase, state = _text(pod, "status", "phase"), _container_state(pod)
    terminated = _mapping(state.get("terminated"))
    common: dict[str, Any] = {
        "name": name,
        "started": _started(pod, state),
        "node": _text(pod, "spec", "nodeName"),
        "identity": _text(pod, "metadata", "uid"),
        "created": unix_seconds(_text(pod, "metadata", "creationTimestamp")),
        "disruption": _disruption(pod),
    }
    if _has_ended(pod):
        code = terminated.get("exitCode")
        said = _termination(terminated)
        return ChildFact(
            running=False,
            exit_code=code if isinstance(code, int) and not isinstance(code, bool) else _code_of(phase),
            termination=said,
            reason=_reason_of_end(pod, terminated),
            **common,
        )
    deadline = unix_seconds(_text(pod, "metadata", "deletionTimestamp"))
    if deadline and now > deadline + _UNANSWERED_SECONDS:
        return ChildFact(running=False, **(common | {"disruption": common["disruption"] or "NodeUnreachable"}))
    waiting, message = _waiting(pod, phase, state)
    return ChildFact(running=True, waiting=waiting, waiting_message=message, **common)


def unanswered(pod: Document, now: float) -> bool:
    """Whether a pod was told to end, had its time, and its node does not say that it did."""
    deadline = unix_seconds(_text(pod, "metadata", "deletionTimestamp"))
    return bool(deadline) and not _has_ended(pod) and now > deadline + _UNANSWERED_SECONDS


# --- each kind of child -----------------------------------------------------------------------------------------------


def _workers(job: Document, pods: list[Document], status: JobStatus, now: float) -> Iterator[ChildFact]:
    attempt = _number(_label(job, LABEL_ATTEMPT))
    current = attempt == status.attempt
    by_index: dict[int, list[Document]] = {}
    for pod in pods:
        index = _number(_label(pod, LABEL_INDEX))
        if 0 <= index < _MOST_INDICES:
            by_index.setdefault(index, []).append(pod)
    spec = _mapping(job.get("spec"))
    if spec.get("suspend") is True and not pods and not _text(job, "metadata", "deletionTimestamp"):
        size = spec.get("parallelism")
        for index in range(min(size, _MOST_INDICES) if isinstance(size, int) else 0):
            name = worker_name(attempt, index, _at(status.worker_deaths, index, 0) if current else 0)
            message = "the queue has not admitted the job"
            yield ChildFact(name, running=True, waiting="WaitingForQueue", waiting_message=message)
    for index, candidates in by_index.items():
        deaths, counted = 0, (0.0, "")
        if current:
            deaths = _at(status.worker_deaths, index, 0)
            counted = _at(status.worker_lost_created, index, 0.0), _at(status.worker_lost, index, "")
        fresh = _newer(candidates, counted)
        name = worker_name(attempt, index, deaths)
        found = [pod_fact(pod, name, now) for pod in fresh]
        if found:
            # What ended is told first, so that nothing that failed goes unnoticed once it is replaced. A pod that is
            # leaving has a successor before its end, and is the node until then: the two are one loss.
            yield next((fact for fact in found if not fact.running), found[0])


def _newer(pods: list[Document], counted: tuple[float, str]) -> list[Document]:
    """The pods of an index after the one that was counted last, oldest first, whether or not its object is there."""
    ordered = sorted(pods, key=_birth)
    identities = [uid for _, uid in map(_birth, ordered)]
    if counted[1] in identities:
        return ordered[identities.index(counted[1]) + 1 :]
    # Times have whole seconds: of two pods of the same one, which came first is not known.
    return [pod for pod in ordered if _birth(pod)[0] >= counted[0]]


def _birth(pod: Document) -> tuple[float, str]:
    return unix_seconds(_text(pod, "metadata", "creationTimestamp")), _text(pod, "metadata", "uid")


def _small(job: Document, pods: list[Document], now: float) -> ChildFact:
    name = _label(job, LABEL_CHILD)
    found = [pod_fact(pod, name, now) for pod in pods]
    over = [fact for fact in found if not fact.running]
    if over:
        return over[-1]
    created = unix_seconds(_text(job, "status", "startTime")) or unix_seconds(
        _text(job, "metadata", "creationTimestamp")
    )
    if _is_over(job) and not found:
        return ChildFact(name, running=False, exit_code=0 if _condition(job, "Complete") else None, started=created)
    if found:
        return found[-1]
    if _mapping(job.get("spec")).get("suspend") is True or _condition(job, "Suspended"):
        message = "the queue has not admitted it"
        return ChildFact(name, running=True, waiting="WaitingForQueue", waiting_message=message, started=created)
    return ChildFact(name, running=True, waiting="Starting", started=created)


def _is_over(job: Document) -> bool:
    return _condition(job, "Complete") or _condition(job, "Failed")


def _coordinator(deployment: Document, pods: list[Document], name: str, now: float) -> ChildFact:
    """It exists as long as its Deployment does; the cluster replaces its pod."""
    alive = [fact for pod in pods if (fact := pod_fact(pod, name, now)).running]
    started = max((fact.started for fact in alive if not fact.waiting), default=0.0)
    waiting = alive[-1] if alive and not started else None
    return ChildFact(
        name,
        running=True,
        started=started or unix_seconds(_text(deployment, "metadata", "creationTimestamp")),
        waiting=waiting.waiting if waiting else "" if alive else "Starting",
        waiting_message=waiting.waiting_message if waiting else "",
    )


# --- pods -------------------------------------------------------------------------------------------------------------


def _has_ended(pod: Document) -> bool:
    return _text(pod, "status", "phase") in ("Succeeded", "Failed")


def _waiting(pod: Document, phase: str, state: Document) -> tuple[str, str]:
    """Why a pod does not run yet, in a word and in a sentence; empty where it runs."""
    waiting = _mapping(state.get("waiting"))
    reason, message = _string(waiting.get("reason")), _string(waiting.get("message"))
    if reason in _PULL:
        return "ImagePull", message or reason
    if reason in _CONFIG:
        return "ContainerConfig", message or reason
    if phase == "Running" and not waiting:
        return "", ""
    for condition in _conditions(pod):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            if condition.get("reason") == "SchedulingGated":
                return "WaitingForQueue", "the pod is held back by a scheduling gate"
            return "Unschedulable", _string(condition.get("message"))
    return "Starting", reason


def _termination(terminated: Document) -> Termination | None:
    message = terminated.get("message")
    if not isinstance(message, str) or not message.startswith("{"):
        return None
    try:
        return Termination.from_json(message, show_values=False)
    except ContractError:
        return None


def _reason_of_end(pod: Document, terminated: Document) -> str:
    reason = _string(terminated.get("reason"))
    return reason if reason not in ("", "Error", "Completed") else _text(pod, "status", "reason")


def _code_of(phase: str) -> int | None:
    return 0 if phase == "Succeeded" else None


def _disruption(pod: Document) -> str:
    for condition in _conditions(pod):
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            return _string(condition.get("reason")) or "DisruptionTarget"
    return ""


def _container_state(pod: Document) -> Document:
    statuses = _mapping(pod.get("status")).get("containerStatuses")
    first = statuses[0] if isinstance(statuses, list) and statuses else None
    return _mapping(_mapping(first).get("state"))


def _started(pod: Document, state: Document) -> float:
    for kind in ("running", "terminated"):
        found = unix_seconds(_string(_mapping(state.get(kind)).get("startedAt")))
        if found:
            return found
    # The time that it waited for a place is not time in which it could have started.
    scheduled = (c for c in _conditions(pod) if c.get("type") == "PodScheduled" and c.get("status") == "True")
    placed = unix_seconds(_text(next(scheduled, {}), "lastTransitionTime"))
    return placed or unix_seconds(_text(pod, "metadata", "creationTimestamp"))


# --- documents that may hold anything ---------------------------------------------------------------------------------


def _mapping(value: object) -> Document:
    return value if isinstance(value, Mapping) else {}


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _text(document: Document, *path: str) -> str:
    value: object = document
    for part in path:
        value = _mapping(value).get(part)
    return _string(value)


def _label(document: Document, label: str) -> str:
    return _string(_mapping(_mapping(document.get("metadata")).get("labels")).get(label))


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1


def _owner_uid(document: Document) -> str:
    owners = _mapping(document.get("metadata")).get("ownerReferences")
    for owner in owners if isinstance(owners, list) else ():
        if _mapping(owner).get("controller") is True:
            return _text(owner, "uid")
    return ""


def _conditions(document: Document) -> Iterable[Document]:
    conditions = _mapping(document.get("status")).get("conditions")
    return [_mapping(condition) for condition in conditions] if isinstance(conditions, list) else []


def _condition(document: Document, kind: str) -> bool:
    return any(c.get("type") == kind and c.get("status") == "True" for c in _conditions(document))


def unix_seconds(text: str) -> float:
    """An RFC 3339 time as Unix seconds; 0 where there is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _at(values: tuple[_Item, ...], index: int, default: _Item) -> _Item:
    return values[index] if index < len(values) else default
