"""Which sample goes where: splits, clip numbers, order and shards. Pure functions of the rows and a seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sonoforge_trainer.shards.faults import SourceError
from sonoforge_trainer.shards.sources import Row

T = TypeVar("T")


@dataclass(frozen=True)
class PlanRule:
    """How samples are split and dealt to shards."""

    shard_samples: int = 1000
    """Most samples in a shard."""
    seed: int = 0
    """Decides splits, order and shards."""
    splits: tuple[float, float, float] | None = None
    """Draw train, val and test in these fractions of the patients; None keeps the splits of the source."""
    validation: float = 0.0
    """Turn this fraction of the training patients into val, for sources that have none."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A sample with its place in the data set."""

    row: Row
    """The sample."""
    position: int
    """Ordinal in the data set, the first part of its key."""
    clip: int
    """Clip number, unique in the data set."""


def arrange(rows: Sequence[Row], rule: PlanRule) -> tuple[tuple[Placed, ...], ...]:
    """Samples of each shard, in order.

    Clips are put in a random order and dealt frame by frame, one to each shard in turn, so that shards are equally full
    (to one sample), random subsets, and a clip's frames are as far apart as there are shards. Then each shard is
    shuffled. Raises SourceError, also where a patient or a clip is in two splits.
    """
    rows = _with_splits(rows, rule)
    _refuse_leaks(rows)
    numbers: dict[tuple[str, str, int], int] = {}
    clips: list[list[Row]] = []
    for row in rows:
        identity = (row.patient, row.clip, 0) if row.clip else ("", "", row.number)
        number = numbers.setdefault(identity, len(numbers))
        if number == len(clips):
            clips.append([])
        clips[number].append(row)
    order = shuffled(range(len(clips)), rule.seed, "clips", str)
    dealt = [(row, n) for n in order for row in shuffled(clips[n], rule.seed, "frames", lambda r: str(r.number))]
    shards = -(-len(rows) // rule.shard_samples)
    position = 0
    plan = []
    for shard in range(shards):
        mine = shuffled(dealt[shard::shards], rule.seed, "samples", lambda pair: str(pair[0].number))
        plan.append(tuple(Placed(row, position + i, clip) for i, (row, clip) in enumerate(mine)))
        position += len(mine)
    return tuple(plan)


def shuffled(items: Iterable[T], seed: int, purpose: str, name: Callable[[T], str]) -> list[T]:
    """Items in an order that only the seed, the purpose and their own names decide, on every platform and for ever."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}\0{purpose}\0{name(item)}".encode()).digest())


def parse_splits(text: str) -> tuple[float, float, float]:
    """`0.8,0.1,0.1`: fractions of train, val and test. Raises ValueError."""
    if not re.fullmatch(r"[0-9.]+(,[0-9.]+){2}", text):
        raise ValueError(f"found {text!r}; allowed: three fractions, train,val,test, for example 0.8,0.1,0.1")
    train, val, test = (float(part) for part in text.split(","))
    if train <= 0 or abs(train + val + test - 1) > 1e-6:
        raise ValueError(f"found {text!r}, with the sum {train + val + test:g}; the fractions must add up to 1")
    return train, val, test


def _with_splits(rows: Sequence[Row], rule: PlanRule) -> Sequence[Row]:
    if rule.splits is not None:
        if any(row.split for row in rows):
            raise SourceError("the source has splits and --splits draws new ones; give one of the two")
        drawn = draw(
            dict.fromkeys(map(_group, rows)), rule.seed, dict(zip(("train", "val", "test"), rule.splits, strict=True))
        )
        return [replace(row, split=drawn[_group(row)]) for row in rows]
    if rule.validation:
        if any(row.split == "val" for row in rows):
            raise SourceError("the source has a val split already; leave out --validation")
        train = [row for row in rows if row.split == "train"]
        drawn = draw(
            dict.fromkeys(map(_group, train)), rule.seed, {"train": 1 - rule.validation, "val": rule.validation}
        )
        return [replace(row, split=drawn[_group(row)]) if row.split == "train" else row for row in rows]
    return rows


def _group(row: Row) -> tuple[str, str, int]:
    """What must stay in one split: the patient, else the clip, else the image."""
    if row.patient:
        return (row.patient, "", 0)
    return ("", row.clip, 0) if row.clip else ("", "", row.number)


def draw(groups: Iterable[T], seed: int, fractions: Mapping[str, float]) -> dict[T, str]:
    """A split for each group, so that the numbers of groups are as near to the fractions as can be.

    Raises SourceError where there are fewer groups than splits.
    """
    names = [name for name, fraction in fractions.items() if fraction > 0]
    order = shuffled(groups, seed, "splits", str)
    if len(order) < len(names):
        raise SourceError(f"{len(order)} patients cannot be drawn into {len(names)} splits")
    # Each split gets one patient first, so that none is empty; the rest goes where most is missing.
    counts = dict.fromkeys(names, 1)
    for _ in range(len(order) - len(names)):
        missing = max(names, key=lambda name: fractions[name] * len(order) - counts[name])
        counts[missing] += 1
    drawn = (name for name in names for _ in range(counts[name]))
    return dict(zip(order, drawn, strict=True))


def _refuse_leaks(rows: Sequence[Row]) -> None:
    for what, identity in (
        ("patient", lambda r: r.patient),
        ("clip", lambda r: (r.patient, r.clip) if r.clip else ""),
    ):
        splits: dict[object, set[str]] = {}
        for row in rows:
            if identity(row):
                splits.setdefault(identity(row), set()).add(row.split)
        leaks = sum(len(found) > 1 for found in splits.values())
        if leaks:
            advice = (
                "or name a placeholder for unknown patients with --unknown-patient"
                if what == "patient"
                else "a clip's frames are near-duplicates"
            )
            raise SourceError(
                f"{leaks} {what}{'s are' if leaks > 1 else ' is'} in more than one split; correct the split column, "
                f"or leave it out and draw splits by patient with --splits; {advice}"
            )
