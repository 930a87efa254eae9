"""The operator is killed before and after every write to the API server in turn, and another one goes on from there.

Each scenario runs once undisturbed and once with an operator that dies at every single write: the first life ends
before its first write, the next one after it, and so on to the end. What the job comes to is the same.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from lives import Killer, Lives, end_state
from operators import apply_crds, grant
from played import Played
from played_coordinators import Switchboard
from test_life import JOB


@dataclass
class Scene:
    """One scenario in a namespace of its own."""

    namespace: str
    played: Played
    lives: Lives
    kubectl: Callable[..., str]

    def get(self, *what: str) -> Any:
        return json.loads(self.kubectl("get", *what, "--output=json"))

    def job(self) -> Any:
        return next(iter(self.get("pj")["items"]), None)

    def over(self) -> bool:
        """Whether the job has ended, and what it held is released."""
        job = self.job()
        if job is None or job.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
            return False
        pods = [p["status"].get("phase") for p in self.get("pods")["items"]]
        return not self.get("deployments")["items"] and not {"Pending", "Running"} & set(pods)


@pytest.fixture
def scenes(control_plane, api_client, nodes, tmp_path) -> Iterator[Callable[[], Scene]]:
    """A function that opens a scene."""
    apply_crds(control_plane)
    board = Switchboard()
    opened: list[Played] = []

    def open_scene() -> Scene:
        namespace = f"crashes-{secrets.token_hex(3)}"
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}
        control_plane.kubectl("create", "--filename=-", stdin=yaml.safe_dump(made))
        kubeconfig = grant(control_plane, namespace)
        played = Played(api_client, namespace, tmp_path / namespace, board)
        played.__enter__()
        opened.append(played)
        return Scene(
            namespace,
            played,
            Lives(kubeconfig, namespace, board.url),
            lambda *a, **o: control_plane.kubectl(f"--namespace={namespace}", *a, **o),
        )

    yield open_scene
    for played in opened:
        played.__exit__(None, None, None)
        control_plane.kubectl("delete", "namespace", played.namespace, "--wait=false")
    board.close()


def happy(scene: Scene) -> Iterator[Callable[[], bool]]:
    """Nothing happens."""
    yield scene.over


def preempted(scene: Scene) -> Iterator[Callable[[], bool]]:
    """A worker is taken away in the middle of the run."""
    scene.played.halt = 40
    yield lambda: at_step(scene, 40)
    workers = scene.played._pods.names("sonoforge.dev/part=worker")
    scene.played._pods.disrupt(workers[0], "PreemptionByScheduler")
    yield lambda: (scene.job()["status"].get("restarts") or {}).get("infrastructure") == 1
    scene.played.halt = None
    yield scene.over


def resized(scene: Scene) -> Iterator[Callable[[], bool]]:
    """Somebody asks for fewer nodes."""
    scene.played.halt = 40
    yield lambda: at_step(scene, 40)
    scene.kubectl("patch", "pj", "fetal", "--type=merge", '--patch={"spec": {"workers": {"maxNodes": 2}}}')
    yield lambda: scene.job()["status"]["attempt"] == 2
    scene.played.halt = None
    yield scene.over


def failed_evaluation(scene: Scene) -> Iterator[Callable[[], bool]]:
    """An evaluation fails once and is done again."""
    scene.played.fail_evaluation.add(20)
    yield scene.over


def deleted(scene: Scene) -> Iterator[Callable[[], bool]]:
    """The job is deleted in the middle: everything of it goes."""
    scene.played.halt = 40
    yield lambda: at_step(scene, 40)
    scene.kubectl("delete", "pj", "fetal", "--wait=false")
    kinds = "jobs,pods,deployments,configmaps,services,ckpt,networkpolicies"
    yield (
        lambda: (
            [
                o["metadata"]["name"]
                for o in scene.get(kinds, "--selector=app.kubernetes.io/managed-by=sonoforge")["items"]
            ]
            == []
        )
    )


def at_step(scene: Scene, step: int) -> bool:
    run = scene.played.runs.get("fetal")
    job = scene.job()
    return bool(run and run.step >= step and job and job.get("status", {}).get("step", 0) >= step // 2)


def play(scene: Scene, story, *, mortal: bool) -> tuple[dict[str, Any], list[str]]:
    """Play a scenario; the end state and what was written, or about to be, at each death."""
    scene.kubectl("apply", "--filename=-", stdin=JOB)
    deaths: list[str] = []
    for until in story(scene):
        while True:
            when = ("before", "after")[len(deaths) % 2]
            killer = Killer((lambda n, when=when: when if n == 1 else None) if mortal else lambda n: None)
            if scene.lives.live(until, killer, seconds=120):
                break
            deaths += killer.done
    return end_state(scene.namespace, scene.get), deaths


def died_at(deaths: list[str], when: str) -> set[str]:
    """The kinds of object that were being written at the deaths `before` or `after` a write."""
    return {death.split("/namespaces/")[1].split("/")[1] for death in deaths if death.startswith(when)}


@pytest.mark.parametrize("story", [happy, preempted, resized, failed_evaluation, deleted], ids=lambda s: s.__name__)
def test_an_operator_that_dies_at_every_write_brings_a_job_to_the_same_end(scenes, story, record_property):
    calm, wild = scenes(), scenes()
    expected, _ = play(calm, story, mortal=False)
    found, deaths = play(wild, story, mortal=True)
    record_property("crash_points", len(deaths))
    print(f"{story.__name__}: {len(deaths)} crash points, {wild.lives.count} operators")
    assert found == expected
    # How many there are depends on how long a run lives; these are in every one.
    everywhere = {"pretrainjobs", "configmaps", "services", "networkpolicies", "deployments", "jobs", "checkpoints"}
    assert everywhere <= died_at(deaths, "before") & died_at(deaths, "after")
    for scene in (calm, wild):
        run = scene.played.runs["fetal"]
        again = {id_: n for id_, n in Counter(run.evaluated).items() if n != 1}
        assert again == {}, "an evaluation was done twice"
        assert scene.played.errors == []
