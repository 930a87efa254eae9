"""Scenario 16: one fault after the other, drawn by seed, while jobs train."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from outcomes import differences, outcome_of
from real_site import RealSite, job
from recovery import Recovery, Watch
from scenarios import (
    AFTER_NEXT_STEP,
    EVERY,
    FAILURES,
    LONG,
    SCENARIOS,
    SECONDS,
    Undisturbed,
    is_over,
    strike_and_measure,
)

_DRAWN = ("1", "2", "3", "4", "5", "6", "6b", "7", "8", "8b", "9", "14", "14b", "15", "13-2", "13-4", "13-8")
"""Faults at random: all that need no repair in storage. An evaluation is killed with its pod or its node there."""
_LAST_STEPS = 120
"""Steps before the end of a job at which nothing is broken at random: it is to see the mending."""


@dataclass
class Chaos:
    """What faults at random came to."""

    jobs: int = 0
    played: list[tuple[str, Recovery]] = field(default_factory=list)
    """What was drawn, in this order, and what it cost."""
    wrong: list[str] = field(default_factory=list)


def play(site: RealSite, calm: Undisturbed, *, minutes: float, seed: int, folder: Path) -> Chaos:
    """Break one thing after the other while jobs train, one job after the other, until the minutes are over."""
    undisturbed = calm.of(LONG)
    draw = random.Random(seed)
    chaos = Chaos()
    deadline = time.monotonic() + minutes * 60
    while time.monotonic() < deadline:
        chaos.jobs += 1
        name = f"fault-random-{chaos.jobs}"
        site.apply(job(name, steps=LONG, every=EVERY))
        try:
            _break_often(site, name, draw, deadline, chaos)
            site.wait_for(lambda name=name: is_over(site, name), f"{name} is done", SECONDS)
            differs = differences(undisturbed, outcome_of(site, name, folder / name), steps=LONG)
            chaos.wrong += [f"{name}: {each}" for each in differs]
        except FAILURES as error:
            chaos.wrong.append(f"{name}: {error}")
        finally:
            site.kubectl("delete", "pj", name, "--wait=false")
    return chaos


def _break_often(site: RealSite, name: str, draw: random.Random, deadline: float, chaos: Chaos) -> None:
    """Break something whenever three workers step, until it is late or the job is about to end."""
    watch = Watch(site, name)
    by_number = {scenario.number: scenario for scenario in SCENARIOS}
    seen: list[int] = []

    def steps_or_is_over() -> bool:
        progress = watch.read()
        seen[:] = [progress.step] if progress and progress.nodes == 3 and progress.step_time > 0 else []
        return bool(seen) or (progress is None and is_over(site, name))

    while time.monotonic() < deadline:
        site.wait_for(steps_or_is_over, f"{name}: three workers step", SECONDS)
        if not seen or seen[0] > LONG - _LAST_STEPS:
            return
        drawn = by_number[draw.choice(_DRAWN)]
        # A node that stays away would make every later draw one of two nodes.
        mended = AFTER_NEXT_STEP if drawn.mended == "at the end" else drawn.mended
        recovery, fault = strike_and_measure(site, watch, name, replace(drawn, at=0, mended=mended, returns=False))
        fault.mend()
        chaos.played.append((drawn.number, recovery))
        print(f"random: {drawn.number} at step {seen[0]} of {name}: {recovery.stepped:.1f} s", flush=True)
