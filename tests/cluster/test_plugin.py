"""`kubectl sonoforge`, as a person uses it, against the real control plane."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from operators import OperatorProcess, grant, own_namespace
from played import Played
from played_coordinators import Switchboard
from test_life import JOB

from sonoforge_operator.cluster.plugin import main

WORKERS = "--selector=sonoforge.dev/part=worker"


@dataclass
class Person:
    """Somebody with kubectl in a namespace where an operator works."""

    kubeconfig: Path
    namespace: str
    operator: OperatorProcess
    played: Played
    kubectl: Callable[..., str]

    def run(self, *arguments: str) -> Result:
        """`kubectl sonoforge ARGUMENTS`."""
        return CliRunner().invoke(
            main, [f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *arguments]
        )

    def say(self, *arguments: str) -> str:
        """What it prints, where it does what it was asked."""
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    def get(self, *what: str) -> Any:
        return json.loads(self.kubectl("get", *what, "--output=json"))

    def status(self, job: str) -> Any:
        return self.get("pj", job).get("status", {})

    def apply(self, name: str, **spec: Any) -> None:
        job, *named = yaml.safe_load_all(JOB)
        job["metadata"]["name"] = name
        job["spec"]["checkpoints"]["uri"] = f"s3://b/{name}"
        job["spec"] |= spec
        self.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all([*named, job]))

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
        try:
            self.operator.wait_for(lambda: bool(condition()), what, seconds)
        except TimeoutError as error:
            error.add_note(f"what went wrong in playing: {self.played.errors[-5:]}")
            raise

    def wait_for_phase(self, job: str, phase: str, seconds: float = 60) -> None:
        self.wait_for(lambda: self.status(job).get("phase") == phase, f"{job} is {phase}", seconds)


@pytest.fixture
def person(in_place: Person) -> Iterator[Person]:
    yield in_place
    in_place.played.paused = False


@pytest.fixture(scope="module")
def in_place(control_plane, api_client, nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    board, folder = Switchboard(), tmp_path_factory.mktemp("person")
    with own_namespace(control_plane, "plugin") as namespace:
        operator = OperatorProcess(grant(control_plane, namespace), namespace, folder / "operator", board.url)
        with Played(api_client, namespace, folder / "played", board) as played, operator:
            operator.wait_until_ready()
            kubectl = partial(control_plane.kubectl, f"--namespace={namespace}")
            yield Person(control_plane.kubeconfig, namespace, operator, played, kubectl)
    board.close()


def test_a_job_is_suspended_resumed_and_resized_and_goes_on_from_its_newest_checkpoint(person):
    person.apply("fetal", evaluation={"suiteRef": {"name": "planes"}, "bestBy": "planes-knn/f1_macro", "floors": False})
    person.wait_for(lambda: "fetal" in person.played.runs and person.played.runs["fetal"].step > 20, "it trains")
    person.played.paused = True
    run = person.played.runs["fetal"]
    person.wait_for(lambda: person.status("fetal").get("phase") == "Running", "it is shown")

    assert "goes on from the newest checkpoint" in person.say("suspend", "fetal")
    person.wait_for_phase("fetal", "Suspended")
    pods = [pod["status"] for pod in person.get("pods", WORKERS)["items"]]  # those that ended stay for their logs
    assert {pod["phase"] for pod in pods} == {"Failed"}, "the nodes are released"
    newest = max(ref.step for ref in run.storage)
    assert newest == run.step, "it was saved before they went"
    assert len(run.stops) == 1
    assert person.status("fetal")["attempt"] == 1

    assert "fetal: resumed" in person.say("resume", "fetal")
    person.played.paused = False
    person.wait_for(lambda: run.restored == newest, "it goes on from the newest checkpoint")
    person.played.paused = True
    person.wait_for(lambda: person.status("fetal")["attempt"] == 2, "the second attempt")

    assert "fetal: maxNodes 2" in person.say("resize", "fetal", "--max=2")
    person.wait_for(lambda: person.status("fetal")["attempt"] == 3, "the third attempt")
    person.wait_for(lambda: person.status("fetal")["nodesText"] == "2/2", "two nodes")
    person.played.paused = False
    person.wait_for_phase("fetal", "Succeeded", 90)
    assert person.status("fetal")["restarts"] == {}, "none of this was a failure"
    assert person.played.errors == []
    noted = person.get("pj", "fetal", "--show-managed-fields")["metadata"]["managedFields"]
    assert {"kubectl-sonoforge", "sonoforge"} <= {entry["manager"] for entry in noted}
    assert [e.get("subresource", "") for e in noted if e["manager"] == "sonoforge"] == ["status"], "no wish is its own"


def test_status_tells_what_a_job_did(person):
    said = person.say("status", "fetal").splitlines()
    assert said[0].split() == ["fetal", "Succeeded", "BudgetSpent"]
    assert "100 steps done" in said[1]
    facts = {" ".join(line.split("  ")[0].split()): line for line in said}
    assert "100 of 100 (100.0%)" in facts["step"]
    assert "0.6000@100" in facts["best"]
    assert "none" in facts["restarts"]
    conditions = {
        line.split()[0]: line.split()[1] for line in said if line and line.split()[1:2] in (["True"], ["False"])
    }
    assert (conditions["Accepted"], conditions["Succeeded"], conditions["Suspended"]) == ("True", "True", "False")


def test_checkpoints_lists_them_in_order_with_scores_and_the_best(person):
    header, *rows = person.say("checkpoints", "fetal").splitlines()
    assert header.split() == ["STEP", "SAMPLES", "STATE", "BEST", "SCORES", "URI"]
    steps = [int(row.split()[0]) for row in rows if row.split()[0].isdigit()]
    assert steps[0] == 0
    assert steps[-1] == 100
    assert steps == sorted(steps)
    (best,) = [row for row in rows if " best " in row]
    assert best.split()[:2] == ["100", "3200"]
    assert "planes-knn/f1_macro=0.6000" in best


def test_logs_ask_the_node_for_every_worker_of_the_attempt_and_say_what_is_wrong(person):
    """No kubelet is there to answer: what can be seen is that the pods were found and asked."""
    result = person.run("logs", "fetal", "--rank=0")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "has no pods" not in result.output
    result = person.run("logs", "fetal", "--attempt=99")
    assert (result.exit_code, result.output) == (1, "Error: attempt 99 of fetal has no pods (any more)\n")


@pytest.mark.parametrize("command", ["status", "checkpoints", "logs", "suspend", "resume", "why"])
def test_a_job_that_is_not_there_is_said_in_a_sentence(person, command):
    result = person.run(command, "nobody")
    expected = f"Error: not found in namespace {person.namespace}; see `kubectl get pretrainjobs`\n"
    assert (result.exit_code, result.output) == (1, expected)


def test_resize_wants_a_number_and_takes_none_that_makes_no_sense(person):
    assert person.run("resize", "fetal").exit_code == 2
    result = person.run("resize", "fetal", "--min=5", "--max=2")
    assert result.exit_code == 1
    assert "minNodes is above maxNodes" in result.output


def test_why_says_that_no_node_has_room(person):
    person.apply("lonely", workers={"minNodes": 1, "maxNodes": 1, "nodeSelector": {"zone": "nowhere"}})
    person.wait_for(lambda: person.status("lonely").get("reason") == "Unschedulable", "it is stalled")
    said = person.say("why", "lonely")
    assert said.startswith("Stalled: Unschedulable: 0 of at least 1 nodes run: ")
    assert "  -> no node has room: free GPUs, lower workers.minNodes, or look at the runtime's nodeSelector" in said
    person.kubectl("delete", "pj", "lonely", "--wait=false")


def test_why_says_that_a_runtime_is_missing(person):
    person.apply("early", runtimeRef={"name": "later"})
    person.wait_for(lambda: person.status("early").get("reason") == "RuntimeNotFound", "it is rejected")
    said = person.say("why", "early")
    assert said.startswith("Pending: RuntimeNotFound: PretrainJob.spec.runtimeRef.name: found 'later'. Allowed: ")
    assert "  -> apply the runtime, or name another" in said


def test_why_names_an_evaluation_that_failed(person):
    person.played.fail_next["eval"] = (1, '{"cause": "application", "message": "no luck"}')
    spec = {"suiteRef": {"name": "planes"}, "floors": False, "retries": 0, "parallel": 1}
    person.apply("unlucky", evaluation=spec)
    person.wait_for_phase("unlucky", "Succeeded", 90)
    said = person.say("why", "unlucky")
    assert "evaluation planes of step-0000000000-000000000000 failed: application: no luck" in said
    assert "EvaluationFailed" in said


def test_why_says_that_no_operator_looks(person, control_plane):
    with own_namespace(control_plane, "nobody") as namespace:
        control_plane.kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=JOB)
        result = CliRunner().invoke(main, [f"--kubeconfig={person.kubeconfig}", "-n", namespace, "why", "fetal"])
    assert (result.exit_code, result.output.split(":")[0]) == (0, "no operator has looked at this job yet")


def test_it_is_a_plugin_of_kubectl_and_takes_the_namespace_of_the_context(person, control_plane, tmp_path):
    document = yaml.safe_load(person.kubeconfig.read_text())
    document["contexts"][0]["context"]["namespace"] = person.namespace
    (tmp_path / "config").write_text(yaml.safe_dump(document))
    path = os.pathsep.join((str(control_plane.programs), str(Path(sys.executable).parent), "/bin", "/usr/bin"))
    said = subprocess.run(
        ["kubectl", "sonoforge", "status", "fetal"],
        env={"PATH": path, "HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "config")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split()[:2] == ["fetal", "Succeeded"]
