"""What must be true of the logs that a run committed, checked without the code that made them.

Needs a run with `recordSamples: true` and `logEverySteps: 1`, whose checkpoints are all kept in a folder. The sample
order is checked from what docs and manifest say alone: shards are dealt to the virtual ranks in turn, from one epoch to
the next, and each virtual rank learns from what it was dealt, one epoch after the other.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Key = tuple[int, int]
"""Step (counted from 0) and virtual rank."""


@dataclass(frozen=True)
class Logs:
    """The records of a run's committed checkpoints, in the order of the checkpoints."""

    samples: Sequence[tuple[Key, list[str]]]
    """Keyed hashes of the samples of a virtual rank in a step."""
    metrics: Sequence[tuple[int, dict[str, Any]]]
    """Metric record by step (counted from 1)."""


def read_logs(checkpoints: Iterable[Path]) -> Logs:
    """The logs in the folders of checkpoints."""
    samples: list[tuple[Key, list[str]]] = []
    metrics: list[tuple[int, dict[str, Any]]] = []
    for folder in checkpoints:
        for path in sorted(folder.glob("samples-*.jsonl")):
            records = map(json.loads, path.read_text().splitlines())
            samples += [((record["step"], record["vrank"]), record["samples"]) for record in records]
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        metrics += [(record["step"], record) for record in records]
    return Logs(samples, metrics)


def log_faults(logs: Logs, *, steps: int, virtual_ranks: int) -> list[str]:
    """What is repeated or missing; every (step, virtual rank) and every metric step must be there exactly once."""
    wanted_samples = {(step, rank) for step in range(steps) for rank in range(virtual_ranks)}
    return [
        *_not_once("(step, virtual rank)", [key for key, _ in logs.samples], wanted_samples),
        *_not_once("metric step", [step for step, _ in logs.metrics], set(range(1, steps + 1))),
    ]


def _not_once(what: str, found: list[Any], wanted: set[Any]) -> list[str]:
    counts = Counter(found)
    groups = {
        "repeated": sorted(key for key, times in counts.items() if times > 1),
        "missing": sorted(wanted - counts.keys()),
        "beyond the run": sorted(counts.keys() - wanted),
    }
    return [f"{len(keys)} x {what} {how}, first {keys[:3]}" for how, keys in groups.items() if keys]


def epoch_faults(logs: Logs, manifest: Path, hash_key: bytes, *, virtual_ranks: int) -> list[str]:
    """Where an epoch does not hold each sample of the manifest exactly once; in the epoch under way, at most once.

    For data sets whose shards all have the same number of samples. Where the rule of one frame a clip leaves a sample
    out, that is a fault too: use a data set that needs no such substitution.
    """
    shards = json.loads(manifest.read_text())["shards"]
    keys = [key for shard in shards for key in shard["keys"]]
    assert len({len(shard["keys"]) for shard in shards}) == 1, "the shards differ in their number of samples"
    names = {hmac.new(hash_key, key.encode(), hashlib.sha256).hexdigest()[:12] for key in keys}
    assert len(names) == len(keys), "two samples have the same name"
    streams: list[list[str]] = [[] for _ in range(virtual_ranks)]
    for (_, rank), sample_names in sorted(logs.samples):
        streams[rank] += sample_names
    faults = []
    epoch, starts = 0, [0] * virtual_ranks
    while any(start < len(stream) for start, stream in zip(starts, streams, strict=True)):
        dealt = [len(range(rank, (epoch + 1) * len(shards), virtual_ranks)) for rank in range(virtual_ranks)]
        ends = [count * len(shards[0]["keys"]) for count in dealt]
        counts = Counter(n for s, start, end in zip(streams, starts, ends, strict=True) for n in s[start:end])
        complete = all(len(stream) >= end for stream, end in zip(streams, ends, strict=True))
        for what, found in (
            ("unknown", counts.keys() - names),
            ("more than once", {name for name, times in counts.items() if times > 1}),
            ("never", names - counts.keys() if complete else set()),
        ):
            if found:
                faults.append(f"epoch {epoch}: {len(found)} samples {what}, first {min(found)}")
        epoch, starts = epoch + 1, ends
    return faults


def event_faults(events: Path, evaluated: Iterable[str]) -> list[str]:
    """Checkpoints, by id, that were not told to be evaluated exactly once: for jobs with one evaluation."""
    told: Counter[str] = Counter()
    for line in events.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a runner that is killed while it writes leaves half a line
        if event["reason"] == "Evaluated" and not event["message"].startswith("floors "):
            told[event["message"].partition(",")[0]] += 1
    ids = set(evaluated)
    wrong = {id_: told[id_] for id_ in ids | told.keys() if told[id_] != (id_ in ids)}
    return [f"{id_} was told to be evaluated {times} times" for id_, times in sorted(wrong.items())]
