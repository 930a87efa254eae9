"""`sonoforge eval`: evaluate a checkpoint, or the floors of an evaluation set."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, get_args

import click
import structlog

from sonoforge_trainer import termination
from sonoforge_trainer.checkpoint import DamagedCheckpointError
from sonoforge_trainer.contract import (
    COMMIT,
    ContractError,
    EvalSuiteSpec,
    Evaluation,
    EvaluationRequest,
    ExitCode,
    Protocol,
    Score,
    Termination,
    canonical_json,
    is_validation_score,
    read_suite,
    selection_score,
)
from sonoforge_trainer.evaluate.errors import EvaluationDataError
from sonoforge_trainer.shards.options import as_uri
from sonoforge_trainer.storage import Storage

_HEADLINES = ("balanced_accuracy", "f1_macro", "dice_foreground", "rankme", "accuracy", "auroc_macro")
"""Metrics that are never left out of a termination message; neither are the scores that they are selected by."""
_DIGITS = 6


@click.command("eval", short_help="Evaluate a checkpoint.")
@click.argument("checkpoint_uri", required=False)
@click.option("--request", "request_file", type=click.File("r"), help="EvaluationRequest as JSON; - is standard input.")
@click.option("--shards", help="URI of the evaluation set's shards.json.")
@click.option("--name", default="eval", show_default=True, help="Name of the evaluation.")
@click.option("--protocols", default="knn,linear,logreg,health", show_default=True, help="Protocols, with commas.")
@click.option("--label", default="label", show_default=True, help="Field that holds the class.")
@click.option("--where", multiple=True, help="FIELD=VALUE; use only these samples.")
@click.option("--resolution", type=int, help="Side of the input in pixels. Default: the model card's.")
@click.option(
    "--suite",
    "suite_file",
    type=click.File("r"),
    help="EvalSuite as YAML: all its evaluations, for the checkpoint and for each of its baselines.",
)
@click.option(
    "--floors", "only_floors", is_flag=True, help="Score raw pixels and other floors instead of a checkpoint."
)
@click.option(
    "--best-by",
    help="Score that checkpoints are compared by: never left out where the termination message is too long.",
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]), help="Device.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: all CPUs, or OMP_NUM_THREADS.")
def command(
    checkpoint_uri: str | None,
    request_file: Any,
    shards: str | None,
    name: str,
    protocols: str,
    label: str,
    where: tuple[str, ...],
    resolution: int | None,
    suite_file: Any,
    only_floors: bool,
    best_by: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Evaluate the checkpoint at CHECKPOINT_URI (the prefix that holds its COMMIT), or answer a --request.

    A --suite is the whole comparison: the checkpoint and every baseline, on every data set of the suite.

    The result is kept beside the checkpoint below eval/, and one that is there already is not made again. Scores are
    printed as JSON.

    Example: sonoforge eval file:///runs/a/step-0000001000/attempt-0 --shards file:///sets/planes/shards.json
    """
    signal.signal(signal.SIGTERM, _terminate)
    # stdout is for results. The stream is looked up for every line, because whoever calls may have replaced it.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    with _explained():
        storage = Storage.from_env()
        if suite_file is not None:
            if not checkpoint_uri or request_file is not None or shards or only_floors:
                raise ContractError("give --suite with a CHECKPOINT_URI, and without --request, --shards or --floors")
            suite = read_suite(suite_file.read(), where=suite_file.name)
            _limit_threads(threads)
            _suite(suite, checkpoint_uri, storage, device)
            return
        if request_file is not None:
            if checkpoint_uri or shards:
                raise ContractError("give either --request, or CHECKPOINT_URI with --shards")
            request = EvaluationRequest.from_json(request_file.read(), where="request")
            evaluation = request.evaluation
        else:
            evaluation = _evaluation(name, shards, protocols, label, where, resolution)
            uri = as_uri(checkpoint_uri) if checkpoint_uri else ""
        _limit_threads(threads)
        if only_floors:
            from sonoforge_trainer.evaluate.floors import floors

            scores = floors(evaluation, storage)
        else:
            from sonoforge_trainer.evaluate.run import evaluate

            if request_file is None:
                if not uri:
                    raise ContractError("give a CHECKPOINT_URI, a --request, or --floors")
                digest = _digest(uri, storage)
                request = EvaluationRequest(checkpoint_uri=uri, checkpoint_digest=digest, evaluation=evaluation)
            scores = evaluate(request, storage, _device(device)).scores
        termination.write(succeeded(scores, best_by.removeprefix(f"{evaluation.name}-") if best_by else None))
        click.echo(json.dumps({n: _rounded(s, intervals=True) for n, s in scores.items()}, indent=1, sort_keys=True))


