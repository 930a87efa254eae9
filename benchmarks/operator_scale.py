"""How the operator does with many jobs: a real control plane, nodes and pods played by kwok, one process of ours.

    python benchmarks/operator_scale.py [--jobs 1000] [--restart-jobs 5000] [--restart-pods 20000]

Prints each figure beside its goal. Coordinators are answered for by one small server that says what a run that trains
would say: a thousand real ones would measure this machine and not the operator.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import psutil
import yaml
from aiohttp import web

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

import binaries  # noqa: E402 - the harness is beside the tests
from control_plane import ControlPlane  # noqa: E402
from kwok import Kwok  # noqa: E402
from operators import OperatorProcess, apply_crds, grant  # noqa: E402

from sonoforge_trainer.contract import Activity, Progress  # noqa: E402

NAMESPACE = "scale"
GOALS = {
    "children of 1,000 jobs applied": (60.0, "s"),
    "1,000 jobs converged": (258.0, "s"),
    "resident memory at 1,000 jobs": (512.0, "MiB"),
    "99th percentile of a pass": (2.0, "s"),
    "ready again with 5,000 jobs and 20,000 pods": (30.0, "s"),
}
_NODES, _NODE_PODS = 60, 1000


class Answers:
    """One server for all coordinators: every run trains, and its newest step ended a moment ago."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        self._ready.wait()

    def _serve(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.run_until_complete(self._start())
        loop.run_forever()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/{namespace}/{service}/progress", self._progress)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/{{namespace}}/{{service}}"
        self._began = time.time()
        self._ready.set()

    async def _progress(self, request: web.Request) -> web.Response:
        now = time.time()
        step = int(now - self._began) + 1
        said = Progress(
            attempt="a",
            activity=Activity.TRAINING,
            updated=now,
            step=step,
            steps=100_000,
            step_time=now,
            samples=step * 32,
            world_size=1,
            nodes=1,
            samples_per_second=32.0,
            median_step_seconds=1.0,
        )
        return web.json_response(text=said.to_json())


def job(number: int) -> dict[str, Any]:
    """One of many jobs."""
    return {
        "apiVersion": "sonoforge.dev/v1alpha1",
        "kind": "PretrainJob",
        "metadata": {"name": f"job-{number:05d}", "namespace": NAMESPACE},
        "spec": {
            "runtimeRef": {"name": "cpu"},
            "training": {
                "data": {"shards": "s3://b/set/shards.json"},
                "recipe": {"preset": "tiny", "budgetSamples": 3_200_000, "globalBatch": 32, "virtualRanks": 4},
            },
            "checkpoints": {"uri": f"s3://b/run-{number}"},
        },
    }


def create(plane: ControlPlane, manifests: list[dict[str, Any]]) -> None:
    """Create objects, many at a time."""
    for first in range(0, len(manifests), 500):
        plane.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all(manifests[first : first + 500]))


