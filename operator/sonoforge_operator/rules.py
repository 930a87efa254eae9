"""Decisions as chains of small named rules: `(facts) -> decision | None`, the first that speaks wins."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sonoforge_operator.api import RestartPolicy, seconds
from sonoforge_operator.observed import ChildFact
from sonoforge_operator.status import Backoff, JobStatus, Outcome, RestartCause, Tries
from sonoforge_trainer.contract import Activity, ExitCode, Progress

End = Literal["finished", "config"] | RestartCause

_BY_CODE: dict[int, End] = {
    ExitCode.OK: "finished",
    ExitCode.CONFIG: "config",
    ExitCode.DATA: "data",
    ExitCode.STORAGE: "storage",
    ExitCode.OUT_OF_MEMORY: "memory",
    ExitCode.HARDWARE: "hardware",
    ExitCode.NOT_FINITE: "not-finite",
    ExitCode.TERMINATED: "infrastructure",
}
_BY_REASON: dict[str, End] = {
    "OOMKilled": "memory",
    "UnexpectedAdmissionError": "hardware",
    "Evicted": "infrastructure",
    "NodeLost": "infrastructure",
    "NodeShutdown": "infrastructure",
    "Shutdown": "infrastructure",
    "Terminated": "infrastructure",
    "Preempting": "infrastructure",
    "NodeAffinity": "infrastructure",
    "DeadlineExceeded": "infrastructure",
    # The node came back without the container, as after a reboot.
    "ContainerStatusUnknown": "infrastructure",
    "Unknown": "infrastructure",
}
"""Reasons that the kubelet gives for the end of a container or a pod."""
_KILLED = 137
"""Exit code of a process that SIGKILL ended, as containers have it: where nobody says why, it came from outside."""
INNOCENT: tuple[End, ...] = ("collective", "hardware")
"""A group that lost its nodes did nothing wrong; every other restart has to bring the run forward."""
_NO_DEVICE = re.compile(r"OutOf\S+/\S+")
"""The kubelet has not the device that the scheduler counted on. Names of devices have a slash, those of cpu and memory
none; a pod asks for no other device than the runtime's accelerator."""
_DATA_RESTARTS, _MEMORY_RESTARTS, _NOT_FINITE_RESTARTS = 3, 1, 1
_CHECKPOINT_PATIENCE_SECONDS = 3900.0
"""The trainer itself gives a checkpoint up after an hour."""
_MOST_LOST = 20
_PASSES_BY_ITSELF = ("", "WaitingForQueue", "Unschedulable")
"""What a process may wait for however long it takes, with nobody's help; empty where it runs."""
_QUICK_RESTARTS, _LONGEST_BACKOFF_SECONDS = 3, 300.0


@dataclass(frozen=True)
class Failure:
    """A worker's end, classified."""

    cause: End
    """Class of the end."""
    message: str
    """What the process said, or what its exit code means."""


def classify(fact: ChildFact) -> Failure:
    """The class of a worker's end: what the platform knows, then what it said, then its exit code.

    137 alone says no more than that the process was killed.
    """
    said = fact.termination
    cause = said.cause if said else None
    if cause == "done":
        return Failure("finished", "")
    if fact.disruption:
        return Failure("infrastructure", f"the pod was taken away: {fact.disruption}")
    platform = "hardware" if _NO_DEVICE.fullmatch(fact.reason) else _BY_REASON.get(fact.reason)
    if platform:
        return Failure(platform, f"{fact.reason}{f' on {fact.node}' if fact.node else ''}")
    if said and cause and cause != "terminated":
        where = f" at step {said.step}" if said.step is not None else ""
        return Failure(cause, f"{said.exception or cause}{where}: {said.message}".rstrip(": "))
    if fact.exit_code in (None, _KILLED) or fact.exit_code < 0 or (said and fact.exit_code != 0):
        return Failure("infrastructure", "the process was killed" if fact.exit_code != ExitCode.TERMINATED else "")
    return Failure(_BY_CODE.get(fact.exit_code, "application"), f"exit code {fact.exit_code}")


