"""What an evaluation leaves beside its result for people to look at: outcomes of single samples, and pictures.

No document here names a sample, a clip or a patient. Patients are numbered anew in each evaluation.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonoforge_trainer.contract.base import Part
from sonoforge_trainer.contract.shards import Sha256

Index = Annotated[int, Field(ge=0)]
Colour = Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]


class Artifacts(Part):
    """Names of the documents below the result's folder; empty where there is none, as in results of older versions."""

    evidence: str = ""
    """Outcomes of single test samples: an `Evidence`."""
    gallery: str = ""
    """Pictures: a `Gallery`."""


class SampleConfusions(Part):
    """What one protocol made of every sample of the test split, in the order of the data set.

    Of a classification `truth` and `predicted` are given, of a segmentation `counts`.
    """

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the classes."""
    groups: tuple[Index, ...]
    """Number of each sample's patient (or clip, where patients are not known), by first appearance."""
    truth: tuple[Index, ...] = ()
    """True class of each sample."""
    predicted: tuple[Index, ...] = ()
    """Predicted class of each sample."""
    counts: tuple[tuple[Index, ...], ...] = ()
    """Pixels of each sample by true and predicted class, row by row: K * K numbers."""

    @model_validator(mode="after")
    def _one_entry_a_sample(self) -> Self:
        samples, size = len(self.groups), len(self.classes)
        lengths = (len(self.truth), len(self.predicted), len(self.counts))
        if lengths not in ((samples, samples, 0), (0, 0, samples)):
            raise ValueError(f"{samples} groups need as many truths and predictions, or as many counts")
        if any(not 0 <= c < size for c in (*self.truth, *self.predicted)):
            raise ValueError(f"a class is not below {size}")
        if any(len(row) != size * size for row in self.counts):
            raise ValueError(f"each of the counts needs {size * size} numbers")
        return self


class Evidence(Part):
    """Outcomes of single test samples, so that two models can be compared sample by sample."""

    format: Literal["sonoforge.evidence/v1"] = "sonoforge.evidence/v1"
    """Format of this document."""
    dataset_digest: Sha256
    """The evaluation set. Two documents compare where it, the label and the selection are the same."""
    label: str
    """Sample field that holds the class."""
    where: dict[str, str] = {}
    """Selection of samples."""
    protocols: dict[str, SampleConfusions] = {}
    """By protocol. Protocols of several draws are left out, and what would be too large."""


class Neighbour(Part):
    """One neighbour of a query."""

    label: str
    """Its class; empty where it has none."""
    similarity: float
    """Cosine of the CLS features."""


class NeighbourRow(Part):
    """One query with its nearest training images, nearest first."""

    label: str
    """Class of the query."""
    neighbours: tuple[Neighbour, ...]
    """The nearest."""


class NeighbourSheet(Part):
    """A picture with a row for each query: the query, then its neighbours."""

    picture: str
    """Name of the PNG, below the folder of the result."""
    tile: Index
    """Side of an image in pixels."""
    rows: tuple[NeighbourRow, ...]
    """From top to bottom."""


class OverlaySheet(Part):
    """A picture with a column for each case: the true mask above, the predicted one below."""

    picture: str
    """Name of the PNG, below the folder of the result."""
    protocol: str
    """Protocol that predicted."""
    tile: Index
    """Side of an image in pixels."""
    classes: tuple[str, ...]
    """Names of the classes; the first is the background."""
    colours: tuple[Colour, ...]
    """Colour of each class but the first."""
    best: tuple[float, ...]
    """Foreground Dice of the best test images, best first: the first columns."""
    worst: tuple[float, ...]
    """Foreground Dice of the worst test images, worst first: the columns after them."""


class Gallery(Part):
    """Pictures to be looked at. They show test and training images of the data set."""

    format: Literal["sonoforge.gallery/v1"] = "sonoforge.gallery/v1"
    """Format of this document."""
    neighbours: NeighbourSheet | None = None
    """Nearest neighbours of the fixed gallery; None for a set without a training split."""
    overlays: tuple[OverlaySheet, ...] = ()
    """Best and worst segmentations of each protocol that segments."""
