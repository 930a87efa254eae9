"""The same picture twice, or nearly: under two labels, two patients, or in two splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sonoforge_trainer.datasets.dhash import alike
from sonoforge_trainer.datasets.findings import Check, Findings
from sonoforge_trainer.datasets.inspect import Look
from sonoforge_trainer.datasets.record import Record
from sonoforge_trainer.shards.sources import Row

CHECKS = (
    Check("no-patient", "warning", "samples name no patient; samples of one patient may be in several splits"),
    Check("patient-splits", "warning", "patients are in more than one split"),
    Check("clip-splits", "warning", "clips are in more than one split"),
    Check("duplicates", "note", "images have the same pixels as an earlier one"),
    Check("duplicate-patients", "warning", "pictures appear under more than one patient"),
    Check("duplicate-labels", "warning", "pictures appear under more than one label; all were kept"),
    Check(
        "duplicate-splits",
        "warning",
        "copies were left out because the same picture is in a split that matters more (test, then val, then train)",
    ),
)
"""What every set is checked for once splits are known."""
MISSING = Check("class-missing", "warning", "times a class has no image in a split that others have images in")
"""Told of the samples that are kept."""
NEAR = (
    Check("near-duplicates", "note", "images look like an earlier one of their split, with other pixels"),
    Check(
        "near-duplicate-splits",
        "warning",
        "images look like one of a split that matters more (test, then val, then train), with other pixels; "
        "all were kept",
    ),
)
"""Told of the samples that are kept, and never acted on: two frames of one organ may be as near as two copies."""
_RANK = {"test": 0, "val": 1, "train": 2}


def without_leaks(records: Sequence[Record], digests: Mapping[int, str], findings: Findings) -> list[Record]:
    """The records without copies of pictures of a more important split; everything is counted.

    Patients and clips in several splits are counted here and refused by the planner: which split is right is not ours
    to say.
    """
    _count_split_leaks(records, findings)
    findings.add("no-patient", sum(not r.row.patient for r in records))
    kept = []
    for copies in _pictures(records, digests):
        best = min(_rank(record.row) for record in copies)
        for record in copies:
            if _rank(record.row) == best:
                kept.append(record)
            else:
                findings.add("duplicate-splits", references=(record.row.reference,))
        if len(copies) > 1:
            names = [record.row.reference for record in copies]
            findings.add("duplicates", len(copies) - 1, names)
            findings.add("duplicate-patients", _several(copies, lambda row: row.patient), names)
            findings.add("duplicate-labels", _several(copies, lambda row: row.label), names)
    return sorted(kept, key=lambda record: record.row.number)


def count_missing_classes(records: Sequence[Record], findings: Findings) -> None:
    """Count the pairs of a class and one of train, val and test that have no image, where the split has labels."""
    labels = {record.row.label for record in records} - {""}
    for split in _RANK:
        mine = {record.row.label for record in records if record.row.split == split} - {""}
        findings.add(MISSING.code, len(labels - mine) if mine else 0)


def count_near_duplicates(records: Sequence[Record], looks: Mapping[int, Look], findings: Findings) -> None:
    """Count the images that look like others; of those in two splits, both go to the private list."""
    seen = [(record.row, looks[record.row.number]) for record in records if record.row.number in looks]
    numbers: dict[str, int] = {}
    pixels = np.array([numbers.setdefault(look.digest, len(numbers)) for _, look in seen], np.int64)
    ranks = np.array([_rank(row) for row, _ in seen], np.int64)
    within, across, shown = (np.zeros(len(seen), np.bool_) for _ in range(3))
    for earlier, later in alike([look.dhash for _, look in seen]):
        other = pixels[earlier] != pixels[later]
        first, second = earlier[other], later[other]
        same = ranks[first] == ranks[second]
        within[second[same]] = True
        across[np.where(ranks[first] > ranks[second], first, second)[~same]] = True
        shown[first[~same]] = shown[second[~same]] = True
    findings.add("near-duplicates", int(within.sum()))
    findings.add(
        "near-duplicate-splits", int(across.sum()), [seen[place][0].reference for place in np.flatnonzero(shown)]
    )


def _pictures(records: Sequence[Record], digests: Mapping[int, str]) -> list[list[Record]]:
    pictures: dict[object, list[Record]] = {}
    for record in records:
        number = record.row.number
        pictures.setdefault(digests.get(number, number), []).append(record)
    return list(pictures.values())


def _several(records: Sequence[Record], value: Callable[[Row], str]) -> int:
    return int(len({value(record.row) for record in records} - {""}) > 1)


def _rank(row: Row) -> int:
    return _RANK.get(row.split, len(_RANK))


def _count_split_leaks(records: Sequence[Record], findings: Findings) -> None:
    names: tuple[tuple[str, Callable[[Row], object]], ...] = (
        ("patient-splits", lambda row: row.patient),
        ("clip-splits", lambda row: (row.patient, row.clip) if row.clip else ""),
    )
    for code, name in names:
        splits: dict[object, set[str]] = {}
        for record in records:
            if name(record.row):
                splits.setdefault(name(record.row), set()).add(record.row.split)
        findings.add(code, sum(len(found) > 1 for found in splits.values()))