# --- when a small process is given up ---------------------------------------------------------------------------------


def end_of(fact: ChildFact, now: float, patience: float) -> Failure | None:
    """How a small process ended, or None. One that does not start in time failed, unless it waits for a free place.

    `patience` in seconds.
    """
    if not fact.running:
        return classify(fact)
    if fact.waiting in _PASSES_BY_ITSELF or now - fact.started <= patience:
        return None
    return Failure("application", f"{fact.waiting}: {fact.waiting_message or 'it never started'}")


def tried(before: Tries, failure: Failure, retries: int) -> tuple[Tries, bool]:
    """The tries after one more failed, and whether there is another. Being killed counts apart, and far longer."""
    if failure.cause in ("infrastructure", "finished"):
        lost = before.lost + 1
        return Tries(failures=before.failures, lost=lost), lost <= _MOST_LOST
    failures = before.failures + 1
    return Tries(failures=failures, lost=before.lost), failures <= retries and failure.cause != "config"


# --- when a job is given up -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GiveUpFacts:
    """What the decision to give up depends on, with the failure at hand already counted."""

    failure: Failure
    """The failure at hand."""
    status: JobStatus
    """What happened so far."""
    policy: RestartPolicy
    """How much the job survives."""


def configuration_is_wrong(facts: GiveUpFacts) -> Outcome | None:
    """Trying again cannot help."""
    if facts.failure.cause == "config":
        return Outcome(result="Failed", reason="Configuration", message=facts.failure.message)
    return None


def application_budget_is_spent(facts: GiveUpFacts) -> Outcome | None:
    """Application errors come too often."""
    budget = facts.policy.application
    if facts.failure.cause == "application" and len(facts.status.application_failures) > budget.max:
        return Outcome(
            result="Failed",
            reason="ApplicationError",
            message=f"{len(facts.status.application_failures)} errors within {budget.window}: {facts.failure.message}",
        )
    return None


def memory_is_too_small(facts: GiveUpFacts) -> Outcome | None:
    """Memory ran out, again."""
    return _over("memory", _MEMORY_RESTARTS, "OutOfMemory", "use more virtual ranks or nodes with more memory", facts)


def loss_is_not_finite(facts: GiveUpFacts) -> Outcome | None:
    """The loss diverged again after going back to the last checkpoint."""
    return _over("not-finite", _NOT_FINITE_RESTARTS, "NotFinite", "lower recipe.optim.baseLr", facts)


def data_is_damaged(facts: GiveUpFacts) -> Outcome | None:
    """Data or storage failed in spite of the trainer's own retries."""
    for cause, reason in (("data", "Data"), ("storage", "Storage")):
        found = _over(cause, _DATA_RESTARTS, reason, "repair it and apply the job again", facts)
        if found:
            return found
    return None


def nothing_moves(facts: GiveUpFacts) -> Outcome | None:
    """Restarts do not bring the run forward. Damaged or refused storage has tries and a reason of its own."""
    limit = facts.policy.no_progress.max
    if facts.failure.cause in (*INNOCENT, "data", "storage"):
        return None
    if facts.status.restarts_without_progress >= limit:
        return Outcome(
            result="Failed",
            reason="NoProgress",
            message=f"{limit} restarts without a newer checkpoint: {facts.failure.message or facts.failure.cause}",
        )
    return None


GIVE_UP = (
    configuration_is_wrong,
    application_budget_is_spent,
    memory_is_too_small,
    loss_is_not_finite,
    data_is_damaged,
    nothing_moves,
)


def give_up(facts: GiveUpFacts) -> Outcome | None:
    """Whether the failure at hand ends the job."""
    return next((found for rule in GIVE_UP if (found := rule(facts))), None)


def _over(cause: str, limit: int, reason: str, advice: str, facts: GiveUpFacts) -> Outcome | None:
    if facts.failure.cause == cause and facts.status.restarts.get(cause, 0) > limit:
        return Outcome(result="Failed", reason=reason, message=f"{facts.failure.message.rstrip('.')}; {advice}")
    return None


