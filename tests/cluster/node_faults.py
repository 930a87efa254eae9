"""`make chaos-cluster`: faults on real nodes while a job trains, and what each of them cost.

    python tests/cluster/node_faults.py [--only 2 --only 13-4] [--random 20 --seed 0] [--write]

Every scenario trains the same job as one that is left alone, breaks something while three workers step, and waits for
the job to succeed without a hand. The sample logs must be equal, every step must be in the log once, and every
checkpoint must be evaluated once. `--random` breaks one thing after the other for so many minutes, by seed. `--write`
puts the tables into docs/chaos.md, with the scenarios that were not played this time as they were.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import binaries
import packages
import psutil
import wrong_jobs
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
from plain_torchrun import PATIENCE_SECONDS, PlainTorchrun
from real_site import RealSite, job, open_site
from recovery import Recovery, Watch
from worker_logs import first_after

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "chaos.md"
STEPS, EVERY, FAULT_AT = 90, 30, 40
"""Steps of a job, steps between checkpoints, and the step after which something breaks: between two checkpoints."""
LONG = 300
"""Steps of a job that is to see three workers again."""
OUTAGE = 60.0
"""Seconds for which a server is gone."""
_SECONDS = 600
_AFTER_NEXT_STEP = "after the next step"
_AT_ONCE = "at once"
_FAILURES = (TimeoutError, AssertionError, subprocess.CalledProcessError, psutil.Error)
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
    Scenario("4", "cable of a node pulled, plugged in after the recovery", pull_cable, mended=_AFTER_NEXT_STEP),
    Scenario("5", "power of a node cut, never back", cut_power),
    Scenario("6", "coordinator pod deleted", delete_coordinator, regroups=False),
    Scenario("6b", "cable of the coordinator's node pulled, never back", cut_coordinators_node),
    Scenario("7", "preempted by a job of higher priority", preempt, mended=_AFTER_NEXT_STEP, returns=True, steps=LONG),
    Scenario("8", "resized 3 → 1 → 3 by kubectl", shrink, mended=_AFTER_NEXT_STEP, returns=True, steps=LONG),
    Scenario("8b", "suspended by kubectl, resumed once its nodes are free", suspend, mended=_AT_ONCE),
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
    Scenario("15", "disk of a node full", fill_disk, mended=_AFTER_NEXT_STEP),
    Scenario("15b", "evaluation killed at 90 %", kill_evaluation, at=1, regroups=False, steps=LONG),
)
_RANDOM = [
    s for s in SCENARIOS if s.number in {"1", "2", "3", "4", "5", "6", "7", "8", "14b", "15", "13-2", "13-4", "13-8"}
]
"""What is drawn for a run of random faults: what leaves nothing damaged in storage and is over soon."""


# --- one scenario -----------------------------------------------------------------------------------------------------


def run(site: RealSite, scenario: Scenario, calm: Undisturbed, folder: Path) -> tuple[Recovery, list[str]]:
    """Play a scenario. What it cost, and what was wrong with the result."""
    name = f"fault-{scenario.number}"
    site.apply(job(name, steps=scenario.steps, every=EVERY))
    watch = Watch(site, name)
    recovery, fault = strike_and_measure(site, watch, name, scenario)
    try:
        site.wait_for(lambda: site.phase(name) in ("Succeeded", "Failed"), f"{name} is done", _SECONDS)
    finally:
        fault.mend()
    found = outcome_of(site, name, folder / name)
    site.kubectl("delete", "pj", name, "--wait=false")
    return recovery, differences(calm.of(scenario.steps), found, steps=scenario.steps)


def strike_and_measure(site: RealSite, watch: Watch, name: str, scenario: Scenario) -> tuple[Recovery, Fault]:
    """Break something, measure until the next step, and mend it unless that is for the end."""
    before = watch.wait_until(lambda p: p.nodes == 3 and p.step >= scenario.at, "three workers step", _SECONDS)
    began = time.time()
    fault = scenario.strike(site, name)
    try:
        if scenario.mended == _AT_ONCE:
            fault.mend()
        after = watch.wait_until(
            lambda p: p.step_time > began and (p.attempt != before.attempt or not scenario.regroups),
            "the next step",
            _SECONDS,
        )
        recovery = Recovery(
            noticed=first_after(site, name, began, ("workers-stop", "store-lost"), without=fault.node),
            formed=first_after(site, name, began, ("group-formed",), without=fault.node) if scenario.regroups else None,
            stepped=after.step_time - began,
            lost_steps=max(0, before.step - (after.restored_step or 0)) if scenario.regroups else 0,
        )
        if isinstance(scenario.mended, float):
            time.sleep(max(0.0, began + scenario.mended - time.time()))
        if scenario.mended not in (_AT_ONCE, "at the end"):
            fault.mend()
        if scenario.returns:
            watch.wait_until(lambda p: p.nodes == 3 and p.attempt != before.attempt, "three workers again", _SECONDS)
    except BaseException:
        fault.mend()
        raise
    return recovery, fault


class Undisturbed:
    """Jobs that are left alone, one for each number of steps."""

    def __init__(self, site: RealSite, folder: Path) -> None:
        self._site, self._folder = site, folder
        self._known: dict[int, Outcome] = {}
        self.seconds_a_step = 0.0
        """How long a step of the newest took, with its start and its end."""

    def of(self, steps: int) -> Outcome:
        """What such a job came to."""
        if steps not in self._known:
            self._known[steps] = self._train(steps)
        return self._known[steps]

    def _train(self, steps: int) -> Outcome:
        site, name = self._site, f"calm-{steps}"
        began = time.monotonic()
        site.apply(job(name, steps=steps, every=EVERY))
        site.wait_for(lambda: site.phase(name) in ("Succeeded", "Failed"), f"{name} is done", _SECONDS + 2 * steps)
        self.seconds_a_step = (time.monotonic() - began) / steps
        print(f"undisturbed, {steps} steps: {time.monotonic() - began:.0f} s", flush=True)
        found = outcome_of(site, name, self._folder / name)
        wrong = differences(found, found, steps=steps)
        assert not wrong, wrong
        site.kubectl("delete", "pj", name, "--wait=false")
        return found


# --- random faults ----------------------------------------------------------------------------------------------------


def run_random(
    site: RealSite, calm: Undisturbed, *, steps: int, seed: int, folder: Path
) -> tuple[list[tuple[str, Recovery]], list[str]]:
    """Break one thing after the other while a long job trains. What was drawn and what it cost, and what was wrong."""
    draw = random.Random(seed)
    name = "fault-random"
    site.apply(job(name, steps=steps, every=EVERY))
    watch = Watch(site, name)
    played: list[tuple[str, Recovery]] = []
    mends = []
    while True:
        before = watch.wait_until(lambda p: p.nodes == 3 and p.step_time > 0, "three workers step", _SECONDS)
        if before.step > steps - 2 * EVERY:  # what comes later might meet a job that is done
            break
        drawn = draw.choice(_RANDOM)
        # A node that stays away would make every later draw one of two nodes.
        scenario = replace(drawn, at=0, mended=_AFTER_NEXT_STEP, returns=drawn.regroups)
        recovery, fault = strike_and_measure(site, watch, name, scenario)
        mends.append(fault.mend)
        played.append((scenario.number, recovery))
        print(f"random: {scenario.number} at step {before.step}: {recovery.stepped:.1f} s", flush=True)
    site.wait_for(lambda: site.phase(name) in ("Succeeded", "Failed"), f"{name} is done", _SECONDS)
    return played, differences(calm.of(steps), outcome_of(site, name, folder / name), steps=steps)


# --- the page ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Play the scenarios; 0 where every result was right."""
    numbers = [s.number for s in (*SCENARIOS, *wrong_jobs.WRONG_JOBS)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*numbers, "16", "plain"], help="play this one; repeatable")
    parser.add_argument("--random", type=float, default=20.0, metavar="MINUTES", help="length of scenario 16")
    parser.add_argument("--seed", type=int, default=0, help="what scenario 16 draws")
    parser.add_argument("--write", action="store_true", help="write docs/chaos.md")
    options = parser.parse_args()
    lacks = packages.missing()
    if lacks:
        sys.exit(lacks)
    programs, coredns = binaries.find(), binaries.find_coredns()
    assert programs, "`make cluster-programs` built them"
    assert coredns, "and this one too"
    rows: dict[str, str] = {}
    wrong: list[str] = []

    def told(number: str, text: str, faults: list[str]) -> None:
        rows[number] = text
        wrong.extend(f"{number}: {each}" for each in faults)
        print(text, *faults, sep="\n", flush=True)
        if options.write:
            write_page(rows)

    def wanted(number: str) -> bool:
        return not options.only or number in options.only

    with tempfile.TemporaryDirectory(prefix="sonoforge-chaos-") as made:
        folder = Path(made)
        with open_site(programs[0], coredns, folder) as site:
            calm = Undisturbed(site, folder)
            for scenario in filter(lambda s: wanted(s.number), SCENARIOS):
                try:
                    recovery, differs = run(site, scenario, calm, folder)
                except _FAILURES as error:
                    told(scenario.number, f"| {scenario.number} | {scenario.name} | – | – | – | – | no |", [str(error)])
                else:
                    told(scenario.number, row(scenario, recovery, differs), differs)
            for each in filter(lambda w: wanted(w.number), wrong_jobs.WRONG_JOBS):
                try:
                    reason = wrong_jobs.play(site, each)
                except _FAILURES as error:
                    told(each.number, f"| {each.number} | {each.name} | nothing |", [str(error)])
                else:
                    right = reason.startswith(f"{each.reason}: ")
                    faults = [] if right else [f"not {each.reason}"]
                    # What is quoted names places that are none of the page's business.
                    short = reason.partition('"')[0].strip()
                    told(each.number, f"| {each.number} | {each.name} | {short} |", faults)
            if wanted("plain"):
                for number, text in plain_rows(PlainTorchrun(site)):
                    told(number, text, [])
            if wanted("16"):
                calm.of(LONG)
                steps = round(options.random * 60 / calm.seconds_a_step / EVERY) * EVERY
                played, differs = run_random(site, calm, steps=steps, seed=options.seed, folder=folder)
                told("16", random_row(options.seed, steps, played, differs), differs)
    return 1 if wrong else 0


