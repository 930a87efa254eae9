"""How the operator does with many jobs: a real control plane, nodes and pods played by kwok, one process of ours.

    python benchmarks/operator_scale.py [--jobs 1000] [--restart-jobs 5000] [--restart-pods 20000]

Prints each figure beside its goal. Coordinators are answered for by one small server that says what a run that trains
would say: a thousand real ones would measure this machine and not the operator.

What is the limit shows in two ways: the processor time of every program over the run, and the same children applied
again by a bare loop that decides nothing, in a namespace of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import psutil
from aiohttp import web
from kubernetes import config

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
_CREATORS = 16
_JOBS = f"/apis/sonoforge.dev/v1alpha1/namespaces/{NAMESPACE}/pretrainjobs"
_RUNTIMES = f"/apis/sonoforge.dev/v1alpha1/namespaces/{NAMESPACE}/pretrainruntimes"
_CHILDREN = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
_DEPLOYMENTS = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_BARE = "bare"
_APPLIED = {
    "configmaps": "/api/v1",
    "serviceaccounts": "/api/v1",
    "services": "/api/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "deployments": "/apis/apps/v1",
    "jobs": "/apis/batch/v1",
}
"""Path of each kind that the operator applies for a job before it trains."""
RUNTIME = {
    "apiVersion": "sonoforge.dev/v1alpha1",
    "kind": "PretrainRuntime",
    "metadata": {"name": "cpu", "namespace": NAMESPACE},
    "spec": {"accelerator": {"resourceName": ""}},
}


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


class Objects:
    """Objects of the namespace, made and counted at little cost: what measures must not be what is measured."""

    def __init__(self, plane: ControlPlane) -> None:
        self._client = config.new_client_from_config(str(plane.kubeconfig))

    def create(self, path: str, manifests: list[dict[str, Any]]) -> None:
        """Make objects, several at a time."""
        with ThreadPoolExecutor(_CREATORS) as pool:
            list(pool.map(lambda manifest: self._call("POST", path, manifest), manifests))

    def apply(self, paths_and_manifests: list[tuple[str, dict[str, Any]]]) -> None:
        """Make objects by server-side apply, several at a time."""
        content = "application/apply-patch+yaml"
        with ThreadPoolExecutor(_CREATORS) as pool:
            list(pool.map(lambda each: self._call("PATCH", *each, content=content), paths_and_manifests))

    def of_operator(self, path: str) -> list[dict[str, Any]]:
        """Every object there that the operator made."""
        page = self._call("GET", f"{path}?labelSelector=app.kubernetes.io/managed-by%3Dsonoforge")
        form = {"apiVersion": page["apiVersion"], "kind": page["kind"].removesuffix("List")}
        return [{**form, **item} for item in page["items"]]

    def count(self, path: str) -> int:
        """How many there are; the server says how many follow the first."""
        page = self._call("GET", f"{path}?limit=1")
        return len(page["items"]) + int(page["metadata"].get("remainingItemCount") or 0)

    def first(self, path: str) -> dict[str, Any]:
        """One of them."""
        found: dict[str, Any] = self._call("GET", f"{path}?limit=1")["items"][0]
        return found

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, content: str = "application/json"
    ) -> dict[str, Any]:
        headers = {"Accept": "application/json", "Content-Type": content}
        request = self._client.param_serialize(
            method, path, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        answer = self._client.call_api(*request)
        document: dict[str, Any] = json.loads(answer.read())
        if answer.status >= 400:
            raise RuntimeError(f"{method} {path}: {document.get('message')}")
        return document


def wait(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until a condition holds; infinite where it does not in time."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            return float("inf")
        time.sleep(0.5)
    return time.monotonic() - began


def percentile(metrics: dict[str, float], share: float, histogram: str = "sonoforge_reconcile_seconds") -> float:
    """Upper bound of the bucket of pass times that holds the percentile, in seconds."""
    prefix = f'{histogram}_bucket{{le="'
    buckets = sorted(
        (float(n.removeprefix(prefix).rstrip('"}')), v) for n, v in metrics.items() if n.startswith(prefix)
    )
    total = metrics[f"{histogram}_count"]
    return next(bound for bound, count in buckets if count >= share * total)


def measure(jobs: int, restart_jobs: int, restart_pods: int) -> dict[str, float]:
    """Every figure by its name."""
    programs, kwok_folder = binaries.build()
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        plane = exits.enter_context(ControlPlane(programs, folder / "plane", audit=True))
        kwok = exits.enter_context(Kwok(kwok_folder / "kwok", plane))
        kwok.add_nodes(_NODES, capacity={"cpu": "1000", "memory": "4000Gi", "pods": str(_NODE_PODS)}, seconds=300)
        apply_crds(plane)
        plane.kubectl("create", "namespace", NAMESPACE)
        objects = Objects(plane)
        objects.create(_RUNTIMES, [RUNTIME])
        process = exits.enter_context(
            OperatorProcess(grant(plane, NAMESPACE), NAMESPACE, folder / "operator", Answers().url, "--poll-seconds=2")
        )
        process.wait_until_ready(120)
        programs_of = {name: component.pid for name, component in (*plane.components.items(), ("kwok", kwok.component))}
        found = converge(plane, objects, process, jobs, programs_of)
        if restart_jobs:
            found |= restart(objects, process, jobs, restart_jobs, restart_pods)
    return found


def converge(
    plane: ControlPlane, objects: Objects, process: OperatorProcess, jobs: int, programs_of: dict[str, int]
) -> dict[str, float]:
    """Many jobs at once, until each of them runs."""
    found: dict[str, float] = {}
    assert process.process
    programs_of = {**programs_of, "the operator": process.process.pid}
    used = {name: processor_seconds(pid) for name, pid in programs_of.items()}
    began = time.monotonic()
    objects.create(_JOBS, [job(number) for number in range(jobs)])
    found["jobs created"] = time.monotonic() - began
    ages: list[float] = []

    def made() -> bool:
        ages.append(process.metrics()["sonoforge_queue_oldest_seconds"])
        return objects.count(_CHILDREN) >= jobs and objects.count(_DEPLOYMENTS) >= jobs

    def converged() -> bool:
        ages.append(process.metrics()["sonoforge_queue_oldest_seconds"])
        return running(process) >= jobs

    wait(made, 600)
    found[f"children of {jobs:,} jobs applied"] = time.monotonic() - began
    wait(converged, 1200)
    found[f"{jobs:,} jobs converged"] = time.monotonic() - began
    for name, pid in programs_of.items():
        found[f"  processor seconds of {name}"] = processor_seconds(pid) - used[name]
    found["  share of this machine's processors in use"] = sum(
        found[f"  processor seconds of {name}"] for name in programs_of
    ) / ((time.monotonic() - began) * len(os.sched_getaffinity(0)))
    found["jobs that run"] = running(process)
    found["worker Jobs, duplicates included"] = objects.count(_CHILDREN)
    found[f"resident memory at {jobs:,} jobs"] = resident(process)
    metrics = process.metrics()
    found["99th percentile of a pass"] = percentile(metrics, 0.99)
    found["  with its wait for a turn"] = percentile(metrics, 0.99, "sonoforge_reconcile_whole_seconds")
    found["longest wait of a job in the queue or a pass"] = max(ages)
    found["passes a job"] = metrics["sonoforge_reconcile_seconds_count"] / jobs
    writes = plane.writes(f"system:serviceaccount:{NAMESPACE}:sonoforge-operator")
    found["API writes a job, to converge"] = sum(writes.values()) / jobs
    for (verb, resource), count in sorted(writes.items()):
        found[f"  {verb} {resource}"] = count / jobs
    found[f"the same children of {jobs:,} jobs by a bare loop"] = bare(plane, objects, process)
    return found


def bare(plane: ControlPlane, objects: Objects, process: OperatorProcess) -> float:
    """Seconds in which a loop that decides nothing applies the same children, while the operator is away."""
    process.terminate()
    made = {plural: objects.of_operator(f"{api}/namespaces/{NAMESPACE}/{plural}") for plural, api in _APPLIED.items()}
    plane.kubectl("create", "namespace", _BARE)
    wanted = []
    for plural, found in made.items():
        for manifest in found:
            path = f"{_APPLIED[plural]}/namespaces/{_BARE}/{plural}/{manifest['metadata']['name']}"
            wanted.append((f"{path}?fieldManager=bare&force=true", applied(manifest)))
    wanted.sort(key=lambda each: each[1]["metadata"]["labels"]["sonoforge.dev/job"])  # job by job, as the operator does
    began = time.monotonic()
    objects.apply(wanted)
    seconds = time.monotonic() - began
    process.start()
    process.wait_until_ready(120)
    return seconds


def applied(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the operator applied to get an object: what it owns of the fields that are there, in another namespace."""
    entry = next(e for e in manifest["metadata"]["managedFields"] if e.get("operation") == "Apply")
    owned: dict[str, Any] = select(manifest, entry["fieldsV1"])
    owned["metadata"] = {**owned["metadata"], "name": manifest["metadata"]["name"], "namespace": _BARE}
    owned["metadata"].pop("ownerReferences", None)
    return {"apiVersion": manifest["apiVersion"], "kind": manifest["kind"], **owned}


