"""`make image-bundle`: one archive for a hospital without internet, with images, chart, CRDs, SBOMs and checksums.

docs/air-gap.md goes with it and says what to do with it there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from build import NAMES, Engine, ImageError, find_engine, release, tag_of
from sbom import SbomError, document, of_debian_packages, of_wheel, wheels_of_lock
from wheelhouse import ROOT, default_folder

_STATUS = "/var/lib/dpkg/status"
_SUMS = "SHA256SUMS"
_NO_FILE = re.compile(r"no such container:path|could not (find|be found)", re.IGNORECASE)
"""What docker up to 20.10, later ones and podman say of a file that an image does not have."""


def write_bundle(engine: Engine, wheelhouse: Path, own: Path, target: Path) -> None:
    """Write the archive of the images that the engine holds. Raises ImageError and SbomError.

    Args:
        engine: Has built the images.
        wheelhouse: The wheels that they were built from.
        own: The wheel of this checkout.
        target: The archive, a .tar: the layers in it are compressed already.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        folder = Path(made) / f"sonoforge-{release()}"
        (folder / "images").mkdir(parents=True)
        (folder / "sbom").mkdir()
        for name in NAMES:
            save(engine, name, folder / "images" / f"{name}.tar")
            contents = [*wheels_of_lock(ROOT / "requirements" / f"{name}.lock", wheelhouse), of_wheel(own)]
            packages = of_debian_packages(read_file(engine, tag_of(name), _STATUS))
            listed = document(tag_of(name), release(), [*contents, *packages])
            (folder / "sbom" / f"{name}.cdx.json").write_text(json.dumps(listed, indent=1))
        shutil.copytree(ROOT / "manifests", folder / "manifests")
        shutil.copytree(ROOT / "charts" / "sonoforge", folder / "charts" / "sonoforge")
        shutil.copy(ROOT / "docs" / "air-gap.md", folder / "README.md")
        shutil.copy(ROOT / "LICENSE", folder)
        sums = "".join(f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in _files(folder))
        (folder / _SUMS).write_text(sums)
        part = target.with_suffix(".part")
        with tarfile.open(part, "w") as archive:
            for path in _files(folder):
                archive.add(path, str(path.relative_to(made)), filter=_without_time)
        part.rename(target)


def save(engine: Engine, name: str, archive: Path) -> None:
    """Save an image as an OCI archive, or as docker writes it: `ctr`, `podman` and `skopeo` read both."""
    tag = tag_of(name)
    match engine.program:
        case "buildah" | "podman":  # `podman save` would write the name that it gives the image on this machine
            engine.run("push", "--quiet", tag, f"oci-archive:{archive}:{release()}")
        case _:
            engine.run("save", f"--output={archive}", tag)


def read_file(engine: Engine, tag: str, path: str) -> str:
    """A text file of an image; empty where the image has none."""
    if engine.program == "buildah":
        container = engine.run("from", "--pull-never", tag).strip()
        try:
            found = Path(engine.run("mount", container).strip()) / path.lstrip("/")
            return found.read_text() if found.exists() else ""
        finally:
            engine.run("rm", container)
    container = engine.run("create", "--network=none", tag).strip()
    with tempfile.TemporaryDirectory() as made:
        copy = Path(made) / "file"
        try:
            engine.run("cp", f"{container}:{path}", str(copy), quiet=True)
        except ImageError as error:
            if not _NO_FILE.search(str(error)):
                raise
            return ""
        finally:
            engine.run("rm", container)
        return copy.read_text()


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _without_time(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "root", "root"
    return member


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Write the archive of the images that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="", help="what built the images; default: the first that is installed")
    parser.add_argument("--wheelhouse", type=Path, default=default_folder(), help="folder of the wheels")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / f"sonoforge-{release()}-images.tar")
    options = parser.parse_args()
    own = sorted((ROOT / "build" / "images" / "own").glob("*.whl"))
    if not own:
        sys.exit("build the images first: make images BASE=...")
    try:
        write_bundle(find_engine(options.engine), options.wheelhouse, own[-1], options.output)
    except (ImageError, SbomError) as error:
        sys.exit(str(error))
    print(options.output)


if __name__ == "__main__":
    main()
