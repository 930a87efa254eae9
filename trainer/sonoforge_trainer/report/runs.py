"""A run as the page sees it: from the summary of `sonoforge run`, or from what its checkpoints left in storage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from sonoforge_trainer.checkpoint.errors import DamagedCheckpointError
from sonoforge_trainer.checkpoint.store import PRUNED, CheckpointStore, Prefix
from sonoforge_trainer.contract import (
    METRICS,
    CheckpointRef,
    CheckpointSummary,
    ContractError,
    EvaluationResult,
    RunEvent,
    RunSummary,
    Score,
    is_validation_score,
    selection_score,
    split_score,
)
from sonoforge_trainer.storage import ObjectInfo, ObjectNotFoundError, Storage, StorageError

SUMMARY = "summary.json"
"""Name of the summary, in the state folder of `sonoforge run` and beside the checkpoints."""

BASELINES = "baselines"
"""Folder beside the checkpoints where results of a suite's baselines are kept."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Measured:
    """One complete result, and where it was read."""

    result: EvaluationResult
    """What was found."""
    folder: str
    """URI of the folder of the result. It is not the one that the result names where a run was copied or moved."""

    @property
    def evaluation(self) -> str:
        """Name of the evaluation."""
        return self.result.request.evaluation.name

    @property
    def scores(self) -> dict[str, Score]:
        """Its scores by EVALUATION-PROTOCOL/METRIC."""
        return {f"{self.evaluation}-{name}": score for name, score in self.result.scores.items()}

    def beside(self, name: str) -> str:
        """URI of one of the result's documents or pictures."""
        return f"{self.folder}/{name}"


@dataclass(frozen=True)
class Evaluated(Measured):
    """One complete result of a checkpoint."""

    checkpoint: CheckpointSummary
    """What was evaluated."""


@dataclass(frozen=True)
class Run:
    """One run with everything that could be read of it."""

    summary: RunSummary
    """What it came to."""
    records: Sequence[dict[str, Any]]
    """Metric records, each step once, in order."""
    results: Sequence[Evaluated]
    """The complete results, in the order of the checkpoints."""
    baselines: Sequence[tuple[str, Measured]] = ()
    """(name, result) of the baselines that were measured for the run."""

    @property
    def name(self) -> str:
        """The job's name."""
        return self.summary.job

    def results_of(self, checkpoint: CheckpointSummary | None) -> dict[str, Evaluated]:
        """Results of one checkpoint by evaluation."""
        if checkpoint is None:
            return {}
        return {one.evaluation: one for one in self.results if one.checkpoint.ref.id == checkpoint.ref.id}


def read_run(summary: RunSummary, storage: Storage) -> Run:
    """Read the logs and results that a summary names. What cannot be read is left out and named in the log."""
    try:
        baselines = baseline_results(summary.checkpoints_uri, storage)
    except StorageError as error:
        log.warning("report.baselines_missing", reason=type(error).__name__)
        baselines = []
    return Run(summary, metric_records(summary, storage), evaluation_results(summary, storage), baselines)


def open_run(where: str, storage: Storage, *, best_by: str | None = None) -> RunSummary:
    """The run at a summary.json, in a state folder, or below the URI or folder of its checkpoints.

    `best_by` marks the best checkpoint where no summary says which it is. Raises ContractError where nothing is found.
    """
    if "://" in where:
        return survey(where, storage, best_by=best_by)
    path = Path(where)
    file = path / SUMMARY if path.is_dir() else path
    if file.is_file():
        return RunSummary.from_json(file.read_bytes(), where=str(file))
    if not path.is_dir():
        raise ContractError(f"{where}: no such file or folder. Allowed: a state folder, a summary.json, or a URI")
    return survey(path.resolve().as_uri(), storage, best_by=best_by)


