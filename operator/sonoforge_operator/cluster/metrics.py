"""Prometheus metrics. No label has as many values as there are jobs, except on gauges that go with their job."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sonoforge_operator.cluster.facts import unix_seconds
from sonoforge_operator.cluster.names import Key
from sonoforge_operator.observed import Plan
from sonoforge_operator.status import JobStatus

_STEP_BUCKETS = (10, 30, 60, 120, 300, 600, 1800, 3600, 14400)
_PASS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 5, 10, 30)
_WHOLE_BUCKETS = (*_PASS_BUCKETS, 60, 120, 180, 240, 300)


class Metrics:
    """What the operator tells of itself and of its jobs."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """Where they are collected."""
        r = self.registry
        self.pass_seconds = Histogram(
            "sonoforge_reconcile_seconds", "Time of one pass over one job.", registry=r, buckets=_PASS_BUCKETS
        )
        """Time of a pass."""
        self.whole_seconds = Histogram(
            "sonoforge_reconcile_whole_seconds",
            "Time of one pass over one job, with its wait for a turn to write.",
            registry=r,
            buckets=_WHOLE_BUCKETS,
        )
        """The same with its wait for a turn."""
        self.failed_passes = Counter(
            "sonoforge_reconcile_failures_total", "Passes that have to be made again.", ("cause",), registry=r
        )
        """Passes that failed, by cause."""
        self.queue_depth = Gauge("sonoforge_queue_depth", "Jobs that wait for a pass.", registry=r)
        """Jobs that wait for a pass."""
        self.queue_seconds = Gauge(
            "sonoforge_queue_oldest_seconds", "Time for which the oldest wish for a pass is not fulfilled.", registry=r
        )
        """Longest wait for a pass."""
        self.api_writes = Gauge("sonoforge_api_writes", "Requests that changed something, since the start.", registry=r)
        """Writes to the API server."""
        self.watch_age = Gauge(
            "sonoforge_watch_age_seconds",
            "Time since the watches last brought the operator's own heartbeat.",
            registry=r,
        )
        """Age of the newest proof that watches work."""
        self.missed_changes = Counter(
            "sonoforge_watch_missed_changes_total",
            "Changes that no watch told and a listing found.",
            ("kind",),
            registry=r,
        )
        """Changes found by listing alone."""
        self.leading = Gauge("sonoforge_leading", "1 where this replica acts.", registry=r)
        """Whether this replica acts."""
        self._first_step = Histogram(
            "sonoforge_time_to_first_step_seconds",
            "Time from the acceptance of a job to its first step.",
            registry=r,
            buckets=_STEP_BUCKETS,
        )
        self._restarts = Counter("sonoforge_restarts_total", "Replaced processes by cause.", ("cause",), registry=r)
        self._lost_steps = Counter("sonoforge_lost_steps_total", "Steps that had to be done again.", registry=r)
        self._ended = Counter("sonoforge_jobs_ended_total", "Jobs that ended.", ("result", "reason"), registry=r)
        self._evaluations = Counter("sonoforge_evaluations_total", "Evaluations that ended.", ("phase",), registry=r)
        self._jobs = _Jobs()
        r.register(self._jobs)

    def follow(self, key: Key, before: JobStatus, decided: Plan) -> None:
        """Take in one pass: what changed in the status is counted, what holds now is shown."""
        after = decided.status
        for cause, count in after.restarts.items():
            more = count - before.restarts.get(cause, 0)
            if more > 0:  # a label is made where it is named, and a record may have been edited to hold anything
                self._restarts.labels(cause).inc(more)
        self._lost_steps.inc(max(0, after.lost_steps - before.lost_steps))
        if after.progress and after.progress.step_time and not (before.progress and before.progress.step_time):
            self._first_step.observe(max(0.0, after.progress.step_time - after.started))
        if after.terminal and not before.terminal and after.outcome:
            self._ended.labels(after.outcome.result, after.outcome.reason).inc()
        known = {e.id: e.phase for c in before.checkpoints for e in c.evaluations}
        for evaluation in (e for c in after.checkpoints for e in c.evaluations if e.ended):
            if known.get(evaluation.id) not in ("Succeeded", "Failed"):
                self._evaluations.labels(evaluation.phase).inc()
        self._jobs.shown[key] = after

    def forget(self, key: Key) -> None:
        """A job is gone: so are its gauges."""
        self._jobs.shown.pop(key, None)


class _Jobs(Collector):
    """Gauges of jobs, made when somebody asks: none outlives its job or what it said."""

    def __init__(self) -> None:
        self.shown: dict[Key, JobStatus] = {}

    def collect(self) -> Iterator[Metric]:
        for name, (text, labels, values) in _OF_JOBS.items():
            family = GaugeMetricFamily(f"sonoforge_job_{name}", text, labels=("namespace", "job", *labels))
            for key, status in list(self.shown.items()):
                for further, value in values(status):
                    family.add_metric((key.namespace, key.name, *further), value)
            yield family


_Samples = Iterator[tuple[tuple[str, ...], float]]


def _phase(status: JobStatus) -> _Samples:
    yield (status.phase,), 1


def _stalled(status: JobStatus) -> _Samples:
    stalled = status.condition("Stalled")
    if stalled and stalled.status == "True":
        yield (stalled.reason,), 1


def _step(status: JobStatus) -> _Samples:
    if status.progress:
        yield (), status.progress.step


def _goodput(status: JobStatus) -> _Samples:
    if status.goodput.share is not None:
        yield (), status.goodput.share


def _lost(status: JobStatus) -> _Samples:
    for cause, seconds in status.goodput.lost_seconds.items():
        yield (cause,), seconds


def _checkpoint_time(status: JobStatus) -> _Samples:
    newest = max(status.sound, key=lambda c: c.ref.step, default=None)
    if newest:
        yield (), unix_seconds(newest.ref.created)


def _checkpoint_duration(status: JobStatus) -> _Samples:
    if status.progress:
        yield (), status.progress.checkpoint_seconds


def _checkpoint_stall(status: JobStatus) -> _Samples:
    if status.progress:
        yield (), status.progress.checkpoint_stall_seconds


def _data_wait(status: JobStatus) -> _Samples:
    if status.progress:
        yield (), status.progress.data_wait


def _backlog(status: JobStatus) -> _Samples:
    yield (), sum(not e.ended for c in status.checkpoints for e in c.evaluations)


_OF_JOBS: dict[str, tuple[str, tuple[str, ...], Callable[[JobStatus], _Samples]]] = {
    "phase": ("1 for the phase of the job.", ("phase",), _phase),
    "stalled": ("1 for the reason why the job does not step.", ("reason",), _stalled),
    "step": ("Steps done.", (), _step),
    "goodput_ratio": ("Share of the time that went into steps that count.", (), _goodput),
    "lost_seconds": ("Time without such steps, by cause.", ("cause",), _lost),
    "checkpoint_time_seconds": ("Unix time of the newest checkpoint; its age is the time since.", (), _checkpoint_time),
    "checkpoint_duration_seconds": ("Time that the newest checkpoint took to its commit.", (), _checkpoint_duration),
    "checkpoint_stall_seconds": ("Time for which the newest checkpoint held up training.", (), _checkpoint_stall),
    "data_wait_ratio": ("Part of the step time spent waiting for data.", (), _data_wait),
    "evaluation_backlog": ("Evaluations that have not ended.", (), _backlog),
}
