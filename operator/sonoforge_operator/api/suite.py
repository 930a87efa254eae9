"""EvalSuite: what every checkpoint is measured by."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonoforge_operator.api.fields import Metadata
from sonoforge_trainer.contract import Evaluation, Part


class EvalSuiteSpec(Part):
    """A named list of evaluations."""

    evaluations: Annotated[tuple[Evaluation, ...], Field(min_length=1)]
    """One entry a data set; the protocols of an entry share one feature pass."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [e.name for e in self.evaluations]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(f"two evaluations are called {double[0]}; give each its own name")
        return self


class EvalSuite(Part):
    """An EvalSuite object."""

    api_version: Literal["sonoforge.dev/v1alpha1"]
    """API group and version."""
    kind: Literal["EvalSuite"]
    """Kind."""
    metadata: Metadata
    """Name."""
    spec: EvalSuiteSpec
    """The evaluations."""
