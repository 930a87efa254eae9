"""What can be wrong with a file of weights."""

from __future__ import annotations

from sonoforge_trainer.contract.exits import Cause


class WeightsError(ValueError):
    """The file is not weights of a ViT that is known here, or does not fit what it should be used for."""

    termination_cause: Cause = "config"
