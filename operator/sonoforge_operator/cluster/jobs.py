"""From the objects that people write to the job that is planned, or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sonoforge_operator.api import (
    JobFile,
    PretrainJob,
    PretrainRuntimeSpec,
    check_best_by,
    parse_job,
    parse_runtime,
    parse_suite,
)
from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.desired import ClusterJob
from sonoforge_operator.cluster.names import Key, Names
from sonoforge_operator.cluster.store import Store, key_of
from sonoforge_operator.limits import narrow
from sonoforge_trainer.contract import ContractError, EvalSuiteSpec

DEFAULT_RUNTIME = "default"
"""The PretrainRuntime of a job that names none."""


@dataclass(frozen=True)
class Site:
    """What the operator knows of the place that it works in."""

    default_image: str = ""
    """Image of the trainer where a runtime names none."""
    operator_namespace: str = "default"
    """Its own namespace."""


class RejectedError(Exception):
    """A job cannot run as it is written, or not yet."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """Invalid, RuntimeNotFound or SuiteNotFound."""
        self.message = message
        """What to do, in a sentence."""


def resolve(manifest: Mapping[str, Any], store: Store, coordinators: Coordinators, site: Site) -> ClusterJob:
    """A PretrainJob with the runtime and the suite that it names. Raises RejectedError."""
    key, uid = key_of(manifest), str(manifest["metadata"].get("uid", ""))
    try:
        job = parse_job(manifest, where="PretrainJob")
        suite = _suite(job, key, store)
        file = JobFile(
            job=job,
            runtime=_runtime(job, key, store),
            evaluations=suite.evaluations if suite else (),
            baselines=suite.baselines if suite else (),
        )
        narrow(job, file.runtime)
        check_best_by(job.spec.evaluation, file.evaluations, where="PretrainJob.spec.evaluation.bestBy")
        _check_storage(file)
        _check_image(file, site)
    except ContractError as error:
        raise RejectedError("Invalid", str(error)) from None
    return ClusterJob(
        names=Names(key, uid),
        file=file,
        token_digest=coordinators.digest(uid),
        default_image=site.default_image,
        operator_namespace=site.operator_namespace,
        generation=int(manifest["metadata"].get("generation") or 1),
    )


def references(manifest: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Kind and name of the objects that a job names, as far as it can be read."""
    spec = manifest.get("spec")
    found = set()
    evaluation = spec.get("evaluation") if isinstance(spec, Mapping) else None
    for kind, owner, field in (("PretrainRuntime", spec, "runtimeRef"), ("EvalSuite", evaluation, "suiteRef")):
        ref = owner.get(field) if isinstance(owner, Mapping) else None
        name = ref.get("name") if isinstance(ref, Mapping) else None
        if isinstance(name, str):
            found.add((kind, name))
        elif kind == "PretrainRuntime":
            found.add((kind, DEFAULT_RUNTIME))
    return found


def _runtime(job: PretrainJob, key: Key, store: Store) -> PretrainRuntimeSpec:
    # Without one a job would escape every limit of the platform.
    name = job.spec.runtime_ref.name if job.spec.runtime_ref else DEFAULT_RUNTIME
    return parse_runtime(_named("PretrainRuntime", name, "runtimeRef", key, store)).spec


def _suite(job: PretrainJob, key: Key, store: Store) -> EvalSuiteSpec | None:
    ref = job.spec.evaluation.suite_ref
    if ref is None:
        return None
    return parse_suite(_named("EvalSuite", ref.name, "evaluation.suiteRef", key, store)).spec


def _named(kind: str, name: str, field: str, key: Key, store: Store) -> Mapping[str, Any]:
    found = store.get(kind, key.namespace, name)
    if found is not None:
        return found
    known = sorted(key_of(m).name for m in store.all(kind) if key_of(m).namespace == key.namespace)
    reason = {"PretrainRuntime": "RuntimeNotFound", "EvalSuite": "SuiteNotFound"}[kind]
    names = ", ".join(known) or "none"
    message = f"PretrainJob.spec.{field}.name: found {name!r}. Allowed: a {kind} of this namespace ({names})"
    raise RejectedError(reason, f"{message}; apply it and the job starts")


def _check_image(file: JobFile, site: Site) -> None:
    if not (file.runtime.images.trainer or site.default_image):
        raise ContractError(
            "PretrainRuntime.spec.images.trainer: required, because the operator was started without a default"
        )


def _check_storage(file: JobFile) -> None:
    spec = file.job.spec
    places = {
        "PretrainJob.spec.training.data.shards": spec.training.data.shards,
        "PretrainJob.spec.checkpoints.uri": spec.checkpoints.uri,
        **{f"EvalSuite.spec.evaluations[{e.name}].shards": e.shards for e in file.evaluations},
        **{f"EvalSuite.spec.baselines[{b.name}].uri": b.uri for b in file.baselines if b.uri},
    }
    if spec.training.init:
        places["PretrainJob.spec.training.init.uri"] = spec.training.init.uri
    for field, uri in places.items():
        if not uri.startswith("s3://"):
            raise ContractError(
                f"{field}: found {uri!r}. Allowed: s3://..., because pods share no disk; file:// is for `sonoforge run`"
            )
