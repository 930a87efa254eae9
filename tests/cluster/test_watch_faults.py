"""Faults between the operator and the real API server: nothing hangs longer than a bound, nothing is done twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from components import wait_for
from fault_proxy import FaultProxy
from operators import OperatorProcess, grant, own_namespace, through
from played import Played
from played_coordinators import Switchboard
from test_life import JOB

UIDS = "--output=jsonpath={.items[*].metadata.uid}"
OPTIONS = ("--watch-silence-seconds=5", "--retry-seconds=1")
BOUND_SECONDS = 90
"""Within this time a job that takes some 20 s is over, whatever the API server does meanwhile."""


@dataclass
class World:
    """An operator behind a proxy, and a job that it has to bring to its end."""

    proxy: FaultProxy
    operator: OperatorProcess
    played: Played
    kubectl: Callable[..., str]

    def get(self, *what: str) -> Any:
        return json.loads(self.kubectl("get", *what, "--output=json"))

    def phase(self) -> str:
        return str(self.get("pj", "fetal").get("status", {}).get("phase"))

    def workers(self) -> set[str]:
        return set(self.kubectl("get", "jobs", "--selector=sonoforge.dev/part=worker", UIDS).split())

    def wait_for_the_end(self) -> None:
        try:
            self.operator.wait_for(lambda: self.phase() == "Succeeded", "Succeeded", BOUND_SECONDS)
        except TimeoutError as error:
            last = [f"{at:.1f} {path}" for at, path in self.proxy.passed[-60:]]
            error.add_note("\n".join(["writes that came through:", *last]))
            raise

    def check(self) -> None:
        """Every checkpoint was evaluated, none of them twice, and the operator never died."""
        run = self.played.runs["fetal"]
        assert sorted(Counter(run.evaluated).values()) == [1] * 6
        assert self.operator.process is not None
        assert self.operator.process.poll() is None, self.operator.log_end()


@pytest.fixture
def world(control_plane, api_client, nodes, tmp_path) -> Iterator[World]:
    proxy, board = FaultProxy(control_plane.url, str(control_plane.directory / "ca.crt")), Switchboard()
    with own_namespace(control_plane, "faults") as namespace:
        kubeconfig = through(grant(control_plane, namespace), proxy.url, tmp_path / "proxied.kubeconfig")
        operator = OperatorProcess(kubeconfig, namespace, tmp_path / "operator", board.url, *OPTIONS)
        with Played(api_client, namespace, tmp_path / "played", board) as played, operator:
            operator.wait_until_ready()
            kubectl = partial(control_plane.kubectl, f"--namespace={namespace}")
            yield World(proxy, operator, played, kubectl)
        board.close()
        proxy.close()


@pytest.mark.parametrize(
    ("faults", "happened"),
    [
        ({"refuse": {409: 0.3}}, "refused 409"),
        ({"refuse": {429: 0.2, 503: 0.2}}, "refused 429"),
        ({"lose": 0.3}, "lost"),
        ({"cut_watch_seconds": 1.0, "gone": 0.3}, "cut"),
        ({"delay_seconds": 0.4}, "late"),
    ],
    ids=[
        "conflicts",
        "too-many-requests",
        "lost-answers",
        "cut-and-expired-watches",
        "slow-answers",
    ],
)
def test_a_job_ends_in_time_although(world, faults, happened):
    with world.proxy.wrong(**faults):
        world.kubectl("apply", "--filename=-", stdin=JOB)
        world.wait_for_the_end()
    assert world.proxy.counts[happened] > 0
    world.check()


def test_a_job_ends_in_time_although_lists_and_watches_are_refused(world):
    with world.proxy.wrong(refuse_reads={429: 0.2, 503: 0.2}, cut_watch_seconds=3.0):
        world.kubectl("apply", "--filename=-", stdin=JOB)
        world.wait_for_the_end()
    counts = world.proxy.counts
    assert min(counts[f"refused {what}"] for what in ("read", "watch", "429", "503")) > 0
    world.check()


def test_an_operator_whose_watches_are_refused_for_good_ends_and_the_next_one_goes_on(world):
    """No API server answers a read with 409, and kopf gives up on one that does: the kubelet starts another."""
    world.operator.kill()
    with world.proxy.wrong(refuse_reads={409: 1.0}, only="^/apis/sonoforge.dev/v1alpha1$"):
        world.operator.start()
        process = world.operator.process
        assert process is not None
        wait_for(lambda: process.poll() is not None, "the operator ends", 60)
    assert process.returncode == 1
    assert world.proxy.counts["refused 409"] > 0
    world.operator.start()
    world.operator.wait_until_ready()
    world.kubectl("apply", "--filename=-", stdin=JOB)
    world.wait_for_the_end()
    world.check()


def test_watches_that_fall_silent_are_noticed_and_replaced(world):
    """Nothing is cut, nothing arrives: the worst a network does."""
    world.kubectl("apply", "--filename=-", stdin=JOB)
    world.operator.wait_for(lambda: world.phase() == "Running", "Running", 60)
    world.proxy.faults.silence = True
    wait_for(lambda: world.proxy.counts["silenced"] > 0, "an event that nobody hears", 30)
    world.proxy.faults.silence = False
    world.wait_for_the_end()
    world.check()


def test_an_evaluation_that_ended_before_its_pod_is_heard_of_is_not_done_again(world):
    """The watch of Jobs says that it is complete; that of pods, which has its scores, stays silent."""
    with world.proxy.wrong(silence=True, only="/pods$"):
        world.kubectl("apply", "--filename=-", stdin=JOB)
        world.wait_for_the_end()
    assert world.proxy.counts["silenced"] > 0
    world.check()


def test_what_was_deleted_while_no_watch_heard_it_is_found_gone_once_they_begin_anew(world):
    """A listing tells what is there, and of what is gone nothing."""
    world.kubectl("apply", "--filename=-", stdin=JOB)
    world.operator.wait_for(lambda: world.phase() == "Running", "Running", 60)
    world.played.paused = True
    before = world.workers()
    assert len(before) == 1
    with world.proxy.wrong(silence=True):
        world.kubectl("delete", "jobs", "--selector=sonoforge.dev/part=worker", "--cascade=foreground")
        assert world.workers() == set()
    with world.proxy.wrong(cut_watch_seconds=0.0, gone=1.0):
        wait_for(lambda: world.proxy.counts["gone"] >= 40, "every watch begins anew", 30)
    world.operator.wait_for(lambda: world.workers() not in (set(), before), "its workers are made again", 40)
    world.played.paused = False
    world.wait_for_the_end()
    world.check()
