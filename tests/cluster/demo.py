"""`make demo-cluster`: from nothing to a Succeeded PretrainJob on three real nodes of this machine.

Builds the images of this checkout, starts a control plane and three nodes with containerd, installs the operator from
`manifests/install.yaml`, trains on phantoms in S3 with three worker pods, evaluates every checkpoint, and prints
`kubectl get pj,ckpt`. Everything is ended and removed afterwards, but for the images.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import binaries
import packages
from image_store import ImageStore
from images import store
from node import add_gpus
from nodes import RealCluster
from rack import HOST
from real_site import RealSite, job

from sonoforge_trainer.storage.server import S3Server

_DONE = ("Succeeded", "Failed")
_SECONDS = 1200


def main() -> int:
    """Run it; 0 where the job succeeded."""
    lacks = packages.missing()
    if lacks:
        sys.exit(lacks)
    found, coredns = binaries.find(), binaries.find_coredns()
    assert found, "`make cluster-programs` built them"
    assert coredns, "and this one too"
    began = time.monotonic()
    say(began, "1/5", "building the images of this checkout")
    images = store()
    with tempfile.TemporaryDirectory(prefix="sonoforge-demo-") as folder:
        return _run(began, images, found[0], coredns, Path(folder))


def _run(began: float, images: ImageStore, programs: Path, coredns: Path, folder: Path) -> int:
    say(began, "2/5", "starting a control plane, DNS and three nodes")
    with RealCluster(programs, coredns, images) as cluster, S3Server(folder / "s3", address=HOST) as s3:
        for node in cluster.nodes:
            add_gpus(cluster.control_plane, node.name, 1)
        site = RealSite(cluster, s3)
        say(began, "3/5", "installing the operator: manifests/install.yaml")
        site.install()
        say(began, "4/5", "making phantoms in S3")
        site.make_data()
        say(began, "5/5", "a PretrainJob with three workers, every checkpoint evaluated")
        site.apply(job("demo", steps=40, every=10))
        _watch(began, site)
        print(site.kubectl("get", "pj,ckpt"), end="", flush=True)
        succeeded = site.phase("demo") == "Succeeded"
        if not succeeded:
            print(site.describe())
    say(began, "done" if succeeded else "failed", "everything is ended and removed")
    return 0 if succeeded else 1


def _watch(began: float, site: RealSite) -> None:
    """Say what the job does until it is done."""
    told = ""

    def done() -> bool:
        nonlocal told
        status = site.status("demo")
        now = f"{status.get('phase', 'Pending')}, step {status.get('step', 0)}"
        if now != told:
            told = now
            say(began, "5/5", now)
        return status.get("phase") in _DONE

    site.wait_for(done, "the job is done", _SECONDS)


def say(began: float, step: str, text: str) -> None:
    """One progress line."""
    print(f"[{step}] {text} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
