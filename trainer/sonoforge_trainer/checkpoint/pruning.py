"""Deleting the state of checkpoints that a plan no longer keeps, and what killed writers left behind.

Only the state goes: the parts, the teacher, its features that evaluations kept, the manifest and COMMIT. The model
card, the logs and everything below `eval/` stay, because the record of a run and its scores outlive the checkpoints
they speak of. A PRUNED object is written first and holds the checkpoint's reference, so that a prune that is killed
half-way can be finished by the next.

Multipart uploads that a killed writer left open are invisible here; a lifecycle rule of the bucket removes those.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import structlog

from sonoforge_trainer.checkpoint.errors import DamagedCheckpointError, UnknownCheckpointError
from sonoforge_trainer.checkpoint.store import PRUNED, CheckpointStore, Prefix
from sonoforge_trainer.contract import COMMIT, FEATURES, MANIFEST, QUARANTINE, TEACHER, CheckpointRef, parse_prefix

SWEEP_AFTER_SECONDS = 24 * 3600.0
"""How long an uncommitted prefix must have been given up before it is removed."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What a prune did."""

    verified: str | None
    """The checkpoint whose full read allowed the deletions; None where there was nothing to delete."""
    deleted: tuple[str, ...]
    """Ids of the checkpoints whose state was deleted, or what an earlier prune had left of it."""
    swept: tuple[str, ...]
    """URIs of uncommitted prefixes that were removed."""


def prune(
    store: CheckpointStore,
    *,
    now: float,
    delete: Collection[str] | None = None,
    keep: Collection[str] | None = None,
) -> Pruned:
    """Delete the checkpoints with these ids, or all that are older than the newest of `keep` and not in it.

    Give one of the two; neither only finishes what was begun and sweeps. Nothing is deleted before a newer checkpoint
    that stays was read in full; one that turns out damaged is quarantined, and the next newest is tried. Doing it
    twice, or again after being killed, changes nothing more. `now` is Unix time.

    Raises UnknownCheckpointError for an id that never existed, ValueError for a plan that would delete the newest, and
    DamagedCheckpointError where no newer sound one exists.
    """
    if delete is not None and keep is not None:
        raise ValueError("give the checkpoints to delete or the ones to keep, not both")
    committed = store.committed()
    doomed = _doomed(committed, {ref.id for ref in _pruned(store)}, delete, keep)
    verified = _verify_newer(store, committed, doomed) if doomed else None
    for ref in doomed:
        store.storage.write(f"{ref.uri}/{PRUNED}", ref.to_json().encode())
    prefixes = {prefix.uri: prefix for prefix in store.prefixes()}
    deleted = []
    for ref in _pruned(store):
        if leftover := _state_objects(prefixes[ref.uri]):
            for name in leftover:
                store.storage.delete(f"{ref.uri}/{name}")
            deleted.append(ref.id)
            _log.info("checkpoint pruned", id=ref.id)
    swept = _sweep(store, now)
    return Pruned(verified.id if verified else None, tuple(deleted), swept)


def _doomed(
    committed: list[CheckpointRef],
    pruned_ids: Collection[str],
    delete: Collection[str] | None,
    keep: Collection[str] | None,
) -> list[CheckpointRef]:
    """The committed checkpoints to delete, oldest first."""
    ids = {ref.id for ref in committed}
    unknown = sorted(set(delete or ()) - ids - set(pruned_ids)) or sorted(set(keep or ()) - ids)
    if unknown:
        raise UnknownCheckpointError(
            f"no checkpoint {', '.join(unknown)}; committed: {', '.join(sorted(ids)) or 'none'}"
        )
    if delete is not None:
        return [ref for ref in committed if ref.id in delete]
    if not keep:
        return []
    newest_kept = max(index for index, ref in enumerate(committed) if ref.id in keep)
    return [ref for ref in committed[:newest_kept] if ref.id not in keep]


def _verify_newer(store: CheckpointStore, committed: list[CheckpointRef], doomed: list[CheckpointRef]) -> CheckpointRef:
    """Read the newest checkpoint that stays, which must be newer than all that go."""
    newest_doomed = committed.index(doomed[-1])
    newer = committed[newest_doomed + 1 :]
    if not newer:
        raise ValueError(f"{doomed[-1].id} is the newest checkpoint; it is deleted only after a newer one is committed")
    for ref in reversed(newer):
        try:
            store.verify(ref)
        except DamagedCheckpointError as error:
            store.quarantine(error.uri, error.reason)
            continue
        return ref
    raise DamagedCheckpointError(newer[-1].uri, "so is every other that is newer than those to delete; all were kept")


def _state_objects(prefix: Prefix) -> list[str]:
    """What a prune deletes, in order: COMMIT, so that it stops existing, the manifest, then the parts and features."""
    parts = [name for name in sorted(prefix.objects) if name.startswith(("state-", FEATURES)) or name == TEACHER]
    return [name for name in (COMMIT, MANIFEST) if name in prefix.objects] + parts


def _sweep(store: CheckpointStore, now: float) -> tuple[str, ...]:
    """Remove the uncommitted prefixes that were given up long ago.

    A process group has one upload in flight at a time, so a prefix was given up at the latest when its group, or a
    group that replaced it (attempts sort by time), committed another step. That moment must be a day ago. Nothing here
    depends on what a server says about times of objects.
    """
    commits = [
        (place, datetime.fromisoformat(ref.created).timestamp())
        for ref in store.committed() + _pruned(store)
        if (place := parse_prefix(ref.uri))
    ]
    swept = []
    for prefix in store.prefixes():
        if prefix.objects.keys() & {COMMIT, PRUNED, QUARANTINE}:
            continue
        given_up = [
            created
            for (step, attempt), created in commits
            if attempt > prefix.attempt or (attempt == prefix.attempt and step > prefix.step)
        ]
        if not given_up or now - min(given_up) < SWEEP_AFTER_SECONDS:
            continue
        for name in sorted(prefix.objects):
            store.storage.delete(f"{prefix.uri}/{name}")
        swept.append(prefix.uri)
        _log.info("uncommitted checkpoint swept", uri=prefix.uri)
    return tuple(swept)


def _pruned(store: CheckpointStore) -> list[CheckpointRef]:
    """The references of the checkpoints that were pruned, or whose pruning was begun."""
    return [
        CheckpointRef.from_json(store.storage.read(f"{prefix.uri}/{PRUNED}")).model_copy(update={"uri": prefix.uri})
        for prefix in store.prefixes()
        if PRUNED in prefix.objects
    ]
