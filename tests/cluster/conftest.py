"""One control plane with played nodes for the session, and a namespace for each module."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from kubernetes import client, config

sys.path.insert(0, str(Path(__file__).parent))  # for the harness beside this file; tests are no package

import binaries
import packages
from control_plane import ControlPlane
from helm import Helm
from kwok import Kwok
from pods import PodPlayer
from real_site import RealSite, open_site

NODES = 4


@pytest.fixture(scope="session")
def programs() -> tuple[Path, Path]:
    """Folders of the control plane's programs and of kwok. Where they are not built: skips, but not in CI."""
    folders = binaries.find()
    if folders is None:
        _missing("the programs of the test cluster are not built")
    return folders


def _missing(what: str) -> NoReturn:
    required = os.environ.get("CI") or os.environ.get("SONOFORGE_CLUSTER") == "required"
    (pytest.fail if required else pytest.skip)(f"{what}; run `make cluster-programs` (minutes, once a machine)")


@pytest.fixture(scope="module", params=binaries.HELMS, ids=lambda major: f"helm{major}")
def helm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm of one major version; a test that asks for it runs with each."""
    return _helm(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def newest_helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The newest Helm, for tests of what a chart means and not of what makes it."""
    return _helm(max(binaries.HELMS), tmp_path_factory)


def _helm(major: int, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    found = binaries.find_helm()
    if found is None:
        _missing("helm is not built")
    return Helm(found[major], major, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def control_plane(programs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The session's control plane, with a record of writes. Who breaks a component mends it."""
    with ControlPlane(programs[0], tmp_path_factory.mktemp("control-plane"), audit=True) as running:
        yield running


@pytest.fixture(scope="session")
def real_site(programs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSite]:
    """The session's real nodes, with operator, S3 and data. Who breaks a node mends it."""
    packages.require(pytest.skip, pytest.fail, built=binaries.built_at())
    coredns = binaries.find_coredns()
    assert coredns, "it is built with the other programs"
    with open_site(programs[0], coredns, tmp_path_factory.mktemp("real")) as site:
        yield site


@pytest.fixture
def bare_site(real_site: RealSite) -> Iterator[RealSite]:
    """The real nodes without an operator, which is installed again afterwards."""
    real_site.uninstall_operator()
    yield real_site
    real_site.install_operator()


@pytest.fixture(scope="session")
def kwok(programs: tuple[Path, Path], control_plane: ControlPlane) -> Iterator[Kwok]:
    """The session's kwok, for tests that add nodes of their own kind."""
    with Kwok(programs[1] / "kwok", control_plane) as running:
        yield running


@pytest.fixture(scope="session")
def nodes(kwok: Kwok) -> list[str]:
    """Names of played nodes, each with 4 GPUs; pods on them run at once, see stages.yaml."""
    return kwok.add_nodes(NODES)


@pytest.fixture(scope="module")
def namespace(control_plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the module's own, which takes no pod that Pod Security `restricted` forbids."""
    stem = request.path.stem.removeprefix("test_").replace("_", "-")[:40]
    name = f"{stem}-{secrets.token_hex(3)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    control_plane.kubectl("create", "--filename=-", stdin=yaml.safe_dump(manifest))
    yield name
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def kubectl(control_plane: ControlPlane, namespace: str) -> Callable[..., str]:
    """Run kubectl as administrator in the module's namespace: `kubectl("get", "pods")`."""
    return lambda *arguments, **options: control_plane.kubectl(f"--namespace={namespace}", *arguments, **options)


@pytest.fixture(scope="module")
def api_client(control_plane: ControlPlane) -> Iterator[client.ApiClient]:
    """A synchronous client with the administrator's rights."""
    with config.new_client_from_config(str(control_plane.kubeconfig)) as made:
        yield made


@pytest.fixture
def pods(api_client: client.ApiClient, namespace: str) -> PodPlayer:
    """Plays the pods of the module's namespace."""
    return PodPlayer(client.CoreV1Api(api_client), namespace)


@pytest.fixture
def job_of() -> Callable[..., dict[str, Any]]:
    """Manifest of a Job whose pods Pod Security `restricted` lets in: `job_of("name", completions=2)`."""

    def make(name: str, *, annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
        container = {
            "name": "main",
            "image": "example.invalid/main:1",
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        }
        template = {
            "metadata": {"annotations": annotations or {}},
            "spec": {"restartPolicy": "Never", "containers": [container]},
        }
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name},
            "spec": {"backoffLimit": 0, "template": template, **spec},
        }

    return make
