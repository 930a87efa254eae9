"""A namespace with an operator and played nodes, and jobs for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from control_plane import ControlPlane
from kubernetes import client
from operators import OperatorProcess, grant, own_namespace
from played import Played
from played_coordinators import Switchboard
from test_life import JOB

OURS = "app.kubernetes.io/managed-by=sonoforge"
KINDS = "jobs,pods,deployments,configmaps,services,serviceaccounts,networkpolicies,ckpt"


@dataclass
class Site:
    """A namespace with an operator and played nodes."""

    operator: OperatorProcess
    played: Played
    kubectl: Callable[..., str]
    make_operator: Callable[..., OperatorProcess]
    """Another operator for the namespace, not started, with further arguments."""

    def get(self, *what: str) -> Any:
        return json.loads(self.kubectl("get", *what, "--output=json"))

    def status(self, job: str) -> Any:
        return self.get("pj", job).get("status", {})

    def accepted(self, job: str) -> tuple[str, str]:
        """Status and reason of the condition."""
        found = [c for c in self.status(job).get("conditions", ()) if c["type"] == "Accepted"]
        return (found[0]["status"], found[0]["reason"]) if found else ("", "")

    def children(self, job: str, kinds: str = KINDS) -> list[str]:
        return self.kubectl("get", kinds, f"--selector={OURS},sonoforge.dev/job={job}", "--output=name").split()

    def apply(self, *manifests: dict[str, Any]) -> None:
        self.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(manifests))

    def wait_for_phase(self, job: str, phase: str, seconds: float = 60) -> None:
        self.operator.wait_for(lambda: self.status(job).get("phase") == phase, f"{job} is {phase}", seconds)


@contextmanager
def open_site(control_plane: ControlPlane, api_client: client.ApiClient, folder: Path, stem: str) -> Iterator[Site]:
    """A site with a ready operator and, in its namespace, the runtime and the suite of `JOB`."""
    board = Switchboard()
    with own_namespace(control_plane, stem) as namespace:
        kubeconfig, kubectl = (
            grant(control_plane, namespace),
            partial(control_plane.kubectl, f"--namespace={namespace}"),
        )

        def make_operator(*arguments: str) -> OperatorProcess:
            return OperatorProcess(kubeconfig, namespace, folder / "operator", board.url, *arguments)

        with Played(api_client, namespace, folder / "played", board) as played, make_operator() as operator:
            operator.wait_until_ready()
            kubectl("apply", "--filename=-", stdin="---".join(JOB.split("---")[1:]))
            yield Site(operator, played, kubectl, make_operator)
    board.close()


def job(name: str, **spec: Any) -> dict[str, Any]:
    """The job of the other tests under another name; with twenty steps and no evaluation, if nothing else is said."""
    made: dict[str, Any] = yaml.safe_load(JOB.split("---")[0])
    made["metadata"]["name"] = name
    made["spec"]["training"]["recipe"]["budgetSamples"] = 640
    made["spec"]["checkpoints"]["uri"] = f"s3://b/{name}"
    made["spec"]["evaluation"] = {"floors": False}
    made["spec"] |= spec
    return made