def row(scenario: Scenario, recovery: Recovery, differs: list[str]) -> str:
    """A line of the table of scenarios."""
    seconds = [recovery.noticed, recovery.formed, recovery.stepped]
    cells = [scenario.number, scenario.name, *("–" if s is None else f"{s:.1f}" for s in seconds)]
    return f"| {' | '.join([*cells, str(recovery.lost_steps), 'no' if differs else 'yes'])} |"


def random_row(seed: int, steps: int, played: list[tuple[str, Recovery]], differs: list[str]) -> str:
    """A line for the run of random faults."""
    stepped = sorted(recovery.stepped for _, recovery in played)
    lost = sum(recovery.lost_steps for _, recovery in played)
    text = f"| 16 | seed {seed}, {steps} steps | {len(played)} | {' '.join(number for number, _ in played)}"
    median, worst = (f"{stepped[len(stepped) // 2]:.1f}", f"{stepped[-1]:.1f}") if stepped else ("–", "–")
    return f"{text} | {median} | {worst} | {lost} | {'no' if differs else 'yes'} |"


def plain_rows(plain: PlainTorchrun) -> Iterator[tuple[str, str]]:
    """Lines of the table of plain torchrun."""
    for number, name, measure in (
        ("1", "process killed", plain.process_killed),
        ("2", "pod deleted", plain.pod_deleted),
        ("4", "cable of a node pulled", plain.cable_pulled),
        ("6", "pod with the store deleted", plain.store_deleted),
    ):
        seconds = measure()
        cell = f"never (waited {PATIENCE_SECONDS:.0f} s)" if seconds is None else f"{seconds:.1f}"
        yield f"plain-{number}", f"| {number} | {name} | {cell} |"


