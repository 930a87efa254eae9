"""How long a job takes to go on after a fault."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from real_site import RealSite, progress_at

from sonoforge_trainer.contract import Progress


@dataclass(frozen=True)
class Recovery:
    """Seconds from a fault to what followed; None where it was not seen."""

    noticed: float | None
    """A survivor stops its workers, or misses the store."""
    formed: float | None
    """A new group has formed."""
    stepped: float
    """The next step has ended."""
    lost_steps: int
    """Steps that were done again."""
    regrouped: bool
    """Whether the next step was another group's."""


class Watch:
    """Reads the progress of a job often, and looks for its coordinator only where it does not answer."""

    def __init__(self, site: RealSite, job: str) -> None:
        self._site, self._job = site, job
        self._address = ""
        self._uid = site.get("pj", job)["metadata"]["uid"]

    def wait_until(self, condition: Callable[[Progress], bool], what: str, seconds: float) -> Progress:
        """Wait until the progress meets a condition, and return it. Raises TimeoutError."""
        found: list[Progress] = []

        def met() -> bool:
            progress = self.read()
            if progress is None or not condition(progress):
                time.sleep(0.05)
                return False
            found.append(progress)
            return True

        self._site.wait_for(met, f"{self._job}: {what}", seconds)
        return found[0]

    def read(self) -> Progress | None:
        """What the coordinator says, or None where none answers."""
        progress = progress_at(self._address, self._uid) if self._address else None
        if progress is None:
            pods = [p["status"].get("podIP") for p in self._site.pods(self._job, "coordinator") if _alive(p)]
            self._address = next(filter(None, pods), "")
        return progress


def _alive(pod: dict[str, dict[str, object]]) -> bool:
    return pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
