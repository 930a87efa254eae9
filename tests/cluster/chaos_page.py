"""docs/chaos.md: the tables of `make chaos-cluster`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import wrong_jobs
from plain_torchrun import PATIENCE_SECONDS, PlainTorchrun
from random_faults import Chaos
from recovery import Recovery
from scenarios import EVERY, FAULT_AT, LONG, SCENARIOS, STEPS, Scenario

PAGE = Path(__file__).parents[2] / "docs" / "chaos.md"


def row(scenario: Scenario, recovery: Recovery, differs: list[str]) -> str:
    """A line of the table of scenarios."""
    seconds = [recovery.noticed, recovery.formed, recovery.stepped]
    cells = [scenario.number, scenario.name, *("–" if s is None else f"{s:.1f}" for s in seconds)]
    return f"| {' | '.join([*cells, str(recovery.lost_steps), 'no' if differs else 'yes'])} |"


def random_row(minutes: float, seed: int, chaos: Chaos) -> str:
    """A line for faults at random."""
    stepped = sorted(recovery.stepped for _, recovery in chaos.played)
    lost = sum(recovery.lost_steps for _, recovery in chaos.played)
    drawn = f"{len(chaos.played)}: {', '.join(number for number, _ in chaos.played)}"
    median, worst = (f"{stepped[len(stepped) // 2]:.1f}", f"{stepped[-1]:.1f}") if stepped else ("–", "–")
    cells = [
        "16",
        f"{minutes:g} minutes, seed {seed}",
        f"{chaos.jobs} of {LONG} steps",
        drawn,
        median,
        worst,
        str(lost),
    ]
    return f"| {' | '.join([*cells, 'no' if chaos.wrong else 'yes'])} |"


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

One after the other, each once three workers step again, in one job after the other. Drawn are all faults but those that
need a repair in storage.

| # | how long | jobs | faults, in this order | median seconds to the next step | worst | steps lost | right |
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
