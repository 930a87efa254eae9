"""Whatever happens in whatever order, a job is never left, and nothing is done twice or forgotten."""

from __future__ import annotations

from builders import JOB, checkpoint, said_scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonoforge_operator.api import JobFile, parse_job_file
from sonoforge_operator.observed import ChildFact, Observed, Plan
from sonoforge_operator.plan import plan
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import Activity, Progress, Request, Termination

STEPS = 100
FILE = parse_job_file(JOB.replace("floors: false", "floors: true"), where="job.yaml")
LENIENT = {"application": {"max": 10_000}, "noProgress": {"max": 10_000}}


def file(**spec: object) -> JobFile:
    """The job of the builders with floors, and restarts without an end."""
    document = FILE.job.spec.document() | {"restartPolicy": LENIENT} | spec
    spec_type = type(FILE.job.spec)
    return FILE.model_copy(update={"job": FILE.job.model_copy(update={"spec": spec_type.parse(document)})})


class Machine:
    """A machine with processes, a coordinator and storage, on which anything may die at any moment."""

    def __init__(self, patience: int | None) -> None:
        self.evaluation = FILE.job.spec.evaluation.document() | {"stopAfterNoGain": patience}
        self.patience = patience
        self.ask()
        self.status = JobStatus()
        self.children: dict[str, ChildFact] = {}
        self.leaving: set[str] = set()
        self.storage: list[int] = []
        self.memory: Progress | None = None
        self.step = 0
        self.now = 1000.0
        self.started: list[str] = []
        self.results: dict[str, int] = {}
        self.history: list[JobStatus] = [self.status]
        self.heard = ""
        self.told_to_stop = False

    def ask(self, **spec: object) -> None:
        """Somebody edits the job file."""
        self.file = file(evaluation=self.evaluation, **spec)

    # --- what the runner does -----------------------------------------------------------------------------------------

    def decide(self) -> Plan:
        """Observe and plan. Nothing is written."""
        answers = any(n.startswith("coordinator-") and f.running for n, f in self.children.items())
        progress = (self.memory or Progress()) if answers else None
        return plan(self.file, Observed(self.status, dict(self.children), progress, self.heard), self.now)

    def turn(self, cut: int | None = None) -> None:
        """One pass, cut off after the status and so many changes of processes."""
        self.now += 1.0
        decided = self.decide()
        again = self.decide()
        assert again == decided
        self.status = decided.status
        self.history.append(decided.status)
        wanted = [c.name for c in decided.children]
        assert len(set(wanted)) == len(wanted)
        actions = [(self._deliver, request) for request in decided.requests if request.kind == "stop"]
        actions += [(self._remove, n) for n in sorted(set(self.children) - set(wanted))]
        actions += [(self._start, n) for n in wanted if n not in self.children]
        for act, name in actions[:cut]:
            act(name)
        self._check()

    def _deliver(self, request: Request) -> None:
        if self.running("coordinator-") and self.heard != request.id:
            self.heard = request.id
            assert request.attempt == f"a{self.status.attempt}"
            self.told_to_stop = bool(self.running("worker-"))

    def _remove(self, name: str) -> None:
        if name.startswith("worker-") and self.children[name].running and name not in self.leaving:
            self.leaving.add(name)  # it saves before it goes
            return
        if self.children[name].running and name.startswith("worker-"):
            self.end(name, 143)
            return
        del self.children[name]

    def _start(self, name: str) -> None:
        assert name not in self.started or not name.startswith(("eval-", "floor-")), f"{name} was started twice"
        self.children[name] = ChildFact(name=name, running=True, started=self.now)
        self.leaving.discard(name)
        self.started.append(name)

    # --- what happens -------------------------------------------------------------------------------------------------

    def running(self, prefix: str) -> list[str]:
        return sorted(n for n, f in self.children.items() if n.startswith(prefix) and f.running)

    def end(self, name: str, code: int | None, said: Termination | None = None) -> None:
        self.children[name] = ChildFact(
            name=name, running=False, exit_code=code, termination=said, started=self.children[name].started
        )

    def work(self, steps: int) -> None:
        """The workers train, commit every 20 steps and on leaving, and report."""
        if not self.running("worker-"):
            return
        self.now += steps
        base = max(self.storage, default=0)
        self.step = max(self.step, base)
        target = min(STEPS, self.step + (1 if self.told_to_stop else steps))
        commits = [s for s in range(self.step + 1, target + 1) if s % 20 == 0 or s == STEPS]
        if 0 not in self.storage:
            commits.insert(0, 0)
        if self.leaving or self.told_to_stop:
            commits.append(target)
        self.storage = sorted({*self.storage, *commits})
        self.step = target
        if self.running("coordinator-"):
            self.report(Activity.FINISHED if target == STEPS else Activity.TRAINING)
        if target == STEPS:
            for name in self.running("worker-"):
                self.end(name, 0)
        if self.told_to_stop:
            self.told_to_stop = False
            for name in self.running("worker-"):
                self.end(name, 143, LEFT)

    def report(self, activity: Activity) -> None:
        self.memory = Progress(
            attempt=f"a{self.status.attempt}",
            activity=activity,
            updated=self.now,
            step=self.step,
            steps=STEPS,
            step_time=self.now,
            world_size=1,
            restored_step=0,
            median_step_seconds=1.0,
            checkpoints=tuple(checkpoint(s) for s in self.storage),
        )

    def kill(self, kind: str, how: str, pick: int) -> None:
        """One process of a kind dies; nobody may see its exit code."""
        names = self.running(kind)
        if not names:
            return
        name = names[pick % len(names)]
        if kind in ("eval-", "floor-") and name.endswith("-019"):
            return  # one that is killed more than 20 times is given up, as it should be
        code = {"killed": -9, "unseen": None, "fails": 1}[how]
        said = Termination(cause="application", message="x") if how == "fails" and kind == "worker-" else None
        self.end(name, code, said)
        if kind == "coordinator-":
            self.memory = None
        if kind == "worker-":
            self.step = max(self.storage, default=0)

    def answer(self, pick: int, *, seen: bool = True) -> None:
        """A small process is done."""
        names = [n for kind in ("eval-", "floor-", "retention-", "inventory-") for n in self.running(kind)]
        if not names:
            return
        name = names[pick % len(names)]
        said: Termination | None = None
        if name.startswith("eval-"):
            id_ = name.split("-")[1]
            self.results[id_] = 1
            said = said_scores(0.1 + 0.01 * (int(id_, 16) % 50))
        elif name.startswith("floor-"):
            said = Termination(cause="done", result={"raw-pixels:planes-knn/f1_macro": {"value": 0.2}})
        elif name.startswith("inventory-"):
            left_out = {id_ for child in self.decide().children if child.name == name for id_ in child.known}
            left_out |= {c.ref.id for c in self.status.checkpoints if c.pruned}
            fresh = [c.document() for c in map(checkpoint, self.storage) if c.id not in left_out]
            said = Termination(cause="done", result={"checkpoints": fresh[:1]})  # a message holds few
        self.end(name, 0 if seen else None, said)

    # --- what must hold -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        before, status = self.history[-2], self.status
        nodes = [tuple(n.split("-")[1:3]) for n in self.running("worker-")]
        assert len(nodes) == len(set(nodes)), "two live processes for one node"
        if status.suspended and not before.suspended and self.running("worker-") and before.progress:
            asked = before.saving and (before.saving.asked or before.saving.since)
            in_time = asked is None or self.now - asked <= 300
            assert not in_time or self.step <= max(self.storage, default=0), "released before it was saved"
        assert not (status.suspended and status.saving)
        assert status.saving is None or status.outcome is None
        indices = [n.split("-")[2] for n in self.running("worker-") if n not in self.leaving]
        assert len(indices) == len(set(indices)), "two live processes for one node of two attempts"
        assert len(self.running("coordinator-")) <= 1
        assert status.attempt >= before.attempt
        assert not before.terminal or status == before
        if before.outcome:
            assert status.outcome == before.outcome
        budgets = [status.restarts_without_progress, status.lost_steps, status.coordinator_deaths]
        budgets += [*status.restarts.values(), *status.worker_deaths, status.retention.number, status.inventory.number]
        assert min(budgets) >= 0
        ended = {e.id: e for c in before.checkpoints for e in c.evaluations if e.ended}
        now = {e.id: e for c in status.checkpoints for e in c.evaluations}
        assert all(now[id_] == e for id_, e in ended.items()), "a finished evaluation changed"
        assert {c.ref.id for c in before.checkpoints} <= {c.ref.id for c in status.checkpoints}
        for one in status.checkpoints:
            assert not one.pruned or one.evaluated
        running = sum(e.phase == "Running" for e in [*now.values(), *status.floors])
        assert running <= self.file.job.spec.evaluation.parallel

    def calm_down(self) -> None:
        """Nothing dies any more: the job has to come to its end."""
        self.ask(workers={"minNodes": 1, "maxNodes": 2})
        for _ in range(400):
            self.turn()
            if self.status.terminal and not self.children:
                return
            self.work(7)
            self.answer(0)
        raise AssertionError(f"the job never ends: {self.status.model_dump(exclude={'progress', 'conditions'})}")

    def check_end(self) -> None:
        """Everything in storage has its scores."""
        assert self.status.outcome is not None
        known = {c.ref.step: c for c in self.status.checkpoints}
        assert sorted(known) == self.storage
        assert [e.phase for c in known.values() for e in c.evaluations] == ["Succeeded"] * len(known)
        assert [f.phase for f in self.status.floors] == ["Succeeded"]
        assert max(self.storage) == STEPS or self.patience


