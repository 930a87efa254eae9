"""Kill processes of a run at random, by seed, and compare what it learned from with an undisturbed run.

    python benchmarks/chaos.py --kills 50 --seed 0

Two runs of one job, same data and seed: one is left alone, the other loses a worker, an agent, the coordinator or the
runner to SIGKILL again and again. Both must end with the same sample log and the same schedules, losses within the
tolerance, nothing twice in any log, each sample once an epoch, and every checkpoint evaluated once. Prints the seconds
from each kill to the next step. Fails also where fewer processes were killed than asked for.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
from audit import Logs, epoch_faults, event_faults, log_faults, read_logs

from sonoforge_operator.local import Endpoints
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import Progress, RunConfig

_LOOK_SECONDS = 0.05
KINDS = ("worker", "agent", "coordinator", "runner")
ROUNDING_STEPS, ROUNDING, GROWN = 400, 1e-5, 2e-3
"""Largest relative difference of the logged loss between two runs (fp32 on CPU): in the first steps, and in all.

One process and two add the same numbers in another order. Undisturbed, that gives 1e-7 in the first 500 steps; then a
nearest neighbour in KoLeo flips on a rounding, and the runs part by some 1e-4: 2.8e-4 was the most in 1,500 steps.
Losses of different batches differ by some 1e-2."""

JOB = """
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainJob
metadata: {{name: {name}}}
spec:
  runtimeRef: {{name: cpu}}
  training:
    model: {{depth: 2}}
    data: {{shards: "{data}/train/shards.json"}}
    recipe:
      preset: tiny
      budgetSamples: {budget}
      globalBatch: 16
      virtualRanks: 4
      head: {{prototypes: 256}}
      crops: {{globalSize: 32, localSize: 16, localCount: 2}}
  workers: {{minNodes: 1, maxNodes: {nodes}}}
  checkpoints: {{uri: "{data}/runs/{name}", everySamples: {every}, keepLast: 1000}}
  evaluation: {{suiteRef: {{name: tiny}}, bestBy: tiny-knn/f1_macro}}
---
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainRuntime
metadata: {{name: cpu}}
spec: {{execution: {{device: cpu, loaderWorkers: 0, recordSamples: true, logEverySteps: 1}}}}
---
apiVersion: sonoforge.dev/v1alpha1
kind: EvalSuite
metadata: {{name: tiny}}
spec:
  evaluations:
    - {{name: tiny, shards: "{data}/eval/shards.json", protocols: [knn, health], bootstrap: 0}}