def wait(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until a condition holds; infinite where it does not in time."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            return float("inf")
        time.sleep(0.5)
    return time.monotonic() - began


def percentile(metrics: dict[str, float], share: float) -> float:
    """Upper bound of the bucket of pass times that holds the percentile, in seconds."""
    prefix = 'sonoforge_reconcile_seconds_bucket{le="'
    buckets = sorted(
        (float(n.removeprefix(prefix).rstrip('"}')), v) for n, v in metrics.items() if n.startswith(prefix)
    )
    total = metrics["sonoforge_reconcile_seconds_count"]
    return next(bound for bound, count in buckets if count >= share * total)


def measure(jobs: int, restart_jobs: int, restart_pods: int) -> dict[str, float]:
    """Every figure by its name."""
    found: dict[str, float] = {}
    programs, kwok_folder = binaries.build()
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        plane = exits.enter_context(ControlPlane(programs, folder / "plane", audit=True))
        kwok = exits.enter_context(Kwok(kwok_folder / "kwok", plane))
        kwok.add_nodes(_NODES, capacity={"cpu": "1000", "memory": "4000Gi", "pods": str(_NODE_PODS)}, seconds=300)
        apply_crds(plane)
        plane.kubectl("create", "namespace", NAMESPACE)
        runtime = {
            "apiVersion": "sonoforge.dev/v1alpha1",
            "kind": "PretrainRuntime",
            "metadata": {"name": "cpu", "namespace": NAMESPACE},
            "spec": {"accelerator": {"resourceName": ""}},
        }
        create(plane, [runtime])
        answers = Answers()
        process = exits.enter_context(
            OperatorProcess(grant(plane, NAMESPACE), NAMESPACE, folder / "operator", answers.url, "--poll-seconds=2")
        )
        process.wait_until_ready(120)
        assert process.process is not None
        memory = psutil.Process(process.process.pid)

        began = time.monotonic()
        create(plane, [job(number) for number in range(jobs)])
        found["jobs created"] = time.monotonic() - began
        names = lambda kind: plane.get(kind, f"--namespace={NAMESPACE}")["items"]  # noqa: E731
        applied = lambda: len(names("jobs.batch")) >= jobs and len(names("deployments")) >= jobs  # noqa: E731
        wait(applied, 600)
        found[f"children of {jobs:,} jobs applied"] = time.monotonic() - began
        running = lambda: sum(  # noqa: E731
            o.get("status", {}).get("phase") == "Running" for o in names("pretrainjobs")
        )
        wait(lambda: running() >= jobs, 1200)
        found[f"{jobs:,} jobs converged"] = time.monotonic() - began
        found["jobs that run"] = running()
        found["worker Jobs, duplicates included"] = len(names("jobs.batch"))
        found[f"resident memory at {jobs:,} jobs"] = memory.memory_info().rss / 2**20
        metrics = process.metrics()
        found["99th percentile of a pass"] = percentile(metrics, 0.99)
        found["passes a job"] = metrics["sonoforge_reconcile_seconds_count"] / jobs
        user = f"system:serviceaccount:{NAMESPACE}:sonoforge-operator"
        writes = plane.writes(user)
        found["API writes a job, to converge"] = sum(writes.values()) / jobs
        print(json.dumps({" ".join(k): v for k, v in writes.most_common()}), file=sys.stderr)

        process.kill()
        if restart_jobs > jobs:
            create(plane, [job(number) for number in range(jobs, restart_jobs)])
        pods = len(names("pods"))
        template = names("pods")[0]
        labels = {k: v for k, v in template["metadata"]["labels"].items() if k.startswith(("sonoforge", "app."))}
        fillers = [filler(number, labels) for number in range(max(0, restart_pods - pods))]
        create(plane, fillers)
        began = time.monotonic()
        process.start()
        process.wait_until_ready(600)
        found[f"ready again with {restart_jobs:,} jobs and {restart_pods:,} pods"] = time.monotonic() - began
        assert process.process is not None
        found["resident memory after that"] = psutil.Process(process.process.pid).memory_info().rss / 2**20
    return found


def filler(number: int, labels: dict[str, str]) -> dict[str, Any]:
    """A pod that the operator has to know of, and that nobody owns."""
    container = {"name": "worker", "image": "example.invalid/trainer:1"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"filler-{number:05d}", "namespace": NAMESPACE, "labels": labels},
        "spec": {"containers": [container], "schedulerName": "nobody"},
    }


@click.command()
@click.option("--jobs", default=1000, show_default=True)
@click.option("--restart-jobs", default=5000, show_default=True)
@click.option("--restart-pods", default=20_000, show_default=True)
def main(jobs: int, restart_jobs: int, restart_pods: int) -> None:
    """Measure and print."""
    for name, value in measure(jobs, restart_jobs, restart_pods).items():
        goal = GOALS.get(name)
        text = f"goal < {goal[0]:.0f} {goal[1]}: {'met' if value < goal[0] else 'MISSED'}" if goal else ""
        print(f"{name:55} {value:10.2f}  {text}")


if __name__ == "__main__":
    main()
