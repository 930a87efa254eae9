"""The operator as a process, with the rights that its installation gives it and no others."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from components import free_ports, wait_for
from control_plane import ControlPlane

from sonoforge_operator.install import NAME, install

ROOT = Path(__file__).parents[2]


def apply_crds(control_plane: ControlPlane) -> None:
    """Apply the CRDs and wait until they are served."""
    folder = ROOT / "manifests" / "crds"
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", f"--filename={folder}")
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", f"--filename={folder}")
    for kind in ("pretrainjobs", "pretrainruntimes", "evalsuites", "checkpoints"):  # established is not yet served
        wait_for(lambda kind=kind: _listed(control_plane, kind), f"{kind} are served")


def _listed(control_plane: ControlPlane, kind: str) -> bool:
    try:
        control_plane.kubectl("get", kind, "--all-namespaces", "--output=name")
    except subprocess.CalledProcessError:
        return False
    return True


def grant(control_plane: ControlPlane, namespace: str) -> Path:
    """Give the operator its account and rights in a namespace, and return its kubeconfig."""
    wanted = [m for m in install(cluster_wide=False) if m["kind"] in ("ServiceAccount", "Role", "RoleBinding")]
    for manifest in wanted:
        manifest["metadata"]["namespace"] = namespace
        for subject in manifest.get("subjects", ()):
            subject["namespace"] = namespace
    control_plane.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(wanted))
    return control_plane.kubeconfig_of_service_account(namespace, NAME)


@contextmanager
def own_namespace(control_plane: ControlPlane, stem: str) -> Iterator[str]:
    """A namespace for one test, with Pod Security `restricted` and the CRDs served."""
    apply_crds(control_plane)
    name = f"{stem}-{secrets.token_hex(3)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    control_plane.kubectl("create", "--filename=-", stdin=yaml.safe_dump(manifest))
    yield name
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


def through(kubeconfig: Path, url: str, file: Path) -> Path:
    """A kubeconfig like another one, for a proxy at `url`."""
    document = yaml.safe_load(kubeconfig.read_text())
    document["clusters"][0]["cluster"] = {"server": url}
    file.write_text(yaml.safe_dump(document))
    return file


class OperatorProcess:
    """`sonoforge operator` for one namespace; it can be killed and started again."""

    def __init__(
        self,
        kubeconfig: Path,
        namespace: str,
        folder: Path,
        coordinator_url: str,
        *arguments: str,
        command: tuple[str, ...] = ("-m", "sonoforge_trainer", "operator"),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "operator.log"
        self.killed = False
        (folder / "key").write_text("a key of the tests, 32 bytes long")
        (self._port,) = free_ports(1)
        self._command = [
            sys.executable,
            *command,
            f"--namespace={namespace}",
            f"--own-namespace={namespace}",
            f"--kubeconfig={kubeconfig}",
            f"--coordinator-url={coordinator_url}",
            f"--key-file={folder / 'key'}",
            "--image=example.invalid/trainer:1",
            "--host=127.0.0.1",
            f"--port={self._port}",
            "--poll-seconds=0.5",
            *arguments,
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> OperatorProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, **environment: str) -> None:
        """Start it."""
        kept = {k: v for k, v in os.environ.items() if k not in ("KUBECONFIG", "PYTHONDONTWRITEBYTECODE")}
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self._command, stdout=out, stderr=out, env=kept | environment)

    def wait_until_ready(self, seconds: float = 60.0) -> None:
        """Wait until it leads and knows what is there."""
        self.wait_for(lambda: self.get("/readyz")[0] == 200, "the operator is ready", seconds)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
        """Wait until a condition holds while it lives. Raises TimeoutError with the end of its log."""

        def holds() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"the operator ended with {self.process.returncode}\n{self.log_end()}")
            return condition()

        try:
            wait_for(holds, what, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log_end()}") from None

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an answer; status 0 where there is none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metrics(self) -> dict[str, float]:
        """Metrics by name with labels."""
        _, text = self.get("/metrics")
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def log_end(self, lines: int = 40) -> str:
        """The newest lines of its log."""
        return "\n".join(self.log.read_text().splitlines()[-lines:]) if self.log.exists() else ""

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines about an event."""
        found = []
        for line in self.log.read_text().splitlines():
            try:
                document = json.loads(line)
            except ValueError:
                continue
            if document.get("event") == name:
                found.append(document)
        return found