def survey(uri: str, storage: Storage, *, best_by: str | None = None) -> RunSummary:
    """A run from what lies below the URI of its checkpoints: one LIST and small reads; nothing is written.

    A summary beside the checkpoints adds what storage does not say: events, floors, phase and configuration. Raises
    ContractError where there is no checkpoint.
    """
    uri = uri.rstrip("/")
    store = CheckpointStore(storage, uri)
    found = [one for prefix in store.prefixes() if (one := _looked_at(store, prefix)) is not None]
    if not found:
        raise ContractError(f"{uri}: no checkpoint is committed below it. Give the URI of a run's checkpoints")
    newest = {one.ref.step: one for one in sorted(found, key=lambda one: one.ref.created)}
    seen = [newest[step] for step in sorted(newest)]
    written = _written_summary(uri, storage)
    known = {c.ref.id: c for c in written.checkpoints} if written else {}
    checkpoints = tuple(_with_results(one, known.get(one.ref.id), storage) for one in seen)
    measured = baseline_results(uri, storage)
    floors = {
        f"{name}:{score}": value
        for name, one in measured
        for score, value in one.scores.items()
        if not is_validation_score(score)
    }
    if written is not None:
        again = {(name, one.evaluation) for name, one in measured}
        floors = {key: score for key, score in written.floors.items() if _floor_of(key) not in again} | floors
        return written.model_copy(update={"checkpoints": checkpoints, "checkpoints_uri": uri, "floors": floors})
    return RunSummary(
        job=seen[-1].job or uri.rpartition("/")[2],
        uid=seen[-1].uid or uri,
        phase="As found in storage",
        checkpoints_uri=uri,
        best_by=best_by,
        checkpoints=_marked(checkpoints, best_by),
        floors=floors,
        events=tuple(_new_groups(seen)),
        started=_unix(seen[0].ref.created),
    )


def metric_records(summary: RunSummary, storage: Storage) -> list[dict[str, Any]]:
    """Every metric record that was committed with a checkpoint, in order of steps, each step once.

    Retention deletes states and manifests, and leaves the logs.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for checkpoint in summary.checkpoints:
        try:
            text = storage.read(f"{checkpoint.ref.uri}/{METRICS}")
        except StorageError as error:
            log.warning("report.metrics_missing", checkpoint=checkpoint.ref.id, reason=type(error).__name__)
            continue
        try:
            by_step |= {record["step"]: record for record in map(json.loads, text.splitlines())}
        except (ValueError, KeyError, TypeError) as error:
            log.warning("report.metrics_unreadable", checkpoint=checkpoint.ref.id, reason=type(error).__name__)
    return [by_step[step] for step in sorted(by_step)]


def evaluation_results(summary: RunSummary, storage: Storage) -> list[Evaluated]:
    """The complete result of every evaluation that succeeded; the newest where its options were changed."""
    found: dict[tuple[str, str], Evaluated] = {}
    for checkpoint in summary.checkpoints:
        for uri in checkpoint.results:
            result = _result(uri, storage)
            if result is not None:
                one = Evaluated(result, uri.rpartition("/")[0], checkpoint)
                found[checkpoint.ref.id, one.evaluation] = one
    return list(found.values())


def baseline_results(checkpoints_uri: str, storage: Storage) -> list[tuple[str, Measured]]:
    """(name, result) of every baseline that is kept beside a run's checkpoints, the newest of each evaluation.

    Raises StorageError.
    """
    found: dict[tuple[str, str], Measured] = {}
    objects = {info.uri: info for info in storage.list(f"{checkpoints_uri.rstrip('/')}/{BASELINES}/")}
    for uri in _oldest_first(objects):
        folder = uri.rpartition("/")[0]
        if folder.endswith("/eval") and uri.endswith(".json"):
            result = _result(uri, storage)
            if result is not None and result.request.baseline is not None:
                one = Measured(result, folder)
                found[result.request.baseline.name, one.evaluation] = one
    return [(name, found[name, evaluation]) for name, evaluation in sorted(found)]


@dataclass(frozen=True)
class _Seen:
    """A checkpoint as storage shows it."""

    ref: CheckpointRef
    results: tuple[str, ...]
    attempt: str
    job: str = ""
    uid: str = ""
    world_size: int = 0


def _looked_at(store: CheckpointStore, prefix: Prefix) -> _Seen | None:
    results = tuple(f"{prefix.uri}/{name}" for name in _oldest_first(prefix.objects) if _names_a_result(name))
    try:
        if PRUNED in prefix.objects:
            ref = CheckpointRef.from_json(store.storage.read(f"{prefix.uri}/{PRUNED}"), where=prefix.uri)
            # Where it lies counts, not what it says of itself: a run may have been copied.
            return _Seen(ref.model_copy(update={"uri": prefix.uri}), results, prefix.attempt)
        if not prefix.committed:
            return None
        ref, manifest = store.inspect(prefix)
    except (DamagedCheckpointError, ContractError, StorageError) as error:
        log.warning("report.checkpoint_unreadable", uri=prefix.uri, reason=type(error).__name__)
        return None
    return _Seen(ref, results, manifest.attempt, manifest.job, manifest.uid, manifest.world_size)


def _oldest_first(objects: Mapping[str, ObjectInfo]) -> list[str]:
    # An evaluation that was asked again with other options leaves two results of its name: the newer one counts.
    return sorted(objects, key=lambda name: (objects[name].modified, name))


def _names_a_result(name: str) -> bool:
    # What an evaluation leaves beside its result, evidence.json for one, lies a folder deeper.
    return name.startswith("eval/") and name.endswith(".json") and name.count("/") == 1


def _written_summary(uri: str, storage: Storage) -> RunSummary | None:
    try:
        return RunSummary.from_json(storage.read(f"{uri}/{SUMMARY}"), where=f"{uri}/{SUMMARY}")
    except ObjectNotFoundError:
        return None
    except ContractError as error:
        log.warning("report.summary_unreadable", uri=uri, reason=type(error).__name__)
        return None


def _result(uri: str, storage: Storage) -> EvaluationResult | None:
    try:
        return EvaluationResult.from_json(storage.read(uri), where=uri)
    except (StorageError, ContractError) as error:
        log.warning("report.result_missing", uri=uri, reason=type(error).__name__)
        return None


def _with_results(seen: _Seen, known: CheckpointSummary | None, storage: Storage) -> CheckpointSummary:
    if known is not None and _names(known.results) >= _names(seen.results):
        return known.model_copy(update={"ref": seen.ref, "results": seen.results})
    results = {r.request.evaluation.name: r for uri in seen.results if (r := _result(uri, storage)) is not None}
    kept = {} if known is None else known.scores
    scores = {name: score for name, score in kept.items() if split_score(name)[0] not in results}
    for evaluation, result in results.items():
        scores |= {f"{evaluation}-{name}": score for name, score in result.scores.items()}
    base = known or CheckpointSummary(ref=seen.ref)
    return base.model_copy(update={"ref": seen.ref, "scores": scores, "results": seen.results})


def _floor_of(key: str) -> tuple[str, str]:
    """(baseline, evaluation) of a floor's score, as a summary names it."""
    name, _, score = key.partition(":")
    return name, split_score(score)[0]


