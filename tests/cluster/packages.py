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
import time
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
    "openssl": "openssl",
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
_NEW_SECONDS = 3600.0
"""For so long a machine that had to build the cluster's programs is a new one."""


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


def require(skip: Callable[[str], object], fail: Callable[[str], object], *, built: float | None = None) -> None:
    """Skip where real nodes cannot run or were not asked for; fail where `make test-nodes` asked for them as root.

    `make test` wants them where that is possible. `built` is the Unix time at which the cluster's programs were built
    here: in the hour after it, which a new machine spends on building them, `make test` leaves these tests out.
    """
    asked = os.environ.get("SONOFORGE_NODES", "")
    lacks = missing()
    if lacks and asked == "required" and os.geteuid() == 0:
        fail(lacks)
    elif lacks:
        skip(lacks)
    elif asked not in ("required", "wanted"):
        skip("tests on real nodes run with `make test-nodes`, or SONOFORGE_NODES=required")
    elif asked == "wanted" and built is not None and time.time() - built < _NEW_SECONDS:
        skip("the test cluster was built within the last hour, and images take minutes more: run `make test-nodes`")


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
