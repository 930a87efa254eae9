"""Which split a sample is in: published lists, the set's own columns, or a draw by patient that anyone can repeat."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from sonoforge_trainer.datasets.record import Record
from sonoforge_trainer.shards.faults import SourceError
from sonoforge_trainer.shards.plan import draw, shuffled
from sonoforge_trainer.shards.sources import SPLITS, Row

DRAWN = ("train", "val", "test")
"""Splits that a draw or a list fills."""
_NAME_COLUMNS = ("image_name", "filename", "file_name", "image", "path", "file", "name")
_PATIENT_COLUMNS = ("patient_num", "patient_id", "patient", "subject_id", "subject", "video", "video_id")


@dataclass(frozen=True)
class SplitRule:
    """How a set is split where the user gives no lists."""

    sentence: str
    """The rule, for the data card."""
    apply: Callable[[Sequence[Record], Mapping[str, str], int], list[Record]] | None = None
    """(records, group of each reference, seed) to records with splits; None where there is no honest rule."""
    advice: str = ""
    """What to do where there is none."""
    drawn: bool = True
    """Whether the seed decides."""


def as_published(sentence: str) -> SplitRule:
    """Splits are in the records already."""
    return SplitRule(sentence, lambda records, _groups, _seed: list(records), drawn=False)


def by_group(sentence: str, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> SplitRule:
    """Draw groups (patients, or exams, or videos) in the given fractions; samples that have a split keep it."""

    def apply(records: Sequence[Record], groups: Mapping[str, str], seed: int) -> list[Record]:
        return draw_splits(records, groups, dict(zip(DRAWN, fractions, strict=True)), seed)

    return SplitRule(sentence, apply)


def impossible(advice: str) -> SplitRule:
    """A set that names neither patients nor videos: images of one patient cannot be kept together."""
    return SplitRule("none: the set names no patients, so that a split by patient is impossible", None, advice)


def draw_splits(
    records: Sequence[Record], groups: Mapping[str, str], fractions: Mapping[str, float], seed: int
) -> list[Record]:
    """Draw a split for each group whose samples have none. Raises SourceError where there are too few groups."""
    free = dict.fromkeys(groups[r.row.reference] for r in records if not r.row.split)
    drawn = draw(free, seed, fractions)
    return [r if r.row.split else _placed(r, drawn[groups[r.row.reference]]) for r in records]


def draw_validation(records: Sequence[Record], groups: Mapping[str, str], fraction: float, seed: int) -> list[Record]:
    """Turn a fraction of the groups of train into val. Raises SourceError."""
    train = dict.fromkeys(groups[r.row.reference] for r in records if r.row.split == "train")
    drawn = draw(train, seed, {"train": 1 - fraction, "val": fraction})
    return [_placed(r, drawn[groups[r.row.reference]]) if r.row.split == "train" else r for r in records]


def draw_exactly(
    sizes: Mapping[str, int], groups: int, samples: int, seed: int, tries: int = 200_000
) -> frozenset[str]:
    """`groups` of the names in `sizes`, which together have exactly `samples` samples, drawn so that anyone can repeat.

    The first of the draws 0, 1, 2 ... whose sum is right. Draw n sorts the names by the SHA-256 of seed, n and name and
    takes the first `groups`. As every draw is uniform, so is the outcome among all choices with that sum. Raises
    SourceError where no draw fits.
    """
    names = sorted(sizes)
    if len(names) >= groups and _possible(sorted(sizes.values()), groups, samples):
        for number in range(tries):
            chosen = shuffled(names, seed, f"exact {number}", str)[:groups]
            if sum(sizes[name] for name in chosen) == samples:
                return frozenset(chosen)
    raise SourceError(
        f"no draw of {groups} of {len(names)} patients has {samples} images; is this the published table? "
        "Give published lists with --split, or draw with --splits"
    )


def _possible(ordered: Sequence[int], groups: int, samples: int) -> bool:
    return sum(ordered[:groups]) <= samples <= sum(ordered[-groups:])


def _placed(record: Record, split: str) -> Record:
    return replace(record, row=replace(record.row, split=split))


def groups_of(records: Sequence[Record], digests: Mapping[int, str]) -> dict[str, str]:
    """The group of each sample, by reference: samples of one patient, of one clip, or with the same pixels.

    What the set says is joined: where two patients share an identical picture, they are one group. `digests` is by row
    number; samples without one (unreadable) stand for themselves.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for record in records:
        mine = find(_own_group(record.row))
        digest = digests.get(record.row.number)
        if digest:
            other = find(f"pixels {digest}")
            # The older name leads, so that a set without identical pictures is drawn by its patients' names alone.
            if other.startswith("pixels "):
                leader[other] = mine
            elif other != mine:
                leader[mine] = other
    return {record.row.reference: find(_own_group(record.row)) for record in records}