def _names(uris: Iterable[str]) -> set[str]:
    return {uri.rpartition("/")[2] for uri in uris}


def _marked(checkpoints: Sequence[CheckpointSummary], best_by: str | None) -> tuple[CheckpointSummary, ...]:
    """The checkpoints with the best one marked, compared on validation."""
    if best_by is None:
        return tuple(checkpoints)
    if is_validation_score(best_by):
        raise ContractError(f"bestBy: found {best_by!r}. Allowed: the score itself; its validation counterpart decides")
    decides = selection_score(best_by)
    values = {c.ref.id: c.scores[decides].value for c in checkpoints if decides in c.scores}
    if not values:
        known = sorted({n for c in checkpoints for n in c.scores if not is_validation_score(n)})
        raise ContractError(
            f"bestBy: found {best_by!r}, which no checkpoint has. Allowed: {', '.join(known) or 'none'}"
        )
    best = max(values, key=lambda name: values[name])
    return tuple(c.model_copy(update={"best": c.ref.id == best}) for c in checkpoints)


def _new_groups(seen: Iterable[_Seen]) -> list[RunEvent]:
    """Each checkpoint that another process group wrote than the one before: a restart, a resize or a resumption."""
    events, before = [], None
    for one in seen:
        if before is not None and one.attempt != before.attempt:
            processes = f" of {one.world_size} processes" if one.world_size else ""
            events.append(
                RunEvent(
                    time=_unix(one.ref.created),
                    reason="NewProcessGroup",
                    message=f"a new process group{processes} went on after step {before.ref.step}",
                    step=before.ref.step,
                    world_size=one.world_size,
                )
            )
        before = one
    return events


def _unix(created: str) -> float:
    try:
        return datetime.fromisoformat(created).timestamp()
    except ValueError:
        return 0.0
