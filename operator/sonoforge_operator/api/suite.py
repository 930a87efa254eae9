"""EvalSuite: what every checkpoint is measured by, and what it is compared with."""

from __future__ import annotations

from typing import Literal

from sonoforge_operator.api.fields import Metadata
from sonoforge_trainer.contract import EvalSuiteSpec, Part


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
