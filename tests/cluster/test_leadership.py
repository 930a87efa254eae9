"""One replica acts at a time: what the Lease says, who waits, and what a replica does that cannot keep it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from components import wait_for
from fault_proxy import FaultProxy
from operators import OperatorProcess, grant, own_namespace, through
from test_life import JOB

LEASE, RENEW, RETRY = 6, 4.0, 0.5
TIMING = (f"--lease-seconds={LEASE}", f"--renew-seconds={RENEW}", f"--retry-seconds={RETRY}")
OF_THE_LEASE = "/leases"


@dataclass
class Replicas:
    """A namespace, a proxy before its API server, and as many replicas as a test starts."""

    proxy: FaultProxy
    kubectl: Callable[..., str]
    make: Callable[..., OperatorProcess]
    """`make("a")` is a replica that is not started; `make("a", proxied=True)` one behind the proxy."""

    def holder(self) -> str:
        return str(self.lease().get("holderIdentity", ""))

    def lease(self) -> Any:
        found = json.loads(self.kubectl("get", "leases", "--output=json"))["items"]
        return found[0]["spec"] if found else {}

    def apply(self, name: str) -> None:
        """Apply a job of that name, and what it names."""
        job, *named = yaml.safe_load_all(JOB)
        job["metadata"]["name"] = name
        self.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all([*named, job]))

    def phase(self, name: str) -> str:
        return str(json.loads(self.kubectl("get", "pj", name, "--output=json")).get("status", {}).get("phase", ""))

    def foreign_writes(self, since: float) -> list[tuple[float, str]]:
        """Writes through the proxy since then, without those of the Lease."""
        return [write for write in self.proxy.passed if write[0] > since and OF_THE_LEASE not in write[1]]


@pytest.fixture
def replicas(control_plane, tmp_path: Path) -> Iterator[Replicas]:
    proxy = FaultProxy(control_plane.url, str(control_plane.directory / "ca.crt"))
    made: list[OperatorProcess] = []
    with own_namespace(control_plane, "leaders") as namespace:
        direct = grant(control_plane, namespace)
        proxied_config = through(direct, proxy.url, tmp_path / "proxied.kubeconfig")

        def make(name: str, *, proxied: bool = False) -> OperatorProcess:
            config = proxied_config if proxied else direct
            made.append(OperatorProcess(config, namespace, tmp_path / name, "http://127.0.0.1:9", *TIMING))
            return made[-1]

        yield Replicas(proxy, partial(control_plane.kubectl, f"--namespace={namespace}"), make)
        for operator in made:
            operator.kill()
    proxy.close()


def wait_for_end(operator: OperatorProcess, seconds: float) -> int:
    """Its exit code. Raises TimeoutError with the end of its log."""
    assert operator.process is not None
    try:
        wait_for(lambda: operator.process.poll() is not None, "the replica ends", seconds)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{operator.log_end()}") from None
    return int(operator.process.returncode)


def test_one_replica_leads_and_the_other_takes_over_at_once_when_it_is_told_to_end(replicas):
    first, second = replicas.make("first"), replicas.make("second")
    first.start()
    first.wait_until_ready()
    second.start()
    second.wait_for(lambda: second.get("/healthz")[0] == 200, "the second answers", 30)
    assert second.get("/readyz")[0] == 503
    assert (first.metrics()["sonoforge_leading"], second.metrics()["sonoforge_leading"]) == (1, 0)
    holder = replicas.holder()

    assert first.terminate() == 0, first.log_end()
    told = time.monotonic()
    second.wait_until_ready(LEASE - 1)  # sooner than the Lease would have run out
    assert time.monotonic() - told < LEASE - 1
    assert replicas.holder() not in ("", holder)
    assert replicas.lease()["leaseTransitions"] == 1
    replicas.apply("fetal")
    second.wait_for(lambda: replicas.phase("fetal") != "", "the second acts", 30)


def test_a_replica_that_is_killed_is_followed_once_its_lease_has_run_out(replicas):
    first, second = replicas.make("first"), replicas.make("second")
    first.start()
    first.wait_until_ready()
    second.start()
    second.wait_for(lambda: second.get("/healthz")[0] == 200, "the second answers", 30)
    first.kill()
    killed = time.monotonic()
    second.wait_until_ready(3 * LEASE)
    assert time.monotonic() - killed > LEASE - RENEW, "it took a Lease that still held"


def test_a_container_that_is_killed_and_started_again_in_its_pod_does_not_wait_for_its_own_lease(replicas):
    operator = replicas.make("only")
    operator.start(POD_UID="pod-1")
    operator.wait_until_ready()
    operator.kill()
    operator.start(POD_UID="pod-1")
    operator.wait_until_ready()
    assert (replicas.holder(), replicas.lease()["leaseTransitions"]) == ("pod-1", 0), "it waited until it ran out"


@pytest.mark.parametrize(
    "fault", [{"refuse": {503: 1.0}, "only": OF_THE_LEASE}, {"hold": OF_THE_LEASE}], ids=["refused", "unanswered"]
)
def test_a_leader_that_cannot_renew_ends_within_the_lease_and_writes_nothing_after(replicas, fault):
    leader, second = replicas.make("leader", proxied=True), replicas.make("second")
    leader.start()
    leader.wait_until_ready()
    second.start()
    with replicas.proxy.wrong(**fault):
        renewed = max(at for at, path in replicas.proxy.passed if OF_THE_LEASE in path)
        for number in range(100):  # there is always something to write
            replicas.apply(f"job-{number}")
            if leader.process.poll() is not None:
                break
        ended = time.monotonic()
    assert leader.process.returncode == 70, leader.log_end()
    assert ended - renewed < LEASE
    late = replicas.foreign_writes(renewed)
    assert late, "it wrote nothing at all, so this shows nothing"
    assert max(at for at, _ in late) < renewed + RENEW + RETRY
    second.wait_until_ready(3 * LEASE)
    replicas.apply("after")
    second.wait_for(lambda: replicas.phase("after") != "", "the second acts", 30)


def test_a_leader_that_slept_longer_than_its_lease_writes_nothing_when_it_wakes(replicas):
    leader, second = replicas.make("leader", proxied=True), replicas.make("second")
    leader.start()
    leader.wait_until_ready()
    second.start()
    replicas.apply("before")
    leader.wait_for(lambda: replicas.phase("before") != "", "it acts", 30)
    os.kill(leader.process.pid, signal.SIGSTOP)
    replicas.apply("meanwhile")
    second.wait_until_ready(3 * LEASE)
    second.wait_for(lambda: replicas.phase("meanwhile") != "", "the second acts", 30)
    woken = time.monotonic()
    os.kill(leader.process.pid, signal.SIGCONT)
    assert wait_for_end(leader, 10) == 70
    assert replicas.foreign_writes(woken) == []


def test_the_operator_ends_with_an_error_and_gives_the_lease_back_when_watches_end_by_themselves(replicas):
    operator = replicas.make("only", proxied=True)
    operator.start()
    operator.wait_until_ready()
    replicas.apply("job")
    operator.wait_for(lambda: replicas.phase("job") != "", "it acts, and has something to do later", 30)
    with replicas.proxy.wrong(error=True, cut_watch_seconds=0.5):
        assert wait_for_end(operator, 60) == 1
    assert operator.events("watches-ended"), operator.log_end()
    assert replicas.proxy.counts["failed"] > 0
    assert replicas.holder() == ""
