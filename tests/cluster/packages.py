"""What tests need of this machine: a few Debian packages, and for real nodes root.

    python tests/cluster/packages.py [--nodes]

installs them where that is possible, which is on Debian as root, and says nothing elsewhere: the tests that need them
say then what is missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = {
    "buildah": "buildah",
    "containerd": "containerd",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "iptables": "iptables",
    "mmdebstrap": "mmdebstrap",
    "nsenter": "util-linux",
    "runc": "runc",
}
"""Packages of Debian for real nodes, by the program that is wanted of them."""
_FOR_ALL_TESTS = {
    "chromium": "chromium",
    "ip": "iproute2",
    "iptables": "iptables",
    "nsenter": "util-linux",
}
"""Those without which `make test` skips something: tests of the page, and policies that are enforced."""
CNI = Path("/usr/lib/cni")
"""Where `containernetworking-plugins` puts its programs."""
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH of what runs as root."""


def missing() -> str:
    """Why real nodes cannot run here, as one sentence; empty where they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "real nodes need Linux on x86-64"
    if os.geteuid() != 0:
        return "real nodes need root: they make network namespaces and run containers"
    if not _may_make_namespaces():
        return "real nodes need the right to make network namespaces, as in a privileged container"
    wanted = _wanted_of_nodes()
    return f"real nodes need these Debian packages, see `make cluster-packages`: {', '.join(wanted)}" if wanted else ""


def require(skip: Callable[[str], object], fail: Callable[[str], object]) -> None:
    """Skip or fail where real nodes cannot run or were not asked for: the first run builds images for ten minutes."""
    asked = os.environ.get("SONOFORGE_NODES") == "required"
    lacks = missing()
    if lacks and asked and os.geteuid() == 0:
        fail(lacks)
    elif lacks or not asked:
        skip(lacks or "tests on real nodes run with `make test-nodes`, or SONOFORGE_NODES=required")


def _may_make_namespaces() -> bool:
    unshare = shutil.which("unshare", path=SEARCH_PATH)
    return (
        bool(unshare) and subprocess.run([unshare, "--net", "true"], capture_output=True, check=False).returncode == 0
    )


def _wanted(packages: Mapping[str, str]) -> list[str]:
    return [package for program, package in packages.items() if not shutil.which(program, path=SEARCH_PATH)]


def _wanted_of_nodes() -> list[str]:
    return _wanted(PROGRAMS) + ([] if (CNI / "ptp").exists() else ["containernetworking-plugins"])


def install(wanted: list[str]) -> None:
    """Install packages, on Debian as root."""
    if not wanted or os.geteuid() != 0 or not shutil.which("apt-get", path=SEARCH_PATH):
        return
    print(f"installing Debian packages that tests need: {', '.join(wanted)}", file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *wanted]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"  apt-get {command[0]} failed: {done.stderr.strip()[-500:]}", file=sys.stderr, flush=True)
            return


if __name__ == "__main__":
    install(_wanted_of_nodes() if sys.argv[1:] == ["--nodes"] else _wanted(_FOR_ALL_TESTS))