"""


@dataclass(frozen=True)
class Kill:
    """One kill and what followed."""

    kind: str
    step: int
    seconds: float | None
    """From the kill to the end of the next step; None where the job ended before one was seen."""


@dataclass
class Outcome:
    """What a run came to."""

    status: JobStatus
    samples: dict[tuple[int, int], list[str]]
    """Keyed hashes of the samples, by (step, virtual rank)."""
    metrics: dict[int, dict[str, Any]]
    """Metric record by step."""
    logs: Logs
    """The same records as they were committed, where one may be there twice."""
    state: Path
    """Folder of the runner."""
    kills: list[Kill] = field(default_factory=list)


def make_data(folder: Path) -> None:
    """Phantoms to train on and to evaluate with."""
    for name, splits, count in (("train", "1,0,0", 240), ("eval", "0.5,0.2,0.3", 120)):
        _sonoforge(
            *("synth", "--output", str(folder / name), "--name", name, "--count", str(count)),
            *("--size", "48", "--splits", splits, "--shard-samples", "40", "--frames", "2"),
        )


def write_job(folder: Path, name: str, *, steps: int, nodes: int, every: int = 8) -> Path:
    """A job file on the data in `folder`. The same hash key for every job, so that sample logs can be compared."""
    path = folder / f"{name}.yaml"
    data = f"file://{folder}"
    path.write_text(JOB.format(name=name, data=data, budget=steps * 16, every=every * 16, nodes=nodes))
    state = folder / "state" / name
    state.mkdir(parents=True, exist_ok=True)
    (state / "hash.key").write_text("ab" * 32)
    return path


class LocalRun:
    """A `sonoforge run` that is started again whenever it was killed."""

    def __init__(self, job: Path) -> None:
        self.job = job
        self.state = job.parent / "state" / job.stem
        self.runner = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> subprocess.Popen[bytes]:
        with (self.state / "runner.log").open("ab") as log:
            command = ["run", str(self.job), "--state", str(self.state), "--quiet"]
            return subprocess.Popen(
                [sys.executable, "-m", "sonoforge_trainer", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_again(self) -> None:
        """Give the command again."""
        assert self.runner.poll() is not None
        self.runner = self._start()

    def revive(self) -> None:
        """Start the runner again if it was killed."""
        if self.runner.poll() == -signal.SIGKILL:
            self.start_again()

    def stop(self) -> None:
        """End the runner and everything it started, without saving."""
        self.runner.kill()
        self.runner.wait()
        mark = f"{self.state.resolve()}/"
        for process in psutil.process_iter():
            try:
                if process.environ().get("SONOFORGE_CHILD", "").startswith(mark):
                    process.kill()
            except psutil.Error:
                continue

    def progress(self) -> Progress | None:
        """What the coordinator says, or None."""
        path = self.state / "coordinator.json"
        if not path.exists():
            return None
        where = Endpoints.from_json(path.read_text())
        request = urllib.request.Request(
            f"http://{where.host}:{where.http_port}/progress",
            headers={"Authorization": f"Bearer {(self.state / 'token').read_text()}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=2) as answer:
                return Progress.from_json(answer.read())
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            return None

    def pids(self, kind: str) -> list[int]:
        """Process ids of a kind."""
        if kind == "runner":
            return [self.runner.pid]
        prefix = {"worker": "worker-", "agent": "worker-", "coordinator": "coordinator-"}[kind]
        agents = []
        for path in (self.state / "children").glob(f"{prefix}*.pid"):
            text = path.read_text().strip()
            if text.isdigit() and psutil.pid_exists(int(text)):
                agents.append(int(text))
        if kind != "worker":
            return agents
        found = []
        for agent in agents:
            try:
                found += [p.pid for p in psutil.Process(agent).children(recursive=True) if _is_worker(p)]
            except psutil.Error:
                continue
        return found

    def wait(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait for a condition, keeping the runner alive."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.revive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.job.stem}: nothing within {seconds:.0f} s\n{self.tail()}")
            time.sleep(_LOOK_SECONDS)

    def finish(self, seconds: float) -> int:
        """Wait for the end of the job. Returns the runner's exit code."""
        self.wait(lambda: self.runner.poll() not in (None, -signal.SIGKILL), seconds)
        return self.runner.wait()

    def tail(self) -> str:
        """The end of the runner's log."""
        return "\n".join((self.state / "runner.log").read_text().splitlines()[-15:])

    def outcome(self, kills: list[Kill] | None = None) -> Outcome:
        """Read back what the run committed."""
        status = JobStatus.from_json((self.state / "status.json").read_text())
        logs = read_logs(Path(c.ref.uri.removeprefix("file://")) for c in status.checkpoints)
        return Outcome(status, dict(logs.samples), dict(logs.metrics), logs, self.state, kills or [])


def _is_worker(process: psutil.Process) -> bool:
    """Whether a process trains: workers are forked by the agent's fork server."""
    try:
        parent = process.parent()
        return parent is not None and any("forkserver" in word for word in parent.cmdline())
    except psutil.Error:
        return False


