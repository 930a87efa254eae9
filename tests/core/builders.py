"""Small builders for tests of the planning core: jobs, checkpoints and a world that obeys a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from sonoforge_operator.api import JobFile, parse_job_file
from sonoforge_operator.observed import ChildFact, Observed, Plan
from sonoforge_operator.plan import plan
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import Activity, CheckpointConfig, CheckpointRef, Progress, Termination

JOB = """
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainJob
metadata: {name: fetal}
spec:
  training:
    data: {shards: s3://b/set/shards.json}
    recipe: {preset: tiny, budgetSamples: 3200}
  workers: {minNodes: 1, maxNodes: 2}
  checkpoints: {uri: s3://b/run, everySamples: 320, keepLast: 2, keepBest: 1}
  evaluation: {suiteRef: {name: planes}, bestBy: planes-knn/f1_macro, retries: 1, floors: false}
---
apiVersion: sonoforge.dev/v1alpha1
kind: EvalSuite
metadata: {name: planes}
spec:
  evaluations:
    - {name: planes, shards: s3://b/e/shards.json, protocols: [knn]}
"""

REFS_IN_A_MESSAGE = 8
"""About as many checkpoints as the message of a listing holds."""


def job(**spec: object) -> JobFile:
    """The job above; `spec` replaces parts of its spec."""
    file = parse_job_file(JOB, where="job.yaml")
    changed = file.job.spec.model_copy(update=spec)
    return file.model_copy(update={"job": file.job.model_copy(update={"spec": changed})})


def checkpoint(step: int, batch: int = 32) -> CheckpointRef:
    """A committed checkpoint of the job above."""
    return CheckpointRef(
        step=step,
        samples=step * batch,
        uri=f"s3://b/run/step-{step:010d}/attempt-a",
        manifest_digest=f"sha256:{step:064x}",
        created="2026-01-01T00:00:00Z",
    )


def said_scores(value: float, *, val: float | None = None) -> Termination:
    """What an evaluation process says when it is done: its score on test, and on validation if that is another."""
    on_validation = value if val is None else val
    return Termination(
        cause="done", result={"knn/f1_macro": {"value": value}, "knn/val_f1_macro": {"value": on_validation}}
    )


@dataclass
class World:
    """Children and a coordinator that obey the plan. Unwanted children go at once, but for `keep_unwanted`."""

    file: JobFile = field(default_factory=job)
    status: JobStatus = field(default_factory=JobStatus)
    children: dict[str, ChildFact] = field(default_factory=dict)
    progress: Progress | None = None
    now: float = 1000.0
    started: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    last: Plan | None = None
    keep_unwanted: str = ""
    """Prefix of children that take their time to leave."""
    refused: str = ""
    """Why the API server makes no child."""
    heard: str = ""
    """Id of the newest request that the coordinator took."""
    deaf: bool = False
    """Whether it takes none."""
    unreported: tuple[int, ...] = ()
    """Steps of checkpoints that are in storage, though nobody lived to report them."""

    def turn(self, seconds: float = 1.0) -> Plan:
        """One pass: plan, write the status, start and stop children."""
        self.now += seconds
        self._answer_listings()
        observed = Observed(
            status=self.status,
            children=dict(self.children),
            progress=self.progress,
            heard=self.heard,
            refused=self.refused,
        )
        decided = plan(self.file, observed, self.now)
        self.status = decided.status
        self.events += [e.reason for e in decided.events]
        wanted = {c.name for c in decided.children}
        for name in set(self.children) - wanted:
            if not (self.keep_unwanted and name.startswith(self.keep_unwanted)):
                del self.children[name]
        for name in sorted(wanted - set(self.children)):
            self.children[name] = ChildFact(name=name, running=True, started=self.now)
            self.started.append(name)
        if decided.requests and not self.deaf:
            self.heard = decided.requests[-1].id
        self.last = decided
        return decided

    def _answer_listings(self) -> None:
        """Storage answers within a turn what it holds and the listing does not know, as much as fits a message."""
        refs = {c.id: c for c in (self.progress.checkpoints if self.progress else ())}
        refs |= {c.id: c for c in map(checkpoint, self.unreported)}
        if self.running("inventory-") and self.last:
            (listing,) = [c for c in self.last.children if c.kind == "inventory"]
            left_out = {*listing.known, *(c.ref.id for c in self.status.checkpoints if c.pruned)}
            fresh = [c for c in sorted(refs.values(), key=lambda c: c.step) if c.id not in left_out]
            found = [c.document() for c in fresh[:REFS_IN_A_MESSAGE]]
            self.end("inventory-", 0, Termination(cause="done", result={"checkpoints": found}))

    def report(self, step: int, *checkpoints: int, **fields: object) -> None:
        """The run says that it stands at a step and has these checkpoints."""
        base = {
            "attempt": f"a{self.status.attempt}",
            "activity": Activity.TRAINING,
            "updated": self.now,
            "step": step,
            "steps": 100,
            "step_time": self.now + 0.5,
            "world_size": 2,
            "samples": step * 32,
            "budget_samples": 3200,
            "median_step_seconds": 1.0,
            "checkpoints": tuple(checkpoint(s) for s in checkpoints),
        }
        self.progress = Progress.model_validate(base | fields)

    def end(self, prefix: str, code: int | None = 0, said: Termination | None = None) -> None:
        """The running children with this prefix end."""
        names = [n for n, f in self.children.items() if n.startswith(prefix) and f.running]
        assert names, f"no running child starts with {prefix}"
        for name in names:
            self.children[name] = ChildFact(name=name, running=False, exit_code=code, termination=said)

    def running(self, prefix: str) -> list[str]:
        """Running children with this prefix."""
        return sorted(n for n, f in self.children.items() if n.startswith(prefix) and f.running)


def running_world(**spec: object) -> World:
    """A world whose job trains at step 10 with checkpoint 10."""
    world = World(file=job(**spec))
    world.turn()
    world.report(10, 10)
    world.turn()
    assert world.status.phase == "Running"
    return world


def ended(world: World, turns: int = 8) -> World:
    """The world after some passes in which its small processes do what they are asked."""
    for _ in range(turns):
        world.turn()
        for kind in ("eval-", "floor-", "retention-"):
            if world.running(kind):
                said = Termination(cause="done", result={"raw-pixels:planes-knn/f1_macro": {"value": 0.2}})
                world.end(kind, 0, said if kind == "floor-" else said_scores(0.5))
    return world


def retained() -> World:
    """A world whose older checkpoint is being deleted."""
    config = CheckpointConfig(uri="s3://b/run", every_samples=320, keep_last=1, keep_best=0)
    world = World(file=job(checkpoints=config))
    world.turn()
    world.report(20, 10, 20)
    for _ in range(3):
        world.turn()
        if world.running("eval-"):
            world.end("eval-", 0, said_scores(0.5))
    world.turn()
    assert len(world.running("retention-")) == 1
    return world


def over(world: World) -> World:
    """Training has ended, and its last checkpoint waits for its scores."""
    world.turn()
    world.report(100, 100, activity=Activity.FINISHED)
    world.turn()
    world.end("worker-")
    world.turn()
    assert world.status.outcome is not None
    return world