def write_page(rows: dict[str, str]) -> None:
    """docs/chaos.md with these lines; those that are in it already stay where they are not among them."""
    found = dict(_LINE.findall(PAGE.read_text())) if PAGE.exists() else {}
    found |= {number: f"{text} <!-- {number} -->" for number, text in rows.items()}
    text = _PAGE.format(steps=STEPS, every=EVERY, fault=FAULT_AT)
    for number, section in enumerate(_SECTIONS):
        lines = [found[n] for n in _NUMBERS[number] if n in found]
        if lines:
            text += "\n" + section.replace("ROWS", "\n".join(lines))
    PAGE.write_text(text)


_NUMBERS = (
    [s.number for s in SCENARIOS],
    [w.number for w in wrong_jobs.WRONG_JOBS],
    ["16"],
    [f"plain-{number}" for number in ("1", "2", "4", "6")],
)
"""The lines of each table of the page, in order."""
_LINE = re.compile(r"^(?=.*<!-- (\S+) -->$)(.*)$", re.MULTILINE)
_PAGE = """<!-- Written by `make chaos-cluster`. -->

# Faults on real nodes

Three nodes of one machine of two cores (see [testing](testing.md)), each with containerd, kubelet and kube-proxy in a
network namespace of its own; the operator from its image, workers and evaluations in pods of the trainer's image, gloo
between them, S3 beside. A job of {steps} steps saves a checkpoint every {every} steps; something breaks after step
{fault}, once three workers step. Nobody helps.

Seconds are from the fault: until a survivor says in its log that it stops or misses the store, until it says that a new
group has formed, until the next step has ended. Steps lost are those that were done again. The result is right where
the job succeeded, the sample log equals that of a job that was left alone, every step is in the committed log once, and
every checkpoint was evaluated once.
"""
_SECTIONS = (
    """| # | fault | noticed | re-formed | next step | steps lost | right |
|---|---|---|---|---|---|---|
ROWS

One run of each, without a GPU: gloo and not NCCL, and all nodes share two cores, which is most of the time between the
new group and its first step. What is not listed was not played, or not since what it found was mended.
""",
    """## Jobs that cannot train

| # | what is wrong | what the status says |
|---|---|---|
ROWS
""",
    """## Faults at random

One after the other, each once three workers step again.

| # | job | faults | in this order | median seconds to the next step | worst | steps lost | right |
|---|---|---|---|---|---|---|---|
ROWS
""",
    """## Plain torchrun

The same nodes and image with torchrun's own rendezvous (c10d, `--nnodes=1:3`, its defaults) and no operator; the pods
sum a tensor.

| # | fault | seconds to the next step |
|---|---|---|
ROWS
""",
)

if __name__ == "__main__":
    sys.exit(main())