def backoff(before: Backoff, now: float, *, useful: bool) -> Backoff:
    """When to start again what just ended: at once, but later and later where it ends without any use."""
    deaths = 0 if useful else before.deaths + 1
    wait = 0.0 if deaths <= _QUICK_RESTARTS else min(_LONGEST_BACKOFF_SECONDS, 2.0 ** (deaths - _QUICK_RESTARTS))
    return Backoff(deaths=deaths, until=now + wait)


# --- what a run that does not step is waiting for ---------------------------------------------------------------------


@dataclass(frozen=True)
class StallFacts:
    """What the judgement about a stall depends on."""

    progress: Progress
    """The newest progress known, which may be older than the coordinator that answers."""
    answered: bool
    """Whether the coordinator answered just now."""
    running: int
    """Nodes that run."""
    min_nodes: int
    """Nodes without which the run waits."""
    policy: RestartPolicy
    """When a pause is a stall."""
    since: float
    """Unix time of the newest start of a process."""
    coordinator_since: float
    """Unix time at which the coordinator started. It knows nothing that happened before; nor does it need to hurry."""
    now: float
    """Unix time."""
    waiting: str = ""
    """Why nodes that are needed do not run yet, in one word."""
    waiting_message: str = ""
    """The same in a sentence."""
    coordinator_waiting: str = ""
    """Why the coordinator does not run yet, in one word."""
    coordinator_message: str = ""
    """The same in a sentence."""


@dataclass(frozen=True)
class Stall:
    """A run that does not step."""

    reason: str
    """Rendezvous, Unreachable, Checkpointing, Collective or DataStarved, or what keeps nodes or the coordinator from
    running: Unschedulable, ImagePull, WaitingForQueue, ContainerConfig, Starting."""
    message: str
    """One sentence."""
    restart: bool
    """Whether a restart of the group is the remedy."""


def nodes_are_missing(facts: StallFacts) -> Stall | None:
    """There are fewer nodes than the run needs, and it is known why. Only the platform can change that."""
    if facts.waiting == "Starting" and facts.now - facts.since <= _startup(facts.policy):
        return None  # so does every pod for a while
    if facts.running < facts.min_nodes and facts.waiting:
        message = f"{facts.running} of at least {facts.min_nodes} nodes run: {facts.waiting_message}".rstrip(": ")
        return Stall(facts.waiting, message, restart=False)
    return None


def coordinator_cannot_run(facts: StallFacts) -> Stall | None:
    """Nobody can answer, and it is known why. A group that steps goes on without it for a while."""
    stepped = facts.progress.step_time > facts.since
    if facts.answered or facts.coordinator_waiting in ("", "Starting") or (stepped and not _silent_for_long(facts)):
        return None
    message = f"the coordinator does not run: {facts.coordinator_message}".rstrip(": ")
    return Stall(facts.coordinator_waiting, message, restart=False)


def coordinator_is_silent(facts: StallFacts) -> Stall | None:
    """Nothing is known, so nothing is done to the workers."""
    if not facts.answered and _silent_for_long(facts):
        return Stall("Unreachable", f"the coordinator does not answer for {_silence(facts):.0f} s", restart=False)
    return None


def first_step_is_late(facts: StallFacts) -> Stall | None:
    """The process group does not get going."""
    if not facts.answered or facts.running < facts.min_nodes or facts.progress.step_time > facts.since:
        return None
    waited = facts.now - max(facts.since, facts.coordinator_since)
    if waited > _startup(facts.policy):
        return Stall("Rendezvous", f"no step {waited:.0f} s after the start; starting over", restart=True)
    return None


