"""What keeps storage and status in step: retention while a job runs, and the listing at its end."""

from __future__ import annotations

from collections.abc import Iterable

from sonoforge_operator import rules
from sonoforge_operator.children import inventory_name, inventory_wanted, retention_name
from sonoforge_operator.observed import Event
from sonoforge_operator.retention import prunable
from sonoforge_operator.scoring import checkpoint_status
from sonoforge_operator.status import Tries
from sonoforge_operator.turn import Turn
from sonoforge_trainer.contract import CheckpointRef, ContractError

_RETRIES = 2


def add_checkpoints(at: Turn, refs: Iterable[CheckpointRef]) -> Turn:
    """Take over checkpoints that are not known yet."""
    known = {c.ref.id for c in at.status.checkpoints}
    fresh = [ref for ref in refs if ref.id not in known]
    if not fresh:
        return at
    added = tuple(checkpoint_status(ref, at.job) for ref in fresh)
    checkpoints = tuple(sorted(at.status.checkpoints + added, key=lambda c: (c.ref.step, c.ref.created)))
    events = [Event("CheckpointCommitted", f"step {ref.step}, {ref.samples} samples: {ref.id}") for ref in fresh]
    return at.update(*events, checkpoints=checkpoints)


def take_inventory(at: Turn) -> Turn:
    """Add the checkpoints that storage holds and nobody lived to report, until a listing finds no more."""
    fact = at.observed.children.get(inventory_name(at.status))
    failure = rules.end_of(fact, at.now, at.startup_deadline) if fact else None
    if not inventory_wanted(at.status, at.observed) or fact is None or failure is None:
        return at
    said = fact.termination
    refs = None
    if fact.exit_code in (0, None) and said and said.result is not None:
        refs = _refs(said.result)
    if refs is None:
        tries, again = rules.tried(at.status.inventory, failure, _RETRIES)
        at = at.update(inventory=tries)
        message = "storage could not be listed; a checkpoint that nobody reported may be without scores"
        return at if again else at.update(Event("InventoryFailed", message, warning=True), listed=True)
    before = len(at.status.checkpoints)
    at = add_checkpoints(at, refs)
    if len(at.status.checkpoints) == before:
        return at.update(listed=True)
    return at.update(inventories=at.status.inventories + 1)


def retire_checkpoints(at: Turn) -> Turn:
    """Mark what a finished retention process deleted, and begin with what can be deleted next."""
    prune = _prunable(at)
    if at.status.pruning and not set(at.status.pruning) <= set(prune):
        at = at.update(pruning=(), retention=Tries())  # the policy changed: some of it is to be kept
    if not at.status.pruning:
        begin = bool(prune) and prune != at.status.retention_left
        return at.update(pruning=prune) if begin else at
    fact = at.observed.children.get(retention_name(at.status))
    failure = rules.end_of(fact, at.now, at.startup_deadline) if fact else None
    if fact is None or failure is None:
        return at
    if fact.exit_code == 0:
        checkpoints = tuple(
            c.model_copy(update={"pruned": True}) if c.ref.id in at.status.pruning else c for c in at.status.checkpoints
        )
        event = Event("CheckpointsDeleted", ", ".join(at.status.pruning))
        return at.update(event, checkpoints=checkpoints, pruning=(), retention=Tries(), retention_left=())
    tries, again = rules.tried(at.status.retention, failure, _RETRIES)
    if again:
        return at.update(retention=tries)
    message = f"{len(at.status.pruning)} old checkpoints could not be deleted and are left; see the log of {fact.name}"
    event = Event("RetentionFailed", message, warning=True)
    return at.update(event, pruning=(), retention=Tries(), retention_left=at.status.pruning)


def _prunable(at: Turn) -> tuple[str, ...]:
    # Nothing of a damaged checkpoint is deleted, and it takes the place of no sound one.
    return prunable(
        at.status.sound,
        at.spec.checkpoints,
        at.spec.evaluation.best_by,
        highest=at.spec.evaluation.best_is == "highest",
    )


def _refs(result: dict[str, object]) -> list[CheckpointRef] | None:
    found = result.get("checkpoints")
    if not isinstance(found, list):
        return None
    try:
        return [CheckpointRef.parse(entry) for entry in found]
    except ContractError:
        return None
