"""`make chaos-cluster`: faults on real nodes while a job trains, and what each of them cost.

    python tests/cluster/node_faults.py [--only 2 --only 13-4] [--random 20 --seed 0] [--write]

Every scenario trains the same job as one that is left alone, breaks something while three workers step, and waits for
the job to succeed without a hand. The sample logs must be equal, every step must be in the log once, and every
checkpoint must be evaluated once. Scenario 16 breaks one thing after the other for `--random` minutes, by seed, in one
job after the other. `--write` puts the tables into docs/chaos.md, with the scenarios that were not played this time as
they were.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import binaries
import packages
import random_faults
import wrong_jobs
from chaos_page import plain_rows, random_row, row, write_page
from plain_torchrun import PlainTorchrun
from real_site import open_site
from scenarios import FAILURES, SCENARIOS, Undisturbed, play


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
                    recovery, differs = play(site, scenario, calm, folder)
                except FAILURES as error:
                    told(scenario.number, f"| {scenario.number} | {scenario.name} | – | – | – | – | no |", [str(error)])
                else:
                    told(scenario.number, row(scenario, recovery, differs), differs)
            if wanted("16"):
                chaos = random_faults.play(site, calm, minutes=options.random, seed=options.seed, folder=folder)
                told("16", random_row(options.random, options.seed, chaos), chaos.wrong)
            for each in filter(lambda w: wanted(w.number), wrong_jobs.WRONG_JOBS):
                try:
                    reason = wrong_jobs.play(site, each)
                except FAILURES as error:
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
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
