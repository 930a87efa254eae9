"""What a job on real nodes came to, and how it differs from one that was left alone."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_site import RealSite

from sonoforge_trainer.contract import QUARANTINE

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from audit import Logs, log_faults, read_logs

VIRTUAL_RANKS = 4


@dataclass(frozen=True)
class Outcome:
    """Phase, logs and evaluations of a job that is over."""

    phase: str
    logs: Logs
    results: dict[str, int]
    """How many evaluation results lie beside each checkpoint."""
    evaluations: dict[str, list[str]]
    """Phases of the evaluations of each Checkpoint object."""


def outcome_of(site: RealSite, job: str, folder: Path) -> Outcome:
    """Read back what a job committed to S3 and what its objects say."""
    uri = site.get("pj", job)["spec"]["checkpoints"]["uri"]
    site.download(uri, folder)
    checkpoints = sorted(path.parent for path in folder.rglob("COMMIT"))
    objects = site.get("ckpt", f"--selector=sonoforge.dev/job={job}")["items"]
    return Outcome(
        phase=site.phase(job),
        # What was found damaged was trained anew, and is in the logs of the checkpoints that took its place.
        logs=read_logs(path for path in checkpoints if not (path / QUARANTINE).exists()),
        results={str(path.relative_to(folder)): len(list(path.glob("eval/*.json"))) for path in checkpoints},
        evaluations={item["metadata"]["name"]: _phases(item) for item in objects},
    )


def differences(calm: Outcome, other: Outcome, *, steps: int) -> list[str]:
    """What is wrong with a job, alone and beside the one that was left alone; empty where nothing is."""
    found = [] if other.phase == "Succeeded" else [f"it is {other.phase}"]
    found += log_faults(other.logs, steps=steps, virtual_ranks=VIRTUAL_RANKS)
    one, two = dict(calm.logs.samples), dict(other.logs.samples)
    wrong = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
    if wrong:
        found.append(f"sample logs differ at {len(wrong)} places, first {wrong[:3]}")
    counts = Counter(other.results.values())
    if set(counts) != {1}:
        found.append(f"checkpoints by their number of results: {dict(counts)}")
    if any(phases != ["Succeeded"] for phases in other.evaluations.values()):
        found.append(f"evaluations: {other.evaluations}")
    if len(other.evaluations) != len(other.results):
        found.append(f"{len(other.evaluations)} Checkpoint objects for {len(other.results)} checkpoints in S3")
    return found


def _phases(checkpoint: dict[str, Any]) -> list[str]:
    return [evaluation["phase"] for evaluation in checkpoint.get("status", {}).get("evaluations", ())]
