"""The scenarios of `make chaos-cluster`: what breaks while a job trains, and how one is played and measured."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
from faults import (
    Fault,
    Strike,
    cut_coordinators_node,
    cut_power,
    delete_coordinator,
    delete_worker,
    drain,
    fill_disk,
    kill_evaluation,
    kill_process,
    preempt,
    pull_cable,
    restart_etcd,
    shrink,
    spoil_checkpoints,
    spoil_shards,
    stop_api_server,
    stop_s3,
    suspend,
    with_operator,
)
from outcomes import Outcome, differences, outcome_of
from real_site import RealSite, job
from recovery import Recovery, Watch
from worker_logs import first_after, last_step

STEPS, EVERY, FAULT_AT = 90, 30, 40
"""Steps of a job, steps between checkpoints, and the step after which something breaks: between two checkpoints."""
LONG = 300
"""Steps of a job that is to see three workers again."""
OUTAGE = 60.0
"""Seconds for which a server is gone."""
SECONDS = 600
"""For so long a job is waited for."""
AFTER_NEXT_STEP = "after the next step"
AT_ONCE = "at once"
FAILURES = (TimeoutError, AssertionError, LookupError, ValueError, subprocess.CalledProcessError, psutil.Error)
"""A scenario that was not got over is told, and the next one is played."""

Mending = Literal["at once", "at the end", "after the next step"] | float
"""When a fault is mended; a number is seconds after it began. At the end is after the job is done, and at once is
before any step: the way back is a part of what is played."""


@dataclass(frozen=True)
class Scenario:
    """Something that breaks, and how a job gets over it."""

    number: str
    name: str
    strike: Strike
    at: int = FAULT_AT
    """The step after which it breaks."""
    regroups: bool = True
    """Whether the workers have to form a new group."""
    mended: Mending = "at the end"
    """When it is mended."""
    returns: bool = False
    """Whether three nodes have to train again before the job is done."""
    steps: int = STEPS
    """Steps of its job."""


_SINGLE = (
    Scenario("1", "worker process killed", kill_process),
    Scenario("2", "worker pod deleted", delete_worker),
    Scenario("3", "node drained, its pods come back elsewhere", drain, returns=True, steps=LONG),
    Scenario("4", "cable of a node pulled, plugged in after the recovery", pull_cable, mended=AFTER_NEXT_STEP),
    Scenario("5", "power of a node cut, never back", cut_power),
    Scenario("6", "coordinator pod deleted", delete_coordinator, regroups=False),
    Scenario("6b", "cable of the coordinator's node pulled, never back", cut_coordinators_node),
    Scenario("7", "preempted by a job of higher priority", preempt, mended=AFTER_NEXT_STEP, returns=True, steps=LONG),
    Scenario("8", "resized 3 → 1 → 3 by kubectl", shrink, mended=AFTER_NEXT_STEP, returns=True, steps=LONG),
    Scenario("8b", "suspended by kubectl, resumed once its nodes are free", suspend, mended=AT_ONCE),
    Scenario("9", "S3 down for 60 s while training", stop_s3, regroups=False, mended=OUTAGE),
    Scenario("9b", "S3 down for 60 s during a checkpoint", stop_s3, at=2 * EVERY - 1, regroups=False, mended=OUTAGE),
    Scenario("10", "shards corrupted in S3, repaired once the job says so", spoil_shards),
    Scenario("11", "newest checkpoint corrupted, worker process killed", spoil_checkpoints(1), at=2 * EVERY + 10),
    Scenario("11b", "two newest checkpoints corrupted, worker process killed", spoil_checkpoints(2), at=2 * EVERY + 10),
)
SCENARIOS = (
    *_SINGLE,
    *(
        replace(s, number=f"13-{s.number}", name=f"{s.name}; operator killed", strike=with_operator(s.strike))
        for s in _SINGLE
    ),
    Scenario("14", "API server down for 60 s", stop_api_server, regroups=False, mended=OUTAGE),
    Scenario("14b", "etcd killed, started again", restart_etcd, regroups=False),
    # A kubelet looks at its disk every ten seconds: a short job is done by then.
    Scenario("15", "disk of a node full", fill_disk, mended=AFTER_NEXT_STEP, steps=LONG),
    Scenario("15b", "evaluation killed at 90 %", kill_evaluation, at=1, regroups=False, steps=LONG),
)


def play(site: RealSite, scenario: Scenario, calm: Undisturbed, folder: Path) -> tuple[Recovery, list[str]]:
    """Play a scenario. What it cost, and what was wrong with the result."""
    name = f"fault-{scenario.number}"
    site.apply(job(name, steps=scenario.steps, every=EVERY))
    try:
        recovery, fault = strike_and_measure(site, Watch(site, name), name, scenario)
        try:
            site.wait_for(lambda: is_over(site, name), f"{name} is done", SECONDS)
        finally:
            fault.mend()
        found = outcome_of(site, name, folder / name)
    finally:
        site.kubectl("delete", "pj", name, "--wait=false")
    differs = differences(calm.of(scenario.steps), found, steps=scenario.steps)
    if recovery.regrouped and not scenario.regroups:
        differs.append("the workers formed another group")
    return recovery, differs


def strike_and_measure(site: RealSite, watch: Watch, name: str, scenario: Scenario) -> tuple[Recovery, Fault]:
    """Break something, measure until the next step, and mend it unless that is for the end."""
    before = watch.wait_until(lambda p: p.nodes == 3 and p.step >= scenario.at, "three workers step", SECONDS)
    began = time.time()
    fault = scenario.strike(site, name)
    try:
        if scenario.mended == AT_ONCE:
            fault.mend()
        after = watch.wait_until(
            lambda p: p.step_time > began and (p.attempt != before.attempt or not scenario.regroups),
            "the next step",
            SECONDS,
        )
        formed = first_after(site, name, began, ("group-formed",), without=fault.node) if scenario.regroups else None
        reached = max(before.step, last_step(site, name, began + formed)) if formed else before.step
        recovery = Recovery(
            noticed=first_after(site, name, began, ("workers-stop", "store-lost"), without=fault.node),
            formed=formed,
            stepped=after.step_time - began,
            lost_steps=max(0, reached - (after.restored_step or 0)) if scenario.regroups else 0,
            regrouped=after.attempt != before.attempt,
        )
        if isinstance(scenario.mended, float):
            time.sleep(max(0.0, began + scenario.mended - time.time()))
        if scenario.mended not in (AT_ONCE, "at the end"):
            fault.mend()
        if scenario.returns:
            watch.wait_until(lambda p: p.nodes == 3 and p.attempt != before.attempt, "three workers again", SECONDS)
    except BaseException:
        fault.mend()
        raise
    return recovery, fault


class Undisturbed:
    """Jobs that are left alone, one for each number of steps."""

    def __init__(self, site: RealSite, folder: Path) -> None:
        self._site, self._folder = site, folder
        self._known: dict[int, Outcome] = {}

    def of(self, steps: int) -> Outcome:
        """What such a job came to."""
        if steps not in self._known:
            self._known[steps] = self._train(steps)
        return self._known[steps]

    def _train(self, steps: int) -> Outcome:
        site, name = self._site, f"calm-{steps}"
        began = time.monotonic()
        site.apply(job(name, steps=steps, every=EVERY))
        site.wait_for(lambda: is_over(site, name), f"{name} is done", SECONDS + 2 * steps)
        print(f"undisturbed, {steps} steps: {time.monotonic() - began:.0f} s", flush=True)
        found = outcome_of(site, name, self._folder / name)
        wrong = differences(found, found, steps=steps)
        assert not wrong, wrong
        site.kubectl("delete", "pj", name, "--wait=false")
        return found


def is_over(site: RealSite, name: str) -> bool:
    """Whether a job has come to its end."""
    return site.phase(name) in ("Succeeded", "Failed")