def disturb(run: LocalRun, *, kills: int, seed: int) -> list[Kill]:
    """Kill random processes at random steps, each after the run stepped again. Returns the kills that were made."""
    draw = random.Random(seed)
    done: list[Kill] = []
    at: list[int] = []
    while len(done) < kills:
        run.wait(lambda: _stepping(run, since=0.0) or _over(run))
        before = run.progress()
        if _over(run):
            break  # the job ended before it was killed often enough
        if before is None:
            continue
        # The last tenth is left to the last recovery.
        at = at or sorted(draw.randint(1, before.steps * 9 // 10) for _ in range(kills))
        if before.step < at[len(done)]:
            time.sleep(_LOOK_SECONDS)
            continue
        time.sleep(draw.uniform(0.0, before.median_step_seconds or 0.0))  # any moment of a step
        kind = draw.choice(KINDS)
        targets = run.pids(kind)
        if not targets:
            continue
        killed = time.time()
        try:
            os.kill(draw.choice(sorted(targets)), signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself meanwhile
        # A worker's end is felt when the group has formed again: a step that was under way is no recovery.
        old_group = before.attempt if kind in ("worker", "agent") else None
        run.wait(lambda since=killed, group=old_group: _stepping(run, since=since, not_in=group) or _over(run))
        after = run.progress()
        seconds = after.step_time - killed if after and after.step_time > killed else None
        done.append(Kill(kind, before.step, seconds))
        told = "the job ended before the next step was seen" if seconds is None else f"next step after {seconds:.1f} s"
        print(f"kill {len(done)}/{kills}: {kind} at step {done[-1].step}, {told}", flush=True)
    return done


def _stepping(run: LocalRun, since: float, not_in: str | None = None) -> bool:
    progress = run.progress()
    return progress is not None and progress.step_time > since and progress.step > 0 and progress.attempt != not_in


def _over(run: LocalRun) -> bool:
    return run.runner.poll() not in (None, -signal.SIGKILL)


def differences(one: Outcome, other: Outcome) -> list[str]:
    """What differs between two runs that should be equal; empty where nothing does."""
    found = []
    if one.samples != other.samples:
        places = sorted(one.samples.keys() | other.samples.keys())
        wrong = [k for k in places if one.samples.get(k) != other.samples.get(k)]
        found.append(f"sample logs differ at {len(wrong)} places, first {wrong[:3]}")
    found += [
        f"schedules differ: {name}"
        for name in ("lr", "weight_decay", "teacher_momentum", "teacher_temperature")
        if {s: r[name] for s, r in one.metrics.items()} != {s: r[name] for s, r in other.metrics.items()}
    ]
    if one.metrics.keys() != other.metrics.keys():
        found.append("metric logs have different steps")
    for until, tolerance in ((ROUNDING_STEPS, ROUNDING), (None, GROWN)):
        worst = loss_difference(one, other, until)
        if worst > tolerance:
            where = f"in the first {until} steps" if until else "in the whole run"
            found.append(f"losses differ by {worst:.2e} {where}, more than {tolerance:.0e}")
    for outcome in (one, other):
        if outcome.status.phase != "Succeeded":
            found.append(f"a run ended as {outcome.status.phase}")
        for checkpoint in outcome.status.checkpoints:
            if [e.phase for e in checkpoint.evaluations] != ["Succeeded"]:
                found.append(f"{checkpoint.ref.id} was not evaluated")
            results = list(Path(checkpoint.ref.uri.removeprefix("file://")).glob("eval/*.json"))
            if len(results) != 1:
                found.append(f"{checkpoint.ref.id} has {len(results)} results")
        found += faults(outcome)
    return found


def faults(outcome: Outcome) -> list[str]:
    """What must not be in the logs and events of a run, whatever it is compared with."""
    config = RunConfig.from_json((outcome.state / "config.json").read_text())
    recipe = config.training.recipe
    manifest = Path(config.training.data.shards.removeprefix("file://"))
    hash_key = (outcome.state / "hash.key").read_bytes().strip()
    found = [
        *log_faults(outcome.logs, steps=recipe.steps, virtual_ranks=recipe.virtual_ranks),
        *epoch_faults(outcome.logs, manifest, hash_key, virtual_ranks=recipe.virtual_ranks),
        *event_faults(outcome.state / "events.jsonl", [c.ref.id for c in outcome.status.checkpoints]),
    ]
    return [f"{config.job}: {fault}" for fault in found]


def loss_difference(one: Outcome, other: Outcome, until: int | None = None) -> float:
    """Largest relative difference of the loss at any step, or at any up to a step."""
    steps = {s for s in one.metrics.keys() & other.metrics.keys() if until is None or s <= until}
    return max((abs(one.metrics[s]["loss"] / other.metrics[s]["loss"] - 1) for s in steps), default=0.0)


def table(kills: list[Kill]) -> str:
    """Recovery by kind, in Markdown."""
    rows = ["| killed | times | median s | worst s |", "|---|---|---|---|"]
    for kind in (*KINDS, "any"):
        seconds = [k.seconds for k in kills if kind in (k.kind, "any") and k.seconds is not None]
        if seconds:
            rows.append(f"| {kind} | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |")
    return "\n".join(rows)


def _sonoforge(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "sonoforge_trainer", *arguments], check=True, capture_output=True)


def main() -> int:
    """Run both jobs and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    # Without a coordinator or a runner training goes on, so that a kill can cost many steps of the run.
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="sonoforge-chaos-")))
        make_data(folder)
        job = write_job(folder, "calm", steps=options.steps, nodes=1, every=options.every)
        calm = exits.enter_context(LocalRun(job))
        calm.finish(3600)
        job = write_job(folder, "wild", steps=options.steps, nodes=options.nodes, every=options.every)
        wild = exits.enter_context(LocalRun(job))
        kills = disturb(wild, kills=options.kills, seed=options.seed)
        wild.finish(3600)
        one, other = calm.outcome(), wild.outcome(kills)
        found = differences(one, other)
        if len(kills) != options.kills:
            found.append(f"{len(kills)} processes were killed, not {options.kills}; give more --steps")
    print(table(kills))
    print(f"restarts: {other.status.restarts}; steps done again: {other.status.lost_steps}")
    print(f"checkpoints: {len(other.status.checkpoints)}")
    for until in (ROUNDING_STEPS, options.steps):
        print(f"largest relative loss difference up to step {until}: {loss_difference(one, other, until):.1e}")
    for difference in found:
        print(f"DIFFERENT: {difference}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
