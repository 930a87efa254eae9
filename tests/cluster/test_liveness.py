"""What the operator says of itself: whether it is well, and the metrics, whose number has a bound."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from operators import OperatorProcess, grant, own_namespace, through
from prometheus_client.parser import text_string_to_metric_families
from test_life import JOB

OPTIONS = (
    *("--lease-seconds=20", "--renew-seconds=15", "--retry-seconds=0.5"),
    *("--watch-silence-seconds=60", "--stale-seconds=4", "--stuck-seconds=4"),
)
ALL_BUT_THE_LEASE = "^(?!.*/leases)"
BOUNDED = {"cause", "kind", "result", "reason", "phase", "le"}
"""Labels whose values are words of the operator's own."""
OF_THE_OPERATOR = {
    "sonoforge_reconcile_seconds",
    "sonoforge_reconcile_whole_seconds",
    "sonoforge_reconcile_failures",
    "sonoforge_queue_depth",
    "sonoforge_queue_oldest_seconds",
    "sonoforge_api_writes",
    "sonoforge_watch_age_seconds",
    "sonoforge_watch_missed_changes",
    "sonoforge_leading",
    "sonoforge_time_to_first_step_seconds",
    "sonoforge_restarts",
    "sonoforge_lost_steps",
    "sonoforge_jobs_ended",
    "sonoforge_evaluations",
}
OF_JOBS = {
    "sonoforge_job_phase",
    "sonoforge_job_stalled",
    "sonoforge_job_step",
    "sonoforge_job_goodput_ratio",
    "sonoforge_job_lost_seconds",
    "sonoforge_job_checkpoint_time_seconds",
    "sonoforge_job_checkpoint_duration_seconds",
    "sonoforge_job_checkpoint_stall_seconds",
    "sonoforge_job_data_wait_ratio",
    "sonoforge_job_evaluation_backlog",
}


@dataclass
class Served:
    """An operator behind a proxy."""

    operator: OperatorProcess
    proxy: FaultProxy
    kubectl: Callable[..., str]

    def health(self) -> tuple[int, Any]:
        status, text = self.operator.get("/healthz")
        return status, json.loads(text) if text else {}

    def families(self) -> dict[str, Any]:
        return {family.name: family for family in text_string_to_metric_families(self.operator.get("/metrics")[1])}

    def series_of(self, job: str) -> set[str]:
        return {s.name for f in self.families().values() for s in f.samples if s.labels.get("job") == job}


@pytest.fixture(scope="module")
def served(control_plane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("served")
    proxy = FaultProxy(control_plane.url, str(control_plane.directory / "ca.crt"))
    with own_namespace(control_plane, "liveness") as namespace:
        kubeconfig = through(grant(control_plane, namespace), proxy.url, folder / "proxied.kubeconfig")
        with OperatorProcess(kubeconfig, namespace, folder, "http://127.0.0.1:9", *OPTIONS) as operator:
            operator.wait_until_ready()
            yield Served(operator, proxy, partial(control_plane.kubectl, f"--namespace={namespace}"))
    proxy.close()


def test_watches_that_bring_no_heartbeat_make_the_operator_unhealthy_until_they_do(served):
    assert served.health()[0] == 200
    with served.proxy.wrong(silence=True):
        served.operator.wait_for(lambda: served.health()[0] == 503, "the watches are stale", 20)
        _, said = served.health()
        assert said["watchAgeSeconds"] >= 4
        assert said["stuckSeconds"] < 4
    served.operator.wait_for(lambda: served.health()[0] == 200, "the watches are fresh", 20)


def test_a_pass_that_hangs_makes_the_operator_unhealthy_until_it_ends(served):
    with served.proxy.wrong(hold=ALL_BUT_THE_LEASE):
        served.kubectl("apply", "--filename=-", stdin=JOB)
        served.operator.wait_for(lambda: served.health()[0] == 503, "the queue is stuck", 30)
        _, said = served.health()
        assert said["stuckSeconds"] >= 4
        assert said["watchAgeSeconds"] < 4
    served.operator.wait_for(lambda: served.health()[0] == 200, "the queue moves", 60)


def test_metrics_have_labels_of_few_values_and_those_of_a_job_go_with_it(served):
    served.kubectl("apply", "--filename=-", stdin=JOB)
    served.operator.wait_for(lambda: "sonoforge_job_phase" in served.series_of("fetal"), "metrics of the job", 60)
    families = served.families()
    ours = {name for name in families if name.startswith("sonoforge_") and not name.endswith("_created")}
    assert ours == OF_THE_OPERATOR | OF_JOBS
    for name, family in families.items():
        of_jobs = {"namespace", "job"} if name in OF_JOBS else set()
        for sample in family.samples:
            assert set(sample.labels) <= BOUNDED | of_jobs, f"{name} has another label"
    served.kubectl("delete", "pj", "fetal", "--wait=false")
    served.operator.wait_for(lambda: served.series_of("fetal") == set(), "no metric of the job", 30)
