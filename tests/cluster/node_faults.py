"""`make chaos-cluster`: faults on real nodes while a job trains, and what each of them cost.

    python tests/cluster/node_faults.py [--only 2 --only 4] [--write]

Every scenario trains the same job as one that is left alone, breaks something once all three workers step, and waits
for the job to succeed without a hand. The sample logs must be equal, every step must be in the log once, and every
checkpoint must be evaluated once. `--write` puts the table into docs/chaos.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import binaries
import packages
from node import GPU, Node, add_gpus
from outcomes import Outcome, differences, outcome_of
from real_site import RealSite, job, open_site
from recovery import Recovery, Watch
from worker_logs import first_after

from sonoforge_operator.install import NAME

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "chaos.md"
STEPS, EVERY, FAULT_AT = 90, 30, 40
"""Steps of a job, steps between checkpoints, and the step after which something breaks: between two checkpoints."""
_SECONDS = 600


@dataclass(frozen=True)
class Fault:
    """Something that was broken."""

    mend: Callable[[], None] = lambda: None
    """Mends it; harmless where it is mended."""
    node: str = ""
    """The node that nobody reaches now."""


@dataclass(frozen=True)
class Scenario:
    """Something that breaks, and how it is mended before the next scenario, not before the job has succeeded."""

    number: str
    name: str
    strike: Callable[[RealSite, str], Fault]
    """Breaks it for a job."""
    regroups: bool = True
    """Whether the workers have to form a new group."""
    mend_early: bool = False
    """Mend it once the next step was seen, and not only at the end."""


def delete_worker(site: RealSite, name: str) -> Fault:
    """`kubectl delete pod` on a worker."""
    pod = site.pods(name, "worker")[0]["metadata"]["name"]
    site.kubectl("delete", "pod", pod, "--wait=false")
    return Fault()


def pull_cable(site: RealSite, name: str) -> Fault:
    """The cable of a node with nothing of the job but a worker."""
    node = plain_node(site, name)
    node.pull_cable()

    def mend() -> None:
        node.plug_in()
        site.cluster.wait_until_ready([node.name])

    return Fault(mend, node.name)


def cut_power(site: RealSite, name: str) -> Fault:
    """The power of such a node."""
    node = plain_node(site, name)
    node.cut_power()

    def mend() -> None:
        node.switch_on()
        site.cluster.wait_until_ready([node.name])
        add_gpus(site.cluster.control_plane, node.name, 1)

    return Fault(mend, node.name)


def delete_coordinator(site: RealSite, name: str) -> Fault:
    """`kubectl delete pod` on the coordinator."""
    pod = site.pods(name, "coordinator")[0]["metadata"]["name"]
    site.kubectl("delete", "pod", pod, "--wait=false")
    return Fault()


def cut_coordinators_node(site: RealSite, name: str) -> Fault:
    """The cable of the node with the coordinator, which has a worker too."""
    (pod,) = site.pods(name, "coordinator")
    node = site.cluster.node(pod["spec"]["nodeName"])
    node.pull_cable()

    def mend() -> None:
        node.plug_in()
        site.cluster.wait_until_ready([node.name])

    return Fault(mend, node.name)


SCENARIOS = (
    Scenario("2", "worker pod deleted", delete_worker),
    Scenario("4", "cable of a node pulled, and plugged in after the recovery", pull_cable, mend_early=True),
    Scenario("5", "power of a node cut, not back before the job is done", cut_power),
    Scenario("6", "coordinator pod deleted", delete_coordinator, regroups=False),
    Scenario("6b", "cable of the coordinator's node pulled, not back before the job is done", cut_coordinators_node),
)


def plain_node(site: RealSite, name: str) -> Node:
    """A node with a worker of the job and neither its coordinator nor the operator."""
    others = {pod["spec"]["nodeName"] for pod in site.pods(name, "coordinator")}
    others |= {p["spec"]["nodeName"] for p in site.get("pods", f"--selector=app.kubernetes.io/name={NAME}")["items"]}
    names = sorted({pod["spec"]["nodeName"] for pod in site.pods(name, "worker")} - others)
    assert names, "three nodes, and two pods to keep away from"
    return site.cluster.node(names[0])


def run(site: RealSite, scenario: Scenario, calm: Outcome, folder: Path) -> tuple[Recovery, list[str]]:
    """Play a scenario. What it cost, and what was wrong with the result."""
    name = f"fault-{scenario.number}"
    site.apply(job(name, steps=STEPS, every=EVERY))
    watch = Watch(site, name)
    before = watch.wait_until(lambda p: p.nodes == 3 and p.step >= FAULT_AT, "three workers step", _SECONDS)
    began = time.time()
    fault = scenario.strike(site, name)
    try:
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
        if scenario.mend_early:
            fault.mend()
        site.wait_for(lambda: site.phase(name) in ("Succeeded", "Failed"), f"{name} is done", _SECONDS)
    finally:
        fault.mend()
    found = outcome_of(site, name, folder / name)
    site.kubectl("delete", "pj", name, "--wait=false")
    return recovery, differences(calm, found, steps=STEPS)


def undisturbed(site: RealSite, folder: Path) -> Outcome:
    """The job that is left alone."""
    site.apply(job("calm", steps=STEPS, every=EVERY))
    site.wait_for(lambda: site.phase("calm") in ("Succeeded", "Failed"), "calm is done", _SECONDS)
    found = outcome_of(site, "calm", folder / "calm")
    wrong = differences(found, found, steps=STEPS)
    assert not wrong, wrong
    site.kubectl("delete", "pj", "calm", "--wait=false")
    return found


def main() -> int:
    """Play the scenarios; 0 where every result was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[s.number for s in SCENARIOS], help="play this one")
    parser.add_argument("--write", action="store_true", help="write docs/chaos.md")
    options = parser.parse_args()
    lacks = packages.missing()
    if lacks:
        sys.exit(lacks)
    programs, coredns = binaries.find(), binaries.find_coredns()
    assert programs, "`make cluster-programs` built them"
    assert coredns, "and this one too"
    rows, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="sonoforge-chaos-") as made:
        folder = Path(made)
        with open_site(programs[0], coredns, folder) as site:
            began = time.monotonic()
            calm = undisturbed(site, folder)
            print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
            for scenario in SCENARIOS:
                if options.only and scenario.number not in options.only:
                    continue
                recovery, differs = run(site, scenario, calm, folder)
                rows.append(row(scenario, recovery, differs))
                wrong += [f"{scenario.name}: {each}" for each in differs]
                print(rows[-1], flush=True)
    if options.write:
        PAGE.write_text(page(rows))
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