def step_is_late(facts: StallFacts) -> Stall | None:
    """The process group stepped, and stopped stepping."""
    progress = facts.progress
    if (
        not facts.answered
        or progress.step_time <= facts.since
        or progress.activity in (Activity.FINISHED, Activity.STOPPED)
    ):
        return None
    limit = stall_after_seconds(facts.policy, progress.median_step_seconds)
    checkpointing = progress.activity is Activity.CHECKPOINTING
    if checkpointing:
        limit = max(limit, _CHECKPOINT_PATIENCE_SECONDS)
    waited = facts.now - max(progress.step_time, facts.coordinator_since)
    if waited <= limit:
        return None
    message = f"no step for {waited:.0f} s (limit {limit:.0f} s); starting over from the last checkpoint"
    if checkpointing:
        return Stall("Checkpointing", message, restart=True)
    return Stall("DataStarved" if progress.data_wait > 0.9 else "Collective", message, restart=True)


STALLED = (nodes_are_missing, coordinator_cannot_run, coordinator_is_silent, first_step_is_late, step_is_late)


def stalled(facts: StallFacts) -> Stall | None:
    """Why the run does not step, or None where it does or may still."""
    return next((found for rule in STALLED if (found := rule(facts))), None)


def stall_after_seconds(policy: RestartPolicy, median_step_seconds: float) -> float:
    """Seconds without a step that count as a stall."""
    if policy.stall_after == "auto":
        return max(60.0, 20.0 * median_step_seconds)
    return float(seconds(policy.stall_after))


def leaving_after_seconds(progress: Progress) -> float:
    """Seconds that nodes which were asked to save and leave may take. They agree at a step, then they save."""
    if progress.activity is Activity.CHECKPOINTING:
        return _CHECKPOINT_PATIENCE_SECONDS
    return max(300.0, 10.0 * progress.median_step_seconds)


def _silence(facts: StallFacts) -> float:
    return facts.now - max(facts.since, facts.coordinator_since, facts.progress.updated)


def _silent_for_long(facts: StallFacts) -> bool:
    return _silence(facts) > _startup(facts.policy)


def _startup(policy: RestartPolicy) -> float:
    return float(seconds(policy.startup_deadline))


# --- collapse ---------------------------------------------------------------------------------------------------------

_COLLAPSED_RANK, _COLLAPSED_IN_A_ROW = 1.5, 2
"""RankMe lies between 1 and the dimension (arXiv 2210.02885); features that are all alike have 1. Twice in a row, so
that one odd evaluation is none."""
_COLLAPSED_NATS = 0.01
"""The teacher's entropy is 0 where one prototype takes everything and ln(prototypes) where all are equal (arXiv
2104.14294, section 5.3). So near to either is only what has collapsed: logits of a fresh head deviate by 0.9 or more at
the usual temperatures, which takes 0.4 nats off ln(prototypes)."""


def collapse(progress: Progress | None, ranks: Sequence[float], prototypes: int) -> str | None:
    """What tells that the teacher has collapsed, in a sentence; empty where nothing does, None where nothing is known.

    `ranks` is RankMe of trained checkpoints, oldest first.
    """
    entropy = progress.teacher_entropy if progress else None
    newest = ranks[-_COLLAPSED_IN_A_ROW:]
    if len(newest) == _COLLAPSED_IN_A_ROW and max(newest) < _COLLAPSED_RANK:
        return (
            f"RankMe of the newest {len(newest)} checkpoints is below {_COLLAPSED_RANK}: their features are all alike"
        )
    if entropy is not None and entropy < _COLLAPSED_NATS:
        return f"the teacher's entropy is {entropy:.4f} nats: one prototype takes everything"
    if entropy is not None and abs(math.log(prototypes) - entropy) < _COLLAPSED_NATS:
        return f"the teacher's entropy is {entropy:.4f} nats, as if all {prototypes} prototypes were equal"
    return None if entropy is None and not ranks else ""


# --- early stopping ---------------------------------------------------------------------------------------------------


def no_gain(scores: Sequence[float | None], patience: int | None, *, highest: bool) -> bool:
    """Whether the last `patience` scored checkpoints in a row brought no better score. None does not count."""
    if not patience:
        return False
    best: float | None = None
    since = 0
    for score in scores:
        if score is None:
            continue
        if best is None or (score > best if highest else score < best):
            best, since = score, 0
        else:
            since += 1
    return since >= patience