def _suite(suite: EvalSuiteSpec, checkpoint: str, storage: Storage, device: str) -> None:
    """Run a suite; scores go to stdout as JSON by model, what each model cost to stderr."""
    from sonoforge_trainer.evaluate.suite import run_suite, tallies

    uri = as_uri(checkpoint)
    entries = run_suite(suite, uri, _digest(uri, storage), storage, _device(device))
    scores: dict[str, dict[str, object]] = {}
    for entry in entries:
        if entry.result is not None:
            named = {f"{entry.request.evaluation.name}-{n}": s for n, s in entry.result.scores.items()}
            scores.setdefault(entry.model, {}).update({n: _rounded(s, intervals=True) for n, s in named.items()})
    costs = tallies(entries)
    for cost in costs:
        click.echo(str(cost), err=True)
    passes = {cost.model: cost.passes for cost in costs}
    click.echo(json.dumps({"scores": scores, "featurePasses": passes}, indent=1, sort_keys=True))
    faults = [f"{entry.model}, {entry.request.evaluation.name}: {entry.fault}" for entry in entries if entry.fault]
    if faults:
        raise EvaluationDataError("\n".join([f"{len(faults)} of {len(entries)} evaluations failed", *faults]))
    termination.write(Termination(cause="done"))


def _digest(uri: str, storage: Storage) -> str:
    """Digest of the manifest of the checkpoint at a prefix."""
    return storage.read(f"{uri}/{COMMIT}").decode("ascii", "replace").strip()


def succeeded(scores: Mapping[str, Score], best_by: str | None = None) -> Termination:
    """The termination message of an evaluation, as many of the scores as fit into it. The result object has all.

    Intervals are left out first, then validation scores, then test scores. Never left out are `best_by` and the
    headline metrics of each protocol, each with its validation counterpart: by those checkpoints are compared.
    """
    with_intervals: dict[str, object] = {name: _rounded(score, intervals=True) for name, score in scores.items()}
    if _bytes(with_intervals) <= termination.MAX_BYTES:
        return Termination(cause="done", result=with_intervals)
    kept = {name for name in scores if name.rpartition("/")[2] in _HEADLINES}
    kept |= {best_by} if best_by else set()
    kept |= {selection_score(name) for name in kept}
    shown: dict[str, object] = {}
    room = termination.MAX_BYTES - _bytes({})
    for name in sorted(scores, key=lambda name: (name not in kept, is_validation_score(name))):
        entry = _rounded(scores[name], intervals=False)
        room -= len(canonical_json({name: entry}).encode()) - 1  # its braces are not there, a comma is
        if room < 0:
            assert name not in kept, "the headline metrics of eight protocols fit into a termination message twice"
            break
        shown[name] = entry
    return Termination(cause="done", result=shown)


def _bytes(result: dict[str, object]) -> int:
    """Size of the termination message with this result."""
    return len(Termination(cause="done", result=result).to_json().encode())


def _rounded(score: Score, *, intervals: bool) -> dict[str, float]:
    kept = {"value", "low", "high", "deviation"} if intervals else {"value"}
    return {name: round(v, _DIGITS) for name, v in score.document().items() if name in kept and v is not None}


def _evaluation(
    name: str, shards: str | None, protocols: str, label: str, where: tuple[str, ...], resolution: int | None
) -> Evaluation:
    if shards is None:
        raise ContractError("--shards: required without --request; give the URI of the set's shards.json")
    pairs = [pair.partition("=") for pair in where]
    if not all(equals and field for field, equals, _ in pairs):
        raise ContractError("--where: give FIELD=VALUE")
    wanted = [p.strip() for p in protocols.split(",") if p.strip()]
    unknown = sorted(set(wanted) - set(get_args(Protocol)))
    if unknown:
        raise ContractError(f"--protocols: found {', '.join(unknown)}. Allowed: {', '.join(get_args(Protocol))}")
    document = {
        "name": name,
        "shards": shards,
        "protocols": wanted,
        "label": label,
        "where": {field: value for field, _, value in pairs},
        "resolution": resolution,
    }
    return Evaluation.parse(document)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _limit_threads(threads: int | None) -> None:
    """Limit torch and the BLAS of numpy and scikit-learn, which read the environment when they are first loaded."""
    if threads is not None:
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = str(threads)
        import torch

        torch.set_num_threads(threads)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Nothing needs saving: what is done is in storage, and the next process goes on from it."""
    raise SystemExit(int(ExitCode.TERMINATED))


@contextmanager
def _explained() -> Iterator[None]:
    """Faults become a termination message, one line on standard error, and an exit code."""
    try:
        yield
    except SystemExit as stop:
        said = termination.classify(stop)
        termination.write(said)
        raise
    except Exception as error:
        said = termination.classify(error)
        if isinstance(error, DamagedCheckpointError):
            said = said.model_copy(update={"cause": "data"})
        termination.write(said)
        code = termination.exit_code(said)
        if code is ExitCode.FAILED:
            raise
        click.echo(f"Error: {said.message}", err=True)
        sys.exit(int(code))