def row(scenario: Scenario, recovery: Recovery, differs: list[str]) -> str:
    """A line of the table."""
    seconds = [recovery.noticed, recovery.formed, recovery.stepped]
    cells = [scenario.number, scenario.name, *("–" if s is None else f"{s:.1f}" for s in seconds)]
    return f"| {' | '.join([*cells, str(recovery.lost_steps), 'no' if differs else 'yes'])} |"


def page(rows: list[str]) -> str:
    """docs/chaos.md."""
    return _PAGE.format(rows="\n".join(rows), steps=STEPS, every=EVERY, fault=FAULT_AT, gpu=GPU)


_PAGE = """<!-- Written by `make chaos-cluster`. -->

# Faults on real nodes

Three nodes of one machine of two cores (see [testing](testing.md)), each with containerd, kubelet and kube-proxy in a
network namespace of its own; the operator from its image, workers and evaluations in pods of the trainer's image, gloo
between them, S3 beside. A job of {steps} steps saves a checkpoint every {every} steps; something breaks after step
{fault}, once three workers step. Nobody helps.

Seconds are from the fault: until a survivor says in its log that it stops or misses the store, until it says that a new
group has formed, until the next step has ended. Steps lost are those that were done again. The result is right where
the sample log equals that of a job that was left alone, every step is in the committed log once, and every checkpoint
was evaluated once.

| # | fault | noticed | re-formed | next step | steps lost | right |
|---|---|---|---|---|---|---|
{rows}

One run of each, without a GPU: gloo and not NCCL, and all nodes share two cores, which is most of the time between the
new group and its first step.
"""

if __name__ == "__main__":
    sys.exit(main())
