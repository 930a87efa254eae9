"""Reading the resources from files and from a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from sonoforge_operator.api.fields import NameRef
from sonoforge_operator.api.job import EvaluationPolicy, PretrainJob
from sonoforge_operator.api.runtime import PretrainRuntime, PretrainRuntimeSpec
from sonoforge_operator.api.suite import EvalSuite
from sonoforge_trainer.contract import (
    VALIDATION_PREFIX,
    Baseline,
    ContractError,
    Evaluation,
    Part,
    RunConfig,
    TrainConfig,
    is_validation_score,
    load_yaml_documents,
)


class JobFile(Part):
    """A PretrainJob together with the objects it names."""

    job: PretrainJob
    """The job."""
    runtime: PretrainRuntimeSpec = PretrainRuntimeSpec()
    """Its runtime."""
    evaluations: tuple[Evaluation, ...] = ()
    """The evaluations of its suite."""
    baselines: tuple[Baseline, ...] = ()
    """The models of its suite that checkpoints are compared with."""

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
    document = _known_metadata(document)
    if isinstance(document, Mapping) and isinstance(document.get("spec"), Mapping):
        training = document["spec"].get("training")
        if training is not None:
            resolved = TrainConfig.resolve(training, where=f"{where}.spec.training")
            document = {**document, "spec": {**document["spec"], "training": resolved.document()}}
    return PretrainJob.parse(document, where=where)


def parse_runtime(document: object, *, where: str = "PretrainRuntime") -> PretrainRuntime:
    """A PretrainRuntime from a plain document, of a file or of a cluster. Raises ContractError."""
    return PretrainRuntime.parse(_known_metadata(document), where=where)


def parse_suite(document: object, *, where: str = "EvalSuite") -> EvalSuite:
    """An EvalSuite from a plain document, of a file or of a cluster. Raises ContractError."""
    return EvalSuite.parse(_known_metadata(document), where=where)


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
    runtimes = [parse_runtime(d, where=f"{where}: PretrainRuntime") for d in by_kind.get("PretrainRuntime", [])]
    suites = [parse_suite(d, where=f"{where}: EvalSuite") for d in by_kind.get("EvalSuite", [])]
    runtime = _named(job.spec.runtime_ref, runtimes, f"{where}: PretrainJob.spec.runtimeRef.name")
    suite = _named(job.spec.evaluation.suite_ref, suites, f"{where}: PretrainJob.spec.evaluation.suiteRef.name")
    file = JobFile(
        job=job,
        runtime=runtime.spec if runtime else PretrainRuntimeSpec(),
        evaluations=suite.spec.evaluations if suite else (),
        baselines=suite.spec.baselines if suite else (),
    )
    check_best_by(job.spec.evaluation, file.evaluations, where=f"{where}: PretrainJob.spec.evaluation.bestBy")
    return file


def check_best_by(policy: EvaluationPolicy, evaluations: Iterable[Evaluation], *, where: str) -> None:
    """Refuse a score that no evaluation makes, and a validation score. Raises ContractError."""
    if policy.best_by is None:
        if policy.stop_after_no_gain:
            raise ContractError(f"{where}: required with stopAfterNoGain; name the score that decides")
        return
    if is_validation_score(policy.best_by):
        raise ContractError(
            f"{where}: found {policy.best_by!r}. Allowed: the score to show, without {VALIDATION_PREFIX!r} before its "
            "metric; checkpoints are compared on validation in any case"
        )
    known = {f"{e.name}-{p}": e.metrics(p) for e in evaluations for p in e.protocols}
    scorer, _, metric = policy.best_by.partition("/")
    if scorer not in known:
        allowed = f"one of {', '.join(sorted(known)) or '(no suite)'}, with /METRIC"
    elif metric not in known[scorer]:
        allowed = f"{scorer}/ with one of {', '.join(known[scorer])}"
    else:
        return
    raise ContractError(f"{where}: found {policy.best_by!r}. Allowed: {allowed}")


def _known_metadata(document: object) -> object:
    """Drop what a cluster adds to an object and what is not ours to judge: other metadata, status."""
    if not isinstance(document, Mapping):
        return document
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
