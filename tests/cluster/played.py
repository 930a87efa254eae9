"""A played run: the containers of a namespace without containers. The API server, its controllers, the scheduler, the
operator and the coordinators are the real programs; only what a GPU would do is played, by these lines.

Workers run once kwok says so. While enough of them do, the run makes steps, commits checkpoints and says so to its real
coordinator. Evaluations, listings and deletions end as the real commands would.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes import client
from played_coordinators import Coordinator, Switchboard
from pods import PodPlayer

from sonoforge_operator.cluster.names import (
    ANNOTATION_REQUEST,
    LABEL_ATTEMPT,
    LABEL_CHILD,
    LABEL_JOB,
    LABEL_PART,
)
from sonoforge_trainer.contract import (
    Activity,
    CheckpointRef,
    EvaluationRequest,
    ExitCode,
    Progress,
    RunConfig,
    Termination,
)

_TICK_SECONDS = 0.1


@dataclass
class Run:
    """What a run is and what it left in its storage."""

    config: RunConfig
    min_nodes: int
    step: int = 0
    storage: list[CheckpointRef] = field(default_factory=list)
    """Committed checkpoints."""
    group: str = ""
    """Identity of the process group; changes where nodes come or go."""
    restored: int | None = None
    evaluated: list[str] = field(default_factory=list)
    """Ids of the evaluations that were done, one entry for each time."""
    deleted: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    """Ids of the requests to save and leave that were carried out."""
    history: list[tuple[float, str, int]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.config.training.recipe.steps

    def commit(self) -> None:
        if any(ref.step == self.step for ref in self.storage):
            return
        ref = CheckpointRef(
            step=self.step,
            samples=self.step * self.config.training.recipe.global_batch,
            uri=f"{self.config.checkpoints.uri}/step-{self.step:010d}/attempt-{len(self.storage)}",
            manifest_digest=f"sha256:{self.step:064x}",
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        self.storage.append(ref)


class Played:
    """Plays the containers of a namespace in a thread of its own, until it is left."""

    def __init__(
        self,
        api_client: client.ApiClient,
        namespace: str,
        folder: Path,
        switchboard: Switchboard,
        *,
        score: Callable[[int], float] = lambda step: 0.5 + step / 1000,
        steps_a_tick: int = 2,
        checkpoint_steps: int = 20,
    ) -> None:
        self.namespace = namespace
        self._core, self._apps = client.CoreV1Api(api_client), client.AppsV1Api(api_client)
        self._pods = PodPlayer(self._core, namespace)
        self._folder, self._switchboard = folder, switchboard
        self._score, self._steps_a_tick, self._checkpoint_steps = score, steps_a_tick, checkpoint_steps
        self.runs: dict[str, Run] = {}
        """Runs by the name of their job."""
        self.coordinators: dict[str, Coordinator] = {}
        """Coordinators by the name of their Service."""
        self.paused = False
        """No step is made; everything else goes on."""
        self.halt: int | None = None
        """No step is made after this one, however long it takes until somebody has seen it."""
        self.fail_next: dict[str, tuple[int, str]] = {}
        """By part or child: exit code and termination message with which its next pod ends."""
        self.fail_evaluation: set[int] = set()
        """Steps of the checkpoints whose next evaluation fails."""
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._play, daemon=True)

    def __enter__(self) -> Played:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        for coordinator in self.coordinators.values():
            coordinator.kill()

    def _play(self) -> None:
        while not self._stop.wait(_TICK_SECONDS):
            try:
                self._tick()
            except client.ApiException as error:
                if error.status not in (404, 409):
                    self.errors.append(str(error)[:300])
            except Exception as error:  # noqa: BLE001 - the API server may be away in a test
                self.errors.append(f"{type(error).__name__}: {error}"[:300])

    def _tick(self) -> None:
        pods = self._core.list_namespaced_pod(self.namespace).items
        here = [pod for pod in pods if pod.metadata.deletion_timestamp is None]
        running = [pod for pod in here if pod.status.phase == "Running"]
        self._play_coordinators()
        by_job: dict[str, list[Any]] = {}
        for pod in running:
            labels = pod.metadata.labels or {}
            if labels.get(LABEL_PART) == "worker":
                by_job.setdefault(labels[LABEL_JOB], []).append(pod)
            elif labels.get(LABEL_CHILD):
                self._play_child(pod)
        for job in set(by_job) | set(self.runs):
            self._play_run(job, by_job.get(job, []))

    # --- coordinators -------------------------------------------------------------------------------------------------

    def _play_coordinators(self) -> None:
        deployments = self._apps.list_namespaced_deployment(self.namespace).items
        names = {d.metadata.name: d for d in deployments if d.metadata.deletion_timestamp is None}
        for name, deployment in names.items():
            place = f"{self.namespace}/{name}"
            config = self._core.read_namespaced_config_map(name.removesuffix("-coordinator"), self.namespace)
            if name not in self.coordinators:
                job = deployment.metadata.labels[LABEL_JOB]
                self.coordinators[name] = Coordinator(self._folder / name, config.data["token"], job)
                parsed = RunConfig.from_json(config.data["config.json"])
                known = self.runs.get(job)
                if known is None or known.config.uid != parsed.uid:
                    self.runs[job] = Run(parsed, self._min_nodes(job))
            self.coordinators[name].take_token(config.data["token"])
            addresses = self.coordinators[name].addresses
            if addresses:
                self._switchboard.targets[place] = addresses["http"]
        for name in set(self.coordinators) - set(names):
            self._switchboard.targets.pop(f"{self.namespace}/{name}", None)
            self.coordinators.pop(name).kill()

    def _min_nodes(self, job: str) -> int:
        found = client.CustomObjectsApi(self._core.api_client).get_namespaced_custom_object(
            "sonoforge.dev", "v1alpha1", self.namespace, "pretrainjobs", job
        )
        nodes: int = found["spec"].get("workers", {}).get("minNodes", 1)
        return nodes

    def _coordinator(self, job: str) -> Coordinator | None:
        return next((found for found in self.coordinators.values() if found.job == job), None)

    # --- training -----------------------------------------------------------------------------------------------------

    def _play_run(self, job: str, workers: list[Any]) -> None:
        run = self.runs.get(job)
        if run is None:
            return
        if "worker" in self.fail_next and workers:
            code, message = self.fail_next.pop("worker")
            self._pods.fail(workers[0].metadata.name, code, message)
            return
        coordinator = self._coordinator(job)
        publisher = coordinator.publisher if coordinator else None
        if (
            len(workers) < run.min_nodes
            or coordinator is None
            or publisher is None
            or (run.step >= run.steps and not workers)
        ):
            run.group = ""
            return
        members = ",".join(sorted(pod.metadata.uid for pod in workers))
        if run.group != members:  # a new process group goes on from the newest checkpoint
            run.restored = max((ref.step for ref in run.storage), default=None)
            run.step, run.group = run.restored or 0, members
        if not run.storage:
            run.commit()
        last = run.steps if self.halt is None else min(self.halt, run.steps)
        if not self.paused and run.step < last:
            for _ in range(self._steps_a_tick):
                run.step += 1
                if run.step % self._checkpoint_steps == 0 or run.step == run.steps:
                    run.commit()
                if run.step == last:
                    break
            run.history.append((time.time(), members, run.step))
        attempt = max(int(pod.metadata.labels[LABEL_ATTEMPT]) for pod in workers)
        identity = f"{attempt}-{run.group[:40]}"
        for request in publisher.requests():
            if request.kind == "stop" and request.attempt == identity:
                run.commit()
                run.stops.append(request.id)
                publisher.publish(self._progress(run, len(workers), attempt, Activity.STOPPED))
                for pod in workers:
                    left = Termination(cause="terminated", final=True)
                    self._pods.fail(pod.metadata.name, ExitCode.TERMINATED, left.to_json())
                publisher.acknowledge(request)
                return
        publisher.publish(self._progress(run, len(workers), attempt, Activity.TRAINING))
        if run.step >= run.steps and coordinator.heard(run.step):
            for pod in workers:
                self._pods.succeed(pod.metadata.name, Termination(cause="done").to_json())

    def _progress(self, run: Run, nodes: int, attempt: int, activity: Activity) -> Progress:
        recipe = run.config.training.recipe
        done = run.step >= run.steps
        return Progress(
            attempt=f"{attempt}-{run.group[:40]}",
            activity=Activity.FINISHED if done else activity,
            updated=time.time(),
            step=run.step,
            steps=run.steps,
            step_time=run.history[-1][0] if run.history else 0.0,
            samples=run.step * recipe.global_batch,
            budget_samples=recipe.budget_samples,
            world_size=nodes,
            nodes=nodes,
            samples_per_second=100.0,
            loss=1.0 / (1 + run.step),
            median_step_seconds=_TICK_SECONDS / self._steps_a_tick,
            restored_step=run.restored,
            checkpoints=tuple(run.storage),
            dataset_samples=1000,
        )

    # --- small processes ----------------------------------------------------------------------------------------------

    def _play_child(self, pod: Any) -> None:
        labels, name = pod.metadata.labels, pod.metadata.name
        run = self.runs[labels[LABEL_JOB]]
        child: str = labels[LABEL_CHILD]
        kind = child.split("-")[0]
        if kind in self.fail_next:
            code, message = self.fail_next.pop(kind)
            self._pods.fail(name, code, message)
            return
        result: Mapping[str, object] = {}
        if kind in ("eval", "floor"):
            request = EvaluationRequest.from_json(pod.metadata.annotations[ANNOTATION_REQUEST])
            step = int(request.checkpoint_uri.split("step-")[1].split("/")[0])
            if kind == "eval" and step in self.fail_evaluation:
                self.fail_evaluation.remove(step)
                said = Termination(cause="application", message="a fault of the test")
                self._pods.fail(name, 1, said.to_json())
                return
            if kind == "eval":
                run.evaluated.append(request.id)
                value = self._score(step)
                metrics = ("f1_macro", "val_f1_macro")
                result = {f"{p}/{m}": {"value": value} for p in request.evaluation.protocols for m in metrics}
        if kind == "inventory":
            known = {a.split("=")[1] for a in pod.spec.containers[0].command if a.startswith("--known=")}
            fresh = [ref.document() for ref in run.storage if ref.id not in known]
            result = {"checkpoints": fresh[:8]}  # about as many as a message holds
        if kind == "retention":
            ids = [a.split("=")[1] for a in pod.spec.containers[0].command if a.startswith("--delete=")]
            run.deleted += ids
            run.storage = [ref for ref in run.storage if ref.id not in ids]
        self._pods.succeed(name, Termination(cause="done", result=dict(result)).to_json())
