"""The data card: what is in an imported set, where it comes from and what was found in it. It holds no identifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from sonoforge_trainer.contract.base import Part
from sonoforge_trainer.datasets.findings import Finding
from sonoforge_trainer.datasets.importer import About
from sonoforge_trainer.shards.sources import SPLITS, Row

CARD = "card.json"
"""Name of the data card, beside `shards.json`."""


class SplitCard(Part):
    """One split in numbers."""

    samples: int
    """Images."""
    patients: int
    """Different patients; 0 where the set names none."""
    clips: int
    """Different clips, videos or exams; 0 where the set names none."""
    masks: int
    """Images with a mask."""
    labels: dict[str, int]
    """Images by class."""


class FindingCard(Part):
    """One thing that was looked for."""

    code: str
    """Its name."""
    state: Literal["ok", "note", "warning"]
    """ok: found nothing. note: handled, or harmless. warning: scores may mislead, or samples were left out."""
    count: int
    """How often it was found."""
    text: str
    """What was found and what was done; it follows the count."""


class DataCard(Part):
    """A data set for people who decide whether to trust scores on it."""

    format: Literal["sonoforge.datacard/v1"] = "sonoforge.datacard/v1"
    """Kind of document."""
    name: str
    """Name of the shards."""
    importer: str
    """What `sonoforge datasets import` was called with."""
    title: str
    """What the set is."""
    source: str
    """Where its users get it."""
    licence: str
    """Licence of the images."""
    citation: str
    """How to cite it."""
    dataset_digest: str
    """Digest of the shards that this card describes."""
    mask_classes: tuple[str, ...]
    """Names of mask values."""
    split_rule: str
    """How splits came about."""
    splits: dict[str, SplitCard]
    """Counts by split."""
    findings: tuple[FindingCard, ...]
    """Everything that was looked for."""


def count_splits(rows: Sequence[Row], masked: frozenset[int]) -> dict[str, SplitCard]:
    """Counts by split, in the order train, val, test, unlabelled. `masked` are numbers of rows with a mask."""
    found = {}
    for split in (*SPLITS, ""):
        mine = [row for row in rows if row.split == split]
        if mine:
            found[split or "none"] = SplitCard(
                samples=len(mine),
                patients=len({row.patient for row in mine} - {""}),
                clips=len({(row.patient, row.clip) for row in mine if row.clip}),
                masks=sum(row.number in masked for row in mine),
                labels=dict(sorted(Counter(row.label for row in mine if row.label).items())),
            )
    return found


def finding_cards(findings: Sequence[Finding]) -> tuple[FindingCard, ...]:
    """Findings as they stand in the card."""
    return tuple(FindingCard(code=f.check.code, state=f.state, count=f.count, text=f.check.sentence) for f in findings)


def lines(about: About, rule: str, splits: dict[str, SplitCard], findings: Sequence[Finding]) -> list[str]:
    """The report for a terminal."""
    text = [f"{about.title}", f"  source: {about.source}", f"  licence: {about.licence}", f"  split: {rule}"]
    for split, count in splits.items():
        parts = [f"{count.samples} images", f"{count.patients or 'no'} patients"]
        parts += [f"{count.clips} clips"] * bool(count.clips) + [f"{count.masks} masks"] * bool(count.masks)
        text.append(f"  {split}: {', '.join(parts)}")
        text += [f"    {label}: {number}" for label, number in count.labels.items()]
    clean = [finding.check.code for finding in findings if not finding.count]
    text += [f"  {f.state}: {f.check.code}: {f.count} {f.check.sentence}" for f in findings if f.count]
    text.append(f"  nothing found: {', '.join(clean)}")
    return text
