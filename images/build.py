"""`make images BASE=...`: the trainer's and the operator's image, with buildah, podman or docker, without a network.

The base image is chosen by who builds, because it is theirs to scan and to keep up to date; it is pinned by digest:

    make images BASE=registry.example/python@sha256:...
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from wheelhouse import PYTHON, ROOT, WheelhouseError, default_folder, fill

NAMES = ("operator", "trainer")
ENGINES = ("buildah", "podman", "docker")
CONTEXT = ROOT / "build" / "images"
_PINNED = re.compile(r".+@sha256:[0-9a-f]{64}")
_NO_BASE = """BASE is missing: the image that the others are built on, with Python 3.11, pinned by digest.

    make images BASE=registry.example/python@sha256:...

How to find the digest of one that you trust, and how to make one from Debian packages: docs/images.md"""
_NOT_PINNED = """BASE is {base}, which can be another image tomorrow. Pin it by digest: NAME@sha256:...
An image that only exists on this machine has none; --local-base takes it. More: docs/images.md"""


class ImageError(Exception):
    """The images cannot be built; the message says what to do."""


@dataclass(frozen=True)
class Engine:
    """A program that builds images, with its own options."""

    program: str
    options: tuple[str, ...] = ()

    def run(self, *arguments: str, quiet: bool = False) -> str:
        """Run it and return what it printed; unless quiet, its errors are shown. Raises ImageError."""
        done = subprocess.run(
            [self.program, *self.options, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            check=False,
            env={"DOCKER_BUILDKIT": "1", **os.environ},  # docker before 23 builds without it, and then mounts nothing
        )
        if done.returncode:
            raise ImageError(f"{self.program} {arguments[0]} failed\n{(done.stderr or done.stdout or '')[-2000:]}")
        return done.stdout

    def build(self, file: Path, tag: str, arguments: Sequence[str]) -> None:
        """Build one image from the staged folder."""
        command = ["bud", "--layers"] if self.program == "buildah" else ["build"]
        if self.program != "docker":
            # Layers name no time, so equal content has an equal digest.
            command += ["--timestamp=0", "--pull-never", "--format=oci"]
        values = [f"--build-arg={argument}" for argument in arguments]
        # The wheels are all that a build needs; one that would fetch something fails.
        self.run(*command, "--network=none", *values, f"--file={file}", f"--tag={tag}", str(CONTEXT))


def find_engine(name: str = "") -> Engine:
    """The one that is named, or the first that is there. Raises ImageError."""
    for program in [name] if name else ENGINES:
        if shutil.which(program):
            return Engine(program)
    raise ImageError(f"images are built with {', '.join(ENGINES)}; none of them is on PATH: {name or 'install one'}")


def release() -> str:
    """Version of the package, which is the tag of the images."""
    return version("sonoforge")


def tag_of(name: str) -> str:
    """What the manifests call the image."""
    return f"sonoforge/{name}:{release()}"


def stage(wheels: Path) -> None:
    """Lay out what a build sees: tools, locks, wheels by hard link, and the wheel of this checkout."""
    shutil.rmtree(CONTEXT, ignore_errors=True)
    (CONTEXT / "wheels").mkdir(parents=True)
    shutil.copytree(ROOT / "images" / "tools", CONTEXT / "tools")
    for name in NAMES:
        shutil.copy(ROOT / "requirements" / f"{name}.lock", CONTEXT)
    for wheel in sorted(wheels.glob("*.whl")):
        link_or_copy(wheel, CONTEXT / "wheels" / wheel.name)
    command = [sys.executable, "-m", "hatchling", "build", "--target=wheel", f"--directory={CONTEXT / 'own'}"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if built.returncode:
        raise ImageError(f"the wheel of this checkout cannot be built:\n{built.stderr[-2000:]}")


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the other folder is on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def build(engine: Engine, base: str, names: Sequence[str] = NAMES, *, prune: bool = False) -> None:
    """Build the named images from the staged folder. Raises ImageError."""
    said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    own = _digest(*sorted((CONTEXT / "own").iterdir()))
    common = [f"BASE={base}", f"OWN={own}", f"VERSION={release()}", f"REVISION={said.stdout.strip() or 'unknown'}"]
    for name in names:
        dependencies = _digest(CONTEXT / f"{name}.lock", CONTEXT / "tools" / "install.sh")
        pruned = [f"PRUNE={str(prune).lower()}"] if name == "trainer" else []
        engine.build(
            ROOT / "images" / name / "Dockerfile", tag_of(name), [*common, f"DEPENDENCIES={dependencies}", *pruned]
        )


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    """Build what is asked for and print the tags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="", help="base image, pinned by digest")
    parser.add_argument("--local-base", default="", help="base image of this machine, which has no digest")
    parser.add_argument("--engine", choices=ENGINES, default="", help="default: the first that is installed")
    parser.add_argument("--only", choices=NAMES, action="append", help="build this image only")
    parser.add_argument("--python", default=PYTHON, help="version of Python in the base image")
    parser.add_argument("--wheelhouse", type=Path, default=default_folder(), help="folder of the wheels")
    parser.add_argument("--prune", action="store_true", help="leave out what torch does not load without a GPU")
    options = parser.parse_args()
    try:
        base = options.local_base or _pinned(options.base)
        engine = find_engine(options.engine)
        fill(options.wheelhouse, options.python)
        stage(options.wheelhouse)
        build(engine, base, options.only or NAMES, prune=options.prune)
    except (ImageError, WheelhouseError) as error:
        sys.exit(str(error))
    print("\n".join(tag_of(name) for name in options.only or NAMES))


def _pinned(base: str) -> str:
    if not base:
        raise ImageError(_NO_BASE)
    if not _PINNED.fullmatch(base):
        raise ImageError(_NOT_PINNED.format(base=base))
    return base


if __name__ == "__main__":
    main()