LEFT = Termination(cause="terminated", final=True)
SIZES = [{"minNodes": 1, "maxNodes": n} for n in (1, 2, 3)]
KINDS = ("worker-", "coordinator-", "eval-", "floor-", "retention-", "inventory-")
EVENTS = st.one_of(
    st.tuples(st.just("turn")),
    st.tuples(st.just("go"), st.integers(1, 8)),
    st.tuples(st.just("bad"), st.sampled_from(KINDS), st.integers(1, 8)),
    st.tuples(st.just("cut"), st.integers(0, 3)),
    st.tuples(st.just("work"), st.integers(1, 30)),
    st.tuples(st.just("kill"), st.sampled_from(KINDS), st.sampled_from(("killed", "unseen")), st.integers(0, 3)),
    st.tuples(st.just("kill"), st.just("worker-"), st.just("fails"), st.integers(0, 3)),
    st.tuples(st.just("answer"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("spec"), st.sampled_from(SIZES), st.booleans()),
    st.tuples(st.just("wait"), st.sampled_from((30.0, 90.0, 7200.0))),
)


def play(machine: Machine, event: tuple) -> None:
    """Let one thing happen."""
    match event:
        case ("turn",):
            machine.turn()
        case ("go", days):
            for _ in range(days):
                machine.turn()
                machine.work(10)
                machine.answer(0)
        case ("bad", kind, days):
            for _ in range(days):
                machine.turn()
                machine.kill(kind, "killed", 0)
                machine.work(10)
                machine.answer(0)
        case ("cut", actions):
            machine.turn(cut=actions)
        case ("work", steps):
            machine.work(steps)
        case ("kill", kind, how, pick):
            machine.kill(kind, how, pick)
        case ("answer", pick, seen):
            machine.answer(pick, seen=seen)
        case ("spec", workers, suspend):
            machine.ask(workers=workers, suspend=suspend)
        case ("wait", seconds):
            machine.now += seconds


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(EVENTS, max_size=40), st.sampled_from((None, 1, 2)))
def test_any_history_ends_with_every_checkpoint_evaluated_once(events, patience):
    machine = Machine(patience)
    for event in events:
        play(machine, event)
    machine.calm_down()
    machine.check_end()