def select(value: Any, fields: dict[str, Any]) -> Any:
    """The part of a value that a set of managed fields names (the format FieldsV1 of Kubernetes)."""
    fields = {key: inner for key, inner in fields.items() if key != "."}
    if not fields or not isinstance(value, (dict, list)):
        return value
    if isinstance(value, dict):
        return {key[2:]: select(value[key[2:]], inner) for key, inner in fields.items() if key[2:] in value}
    chosen = []
    for key, inner in fields.items():
        if key.startswith("k:"):
            wanted = json.loads(key[2:])
            chosen += [select(v, inner) for v in value if all(v.get(k) == w for k, w in wanted.items())]
        elif key.startswith("v:"):
            chosen.append(json.loads(key[2:]))
    return chosen


def processor_seconds(pid: int) -> float:
    """Processor time that a process used so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def restart(
    objects: Objects, process: OperatorProcess, jobs: int, restart_jobs: int, restart_pods: int
) -> dict[str, float]:
    """An operator that ends well, and the next one with more objects. After a kill it waits for the Lease besides."""
    process.terminate()
    objects.create(_JOBS, [job(number) for number in range(jobs, restart_jobs)])
    metadata = objects.first(_PODS)["metadata"]
    labels = {k: v for k, v in metadata["labels"].items() if k.startswith(("sonoforge", "app."))}
    objects.create(_PODS, [filler(number, labels) for number in range(restart_pods - objects.count(_PODS))])
    began = time.monotonic()
    process.start()
    process.wait_until_ready(600)
    found = {f"ready again with {restart_jobs:,} jobs and {restart_pods:,} pods": time.monotonic() - began}
    return found | {"resident memory after that": resident(process)}


def running(process: OperatorProcess) -> int:
    """Jobs that the operator shows as Running."""
    phases = (name for name in process.metrics() if name.startswith("sonoforge_job_phase{"))
    return sum('phase="Running"' in name for name in phases)


def resident(process: OperatorProcess) -> float:
    """Memory of the operator in MiB."""
    assert process.process is not None
    return float(psutil.Process(process.process.pid).memory_info().rss) / 2**20


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
