"""Helm as a process, with the chart of this repository."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "sonoforge"
MONITORING = "monitoring.coreos.com/v1"
"""API of the Prometheus operator, which the test cluster does not have."""

Manifest = dict[str, Any]


class HelmError(Exception):
    """Helm refused; the message is what it printed."""


class Helm:
    """One helm program. Without a kubeconfig it reaches no cluster."""

    def __init__(self, program: Path, major: int, folder: Path, kubeconfig: Path | None = None) -> None:
        self.program, self.major, self._folder, self._kubeconfig = program, major, folder, kubeconfig

    def at(self, kubeconfig: Path) -> Helm:
        """The same program for a cluster."""
        return Helm(self.program, self.major, self._folder, kubeconfig)

    def run(self, *arguments: str, values: Manifest | None = None) -> str:
        """Run it and return what it printed. Raises HelmError."""
        given = [] if values is None else ["--values=-"]
        environment = {"HOME": str(self._folder), "KUBECONFIG": str(self._kubeconfig or self._folder / "none")}
        done = subprocess.run(
            [str(self.program), *arguments, *given],
            input=yaml.safe_dump(values or {}),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode:
            raise HelmError(done.stdout + done.stderr)
        return done.stdout

    def render(self, values: Manifest | None = None, *arguments: str, namespace: str = "research") -> list[Manifest]:
        """What the chart makes of values, for a namespace, in the release `sonoforge`."""
        text = self.run(
            "template", "sonoforge", str(CHART), f"--namespace={namespace}", *arguments, values=values or {}
        )
        return [document for document in yaml.safe_load_all(text) if document]


def one(manifests: list[Manifest], kind: str, name: str = "", namespace: str = "") -> Manifest:
    """The only object of a kind, among those of a name and a namespace where they are given."""
    found = [
        manifest
        for manifest in manifests
        if manifest["kind"] == kind
        and name in ("", manifest["metadata"]["name"])
        and namespace in ("", manifest["metadata"].get("namespace"))
    ]
    assert len(found) == 1, f"{len(found)} of {kind} {name} {namespace}"
    return found[0]
