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


def first_after(site: RealSite, job: str, moment: float, events: Collection[str], without: str = "") -> float | None:
    """Seconds from a moment (Unix time) to the first of such events on another node; None where there is none."""
    times = [
        datetime.fromisoformat(record["timestamp"]).timestamp()
        for record in records(site, job, without)
        if record.get("event") in events and "timestamp" in record
    ]
    later = [time - moment for time in times if time > moment]
    return min(later) if later else None
