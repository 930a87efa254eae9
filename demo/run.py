"""`make demo`: phantoms into a real S3 server, two elastic nodes that train on them, every checkpoint evaluated.

Everything is kept in runs/demo. Run it again and it goes on where it was, or shows what it found. It fails where the
last checkpoint is not better than the random initialisation.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from verdict import verdict

from sonoforge_operator.api import parse_job_file
from sonoforge_trainer.contract import RunSummary
from sonoforge_trainer.storage.server import S3Server

ROOT = Path(__file__).parents[1]
STATE = ROOT / "runs" / "demo"
SUMMARY = STATE / "summary.json"
DATA_SETS = {
    "pretrain": ["--count=6000", "--splits=1,0,0", "--seed=1", "--frames=2"],
    "phantoms": ["--count=1500", "--splits=0.4,0.2,0.4", "--seed=2", "--frames=1", "--clips=1"],
}


def main() -> int:
    """Start the server, make what is missing, run the job."""
    began = time.monotonic()
    STATE.mkdir(parents=True, exist_ok=True)
    say(began, "1/4", "starting an S3 server on this machine")
    with S3Server(STATE / "s3") as server:
        environment = os.environ | server.environment() | {"OMP_NUM_THREADS": "1"}
        for number, (name, options) in enumerate(DATA_SETS.items(), start=2):
            say(began, f"{number}/4", f"making phantoms: {name}")
            output = f"--output=s3://sonoforge/demo/{name}"
            sonoforge(environment, "synth", output, f"--name={name}", "--size=64", "--shard-samples=250", *options)
        say(began, "4/4", "training and evaluating: manifests/samples/demo.yaml")
        job = ROOT / "manifests" / "samples" / "demo.yaml"
        code = sonoforge(environment, "run", str(job), f"--state={STATE}", check=False, show=True)
    if code == 0:
        found = verdict(parse_job_file(job.read_text(), where=str(job)), RunSummary.from_json(SUMMARY.read_text()))
        say(began, "4/4", found.sentence)
        code = 0 if found.learned else 1
    say(began, "done" if code == 0 else "failed", f"exit code {code}")
    return code


def sonoforge(environment: dict[str, str], *arguments: str, check: bool = True, show: bool = False) -> int:
    """Run a sub-command; its output is shown, or kept for when it fails."""
    command = [sys.executable, "-m", "sonoforge_trainer", *arguments]
    done = subprocess.run(command, env=environment, capture_output=not show, text=True, check=False)
    if check and done.returncode:
        sys.exit(f"sonoforge {arguments[0]} failed:\n{done.stderr[-2000:]}")
    return done.returncode


def say(began: float, step: str, text: str) -> None:
    """One progress line."""
    print(f"[{step}] {text} ({time.monotonic() - began:.0f} s)", flush=True)  # noqa: T201 - for a person


if __name__ == "__main__":
    sys.exit(main())
