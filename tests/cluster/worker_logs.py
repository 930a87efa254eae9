"""What the workers of a job said, read from the files that the nodes keep."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any

from real_site import NAMESPACE, RealSite


def records(site: RealSite, job: str, without: str = "") -> Iterator[dict[str, Any]]:
    """Log records of the workers that are there, from every node but one."""
    for node in site.cluster.nodes:
        if node.name == without:
            continue
        for file in node.folder.glob(f"pods/{NAMESPACE}_{job}-*/worker/*.log"):
            for line in file.read_text(errors="replace").splitlines():
                text = line.split(" ", 3)[-1]  # time, stream and tag of the container runtime come first
                try:
                    record = json.loads(text)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record


def last_step(site: RealSite, job: str, moment: float) -> int:
    """The last step that was logged before a moment (Unix time); 0 where none was, or the node keeps no log of it."""
    steps = [record["step"] for record in records(site, job) if "loss" in record and _when(record) < moment]
    return max(steps, default=0)


def first_after(site: RealSite, job: str, moment: float, events: Collection[str], without: str = "") -> float | None:
    """Seconds from a moment (Unix time) to the first of such events on another node; None where there is none."""
    times = [_when(record) for record in records(site, job, without) if record.get("event") in events]
    later = [time - moment for time in times if time > moment]
    return min(later) if later else None


def _when(record: dict[str, Any]) -> float:
    return datetime.fromisoformat(record["timestamp"]).timestamp()
