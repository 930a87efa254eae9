"""What can be wrong with a source or a data set. No message holds a path, a key or a patient."""

from __future__ import annotations

from typing import ClassVar

from sonoforge_trainer.contract.exits import Cause


class SourceError(ValueError):
    """The source or the options do not fit; nothing was built. The message says what to change."""


class ImageError(ValueError):
    """One image or mask cannot become a sample. The message says why, never which: the caller knows the row."""


class TarError(ValueError):
    """A tar is damaged. The message names a byte offset."""


class DataSetError(ValueError):
    """A data set was refused or is damaged; repair it and try again."""

    termination_cause: ClassVar[Cause] = "data"
