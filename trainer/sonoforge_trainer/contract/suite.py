"""An evaluation suite: data sets with their protocols, and the models that checkpoints are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from sonoforge_trainer.contract.base import ContractError, Misfit, Part, load_yaml_documents, refuse
from sonoforge_trainer.contract.baseline import FLOORS, Baseline
from sonoforge_trainer.contract.evaluation import Evaluation, EvaluationRequest, Protocol

FLOOR_PROTOCOLS: tuple[Protocol, ...] = ("knn", "linear", "logreg", "fewshot", "segment-probe")
"""Protocols on frozen features: those that a model without weights can do."""


class EvalSuiteSpec(Part):
    """Evaluations, and baselines that go through the same."""

    evaluations: Annotated[tuple[Evaluation, ...], Field(min_length=1)]
    """One entry a data set; the protocols of an entry share one feature pass."""
    baselines: Annotated[tuple[Baseline, ...], Field(max_length=32)] = ()
    """Models to compare with. Each is evaluated once for each run."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        misfits = []
        for what, names in (
            ("evaluations", [e.name for e in self.evaluations]),
            ("baselines", [b.name for b in self.baselines]),
        ):
            for number, name in enumerate(names):
                if name in names[:number]:
                    allowed = f"a name of its own, {what}.{names.index(name)} has this one"
                    misfits.append(Misfit(f"{what}.{number}.name", name, allowed))
        refuse(*misfits)
        return self

    @model_validator(mode="after")
    def _baselines_differ(self) -> Self:
        ids = [baseline.id for baseline in self.baselines]
        refuse(
            *(
                Misfit(f"baselines.{number}", self.baselines[number].name, f"a model other than baselines.{first}")
                for number, first in enumerate(map(ids.index, ids))
                if first < number
            )
        )
        return self


def baseline_evaluation(baseline: Baseline, evaluation: Evaluation) -> Evaluation | None:
    """What a baseline does of an evaluation; None where that is nothing. Floors have no weights to tune."""
    if baseline.kind not in FLOORS:
        return evaluation
    able = tuple(protocol for protocol in evaluation.protocols if protocol in FLOOR_PROTOCOLS)
    return evaluation.model_copy(update={"protocols": able}) if able else None


def suite_requests(
    suite: EvalSuiteSpec, checkpoint_uri: str, checkpoint_digest: str
) -> Iterator[tuple[str, EvaluationRequest]]:
    """(model, request) of everything that a suite asks of a checkpoint and its baselines; "" is the checkpoint.

    Models come one after the other, and evaluations of one data set together.
    """
    for baseline in (None, *suite.baselines):
        for evaluation in sorted(suite.evaluations, key=lambda e: (e.shards, e.resolution or 0)):
            asked = baseline_evaluation(baseline, evaluation) if baseline else evaluation
            if asked is not None:
                request = EvaluationRequest(
                    checkpoint_uri=checkpoint_uri,
                    checkpoint_digest=checkpoint_digest,
                    evaluation=asked,
                    baseline=baseline,
                )
                yield (baseline.name if baseline else ""), request


def read_suite(text: str, *, where: str) -> EvalSuiteSpec:
    """The one EvalSuite in a YAML text, which may hold other documents beside it. Raises ContractError."""
    documents = [d for d in load_yaml_documents(text, where=where) if isinstance(d, Mapping)]
    suites = [d for d in documents if d.get("kind") == "EvalSuite"]
    if len(suites) != 1:
        raise ContractError(f"{where}: found {len(suites)} EvalSuite documents. Allowed: exactly one")
    return EvalSuiteSpec.parse(suites[0].get("spec"), where=f"{where}: EvalSuite.spec")
