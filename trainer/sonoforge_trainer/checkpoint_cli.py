"""`sonoforge checkpoints`: list, verify and prune the checkpoints below a URI."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click
import structlog

from sonoforge_trainer import termination
from sonoforge_trainer.checkpoint.errors import DamagedCheckpointError
from sonoforge_trainer.checkpoint.pruning import prune as prune_checkpoints
from sonoforge_trainer.checkpoint.store import PRUNED, CheckpointStore, Prefix
from sonoforge_trainer.contract import COMMIT, QUARANTINE, CheckpointRef, ExitCode, Termination
from sonoforge_trainer.storage import Storage, StorageError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _explained(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Faults become one line and an exit code that says whether trying again may help."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (StorageError, DamagedCheckpointError, ValueError) as error:
            click.echo(f"Error: {error}", err=True)
            if isinstance(error, DamagedCheckpointError):
                code = ExitCode.DATA
            else:
                code = ExitCode.STORAGE if isinstance(error, StorageError) else ExitCode.CONFIG
            raise SystemExit(int(code)) from None

    return wrapper


@click.group()
def command() -> None:
    """List, verify and prune the checkpoints of a run. URI is its checkpoints.uri (s3:// or file://)."""
    # stdout is for results. The stream is looked up for every line, because whoever calls may have replaced it.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))


@command.command("list")
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--known", multiple=True, help="Leave out the committed checkpoint with this id.")
@_explained
def list_checkpoints(uri: str, as_json: bool, known: tuple[str, ...]) -> None:
    """List what is below URI, by step: committed, damaged, quarantined, pruned and uncommitted.

    Where a termination message is asked for, it holds the oldest of the committed ones, as many as fit. Who knows those
    asks for the next ones with --known.
    """
    store = CheckpointStore(Storage.from_env(), uri)
    refs = {ref.uri: ref for ref in store.committed()}
    left_out = set(known)
    termination.write(_as_many_as_fit([ref for ref in refs.values() if ref.id not in left_out]))
    for prefix in store.prefixes():
        state, ref = _state(prefix, refs), refs.get(prefix.uri)
        if ref and ref.id in left_out:
            continue
        if as_json:
            document = {"state": state, "uri": prefix.uri, "step": prefix.step}
            click.echo(json.dumps(document | ({"id": ref.id, **ref.document()} if ref else {}), sort_keys=True))
        elif ref:
            size = sum(info.size for info in prefix.objects.values())
            click.echo(f"{ref.id}  {state:<11} {ref.created}  {ref.samples:>12,} images  {size / 2**20:>10,.1f} MiB")
        else:
            click.echo(f"step-{prefix.step:010d}{'':<13}  {state:<11} attempt {prefix.attempt}")


def _as_many_as_fit(refs: list[CheckpointRef]) -> Termination:
    """A message with the first of these checkpoints."""
    said = Termination(cause="done", result={"checkpoints": []})
    for count in range(1, len(refs) + 1):
        longer = said.model_copy(update={"result": {"checkpoints": [ref.document() for ref in refs[:count]]}})
        if len(longer.to_json().encode()) > termination.MAX_BYTES:
            break
        said = longer
    return said


def _state(prefix: Prefix, refs: dict[str, CheckpointRef]) -> str:
    if QUARANTINE in prefix.objects:
        return "quarantined"
    if PRUNED in prefix.objects:
        return "pruned"
    if COMMIT not in prefix.objects:
        return "uncommitted"
    return "committed" if prefix.uri in refs else "damaged"


@command.command()
@click.argument("uri")
@click.option("--id", "ids", multiple=True, help="Verify only these; all where none is given.")
@click.option("--quarantine", is_flag=True, help="Mark the damaged ones, so that nothing resumes from them.")
@_explained
def verify(uri: str, ids: tuple[str, ...], quarantine: bool) -> None:
    """Read every object and compare its digest. Ends with code 65 where a checkpoint is damaged."""
    store = CheckpointStore(Storage.from_env(), uri)
    damaged = 0
    refs = [store.find(checkpoint_id) for checkpoint_id in ids]
    for prefix in store.prefixes():
        if not prefix.committed or (ids and prefix.uri not in {ref.uri for ref in refs}):
            continue
        try:
            ref, _ = store.inspect(prefix)
            store.verify(ref)
        except DamagedCheckpointError as error:
            damaged += 1
            click.echo(f"{prefix.uri}  damaged: {error.reason}")
            if quarantine:
                store.quarantine(prefix.uri, error.reason)
        else:
            click.echo(f"{ref.id}  sound")
    if damaged:
        raise SystemExit(int(ExitCode.DATA))


@command.command()
@click.argument("uri")
@click.option("--keep", multiple=True, help="Keep these; delete all others that are older than the newest of them.")
@click.option("--delete", multiple=True, help="Delete these.")
@_explained
def prune(uri: str, keep: tuple[str, ...], delete: tuple[str, ...]) -> None:
    """Delete the state of checkpoints, after a full read of a newer one that stays.

    Scores (eval/), logs and model cards stay. Also finishes what an interrupted prune began, and removes prefixes
    without a COMMIT that were given up more than 24 hours ago.
    """
    store = CheckpointStore(Storage.from_env(), uri)
    pruned = prune_checkpoints(store, now=time.time(), keep=keep or None, delete=delete or None)
    if pruned.verified:
        click.echo(f"{pruned.verified}  verified")
    for checkpoint_id in pruned.deleted:
        click.echo(f"{checkpoint_id}  deleted")
    for swept in pruned.swept:
        click.echo(f"{swept}  swept")