def _own_group(row: Row) -> str:
    if row.patient:
        return repr((row.patient, "", 0))
    return repr(("", row.clip, 0) if row.clip else ("", "", row.number))


def listed(records: Sequence[Record], lists: Mapping[str, Sequence[Path]]) -> tuple[list[Record], list[Record]]:
    """Records in the splits that published lists name, and those that no list has.

    A list is a text file with one name a line, or a CSV with a column of image names or of patients. A name is a
    path inside the set, a file's name, or that without its suffix. Raises SourceError where a list names what is not
    there, or two lists name the same sample.
    """
    by_name = _names(records)
    chosen: dict[str, str] = {}
    for split, files in lists.items():
        if split not in SPLITS:
            raise SourceError(f"--split {split}: allowed: {', '.join(SPLITS)}")
        for file in files:
            missing = 0
            for name in read_list(file):
                found = by_name.get(name)
                missing += not found
                for reference in found or ():
                    if chosen.setdefault(reference, split) != split:
                        raise SourceError(
                            f"--split: a sample is in the lists of both {chosen[reference]} and {split}; "
                            "correct the lists"
                        )
            if missing:
                raise SourceError(
                    f"--split {split}: {missing} names of the list are not in the set; names are paths inside the "
                    "set, file names with or without suffix, or patients"
                )
    if not chosen:
        raise SourceError("--split: the lists are empty")
    placed = [_placed(r, chosen[r.row.reference]) for r in records if r.row.reference in chosen]
    return placed, [r for r in records if r.row.reference not in chosen]


def read_list(file: Path) -> list[str]:
    """Names in a published list. Raises SourceError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"--split: a list cannot be read as UTF-8 text ({type(error).__name__})") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return []
    delimiter = ";" if lines[0].count(";") > lines[0].count(",") else ","
    header = [cell.strip().lower() for cell in lines[0].split(delimiter)]
    column = next((header.index(c) for c in (*_NAME_COLUMNS, *_PATIENT_COLUMNS) if c in header), None)
    if column is None:
        return [line.strip() for line in lines]
    rows = list(csv.reader(io.StringIO("\n".join(lines[1:])), delimiter=delimiter))
    if any(len(row) <= column for row in rows):
        raise SourceError("--split: a list has rows with fewer cells than its header")
    return [row[column].strip() for row in rows]


def _names(records: Sequence[Record]) -> dict[str, set[str]]:
    """Every name that a sample may have in a list; a name that fits several images of different folders fits none."""
    names: dict[str, set[str]] = {}
    for record in records:
        reference = record.row.reference
        path = PurePosixPath(reference)
        for name in {reference, path.name, path.stem, str(path.with_suffix(""))}:
            names.setdefault(name, set()).add(reference)
    files = set(names)
    for name in [name for name, references in names.items() if len(references) > 1]:
        del names[name]
    for record in records:
        for group in (record.row.patient, record.row.clip):
            if group and group not in files:
                names.setdefault(group, set()).add(record.row.reference)
    return names
