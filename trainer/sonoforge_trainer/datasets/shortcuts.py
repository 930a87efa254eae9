"""Labels that can be guessed without looking: where a class came from another scanner, its images have other sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sonoforge_trainer.datasets.findings import Check, Findings
from sonoforge_trainer.datasets.inspect import Look
from sonoforge_trainer.datasets.record import Record

SIZE = Check(
    "size-tells-label",
    "warning",
    "percent balanced accuracy when the label is guessed from the image's size alone, over 10 more than chance; "
    "scores may follow the scanner",
)
_LEAST_IMAGES = 50
_MARGIN = 0.1


def look_for_size(records: Sequence[Record], looks: Mapping[int, Look], findings: Findings) -> None:
    """Count the percent of `SIZE` where labels follow sizes."""
    pairs = [
        (looks[record.row.number].size, record.row.label)
        for record in records
        if record.row.label and record.row.number in looks
    ]
    labels = {label for _, label in pairs}
    if len(pairs) < _LEAST_IMAGES or len(labels) < 2:
        return
    accuracy = guessed_from(pairs)
    if accuracy > 1 / len(labels) + _MARGIN:
        findings.add(SIZE.code, round(100 * accuracy))


def guessed_from(pairs: Sequence[tuple[tuple[int, int], str]]) -> float:
    """Balanced accuracy of guessing each sample's label from the others of its size, 0 to 1.

    The guess is the label with the largest share of its own images at that size, the sample itself left out, so that a
    size that occurs once tells nothing. Ties are no hits.
    """
    sizes = Counter(pairs)
    totals = Counter(label for _, label in pairs)
    hits: Counter[str] = Counter()
    for (size, label), count in sizes.items():
        own = (count - 1) / max(1, totals[label] - 1)
        others = (sizes[size, other] / totals[other] for other in totals if other != label)
        hits[label] += count * (own > max(others, default=0.0))
    return sum(hits[label] / total for label, total in totals.items()) / len(totals)
