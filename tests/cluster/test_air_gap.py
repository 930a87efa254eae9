"""docs/air-gap.md, followed step by step: the commands are taken from the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import binaries
import packages
import pytest
from containerd import Containerd
from images import engine, folder, store

sys.path.insert(0, str(Path(__file__).parents[2] / "images"))

from build import CONTEXT, NAMES, release, tag_of
from bundle import write_bundle
from sbom import normal
from wheelhouse import default_folder

pytestmark = pytest.mark.timeout(1800)
PAGE = Path(__file__).parents[2] / "docs" / "air-gap.md"


def commands(start: str) -> list[str]:
    """The lines of the page that begin with a word, with the version of this checkout."""
    lines = PAGE.read_text().replace("VERSION", release()).splitlines()
    return [line for line in lines if line.startswith(f"{start} ")]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The archive as somebody inside has it, unpacked as the page says."""
    packages.require(pytest.skip, pytest.fail, built=binaries.built_at())
    store()  # builds the images
    inside = tmp_path_factory.mktemp("inside")
    archive = inside / f"sonoforge-{release()}-images.tar"
    (own,) = (CONTEXT / "own").glob("*.whl")
    write_bundle(engine(), default_folder(), own, archive)
    for command in commands("tar"):
        subprocess.run(command.split(), cwd=inside, check=True)
    archive.unlink()
    return inside / f"sonoforge-{release()}"


def test_the_checksums_of_the_page_hold_and_see_a_changed_file(unpacked: Path) -> None:
    (command,) = (c for c in commands("sha256sum") if "--check" in c)
    subprocess.run(command.split(), cwd=unpacked, check=True)
    listed = {line.split("  ", 1)[1] for line in (unpacked / "SHA256SUMS").read_text().splitlines()}
    present = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert present - listed == {"SHA256SUMS"}
    changed = unpacked / "manifests" / "install.yaml"
    before = changed.read_bytes()
    changed.write_bytes(before + b"#")
    assert subprocess.run(command.split(), cwd=unpacked, capture_output=True, check=False).returncode == 1
    changed.write_bytes(before)


def test_a_node_takes_the_images_under_the_names_that_the_manifests_use(unpacked: Path) -> None:
    containerd = Containerd(folder() / "air-gap", folder() / "air-gap" / "root")
    containerd.start()
    try:
        for command in commands("ctr"):
            words = [word for word in command.split()[1:] if word not in ("--namespace", "k8s.io")]
            words[-1] = str(unpacked / words[-1])
            containerd.ctr(*words)
        # CRI keeps each image under its digest too.
        found = {name for name in containerd.images() if not name.startswith("sha256:")}
    finally:
        containerd.component.stop()
        subprocess.run(["rm", "-rf", str(folder() / "air-gap")], check=True)
    wanted = set(re.findall(r"sonoforge/(?:operator|trainer):\S+", (unpacked / "manifests/install.yaml").read_text()))
    assert {f"docker.io/{name}" for name in wanted} == found


@contextmanager
def mounted(name: str) -> Iterator[Path]:
    """The files of an image."""
    buildah = engine()
    container = buildah.run("from", "--pull-never", tag_of(name)).strip()
    try:
        yield Path(buildah.run("mount", container).strip())
    finally:
        buildah.run("rm", container)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("name", NAMES)
def test_byte_code_in_the_image_is_not_tied_to_the_times_of_its_sources(name: str) -> None:
    """They are not kept, so it would be compiled again at every start, and differ from build to build."""
    unchecked_hash = (1).to_bytes(4, "little")
    with mounted(name) as root:
        flags = {path: path.read_bytes()[4:8] for path in root.glob("usr/local/lib/python3*/**/*.pyc")}
    assert len(flags) > 1000
    assert [path for path, flag in flags.items() if flag != unchecked_hash] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_sbom_lists_what_is_installed_in_the_image_and_nothing_else(unpacked: Path, name: str) -> None:
    listed = json.loads((unpacked / "sbom" / f"{name}.cdx.json").read_text())["components"]
    with mounted(name) as root:
        infos = {
            path.stem.rpartition("-")[::2] for path in root.glob("usr/local/lib/python3*/dist-packages/*.dist-info")
        }
        debian = {path.name.partition(":")[0].removesuffix(".list") for path in root.glob("var/lib/dpkg/info/*.list")}
    installed = {(normal(project), version) for project, version in infos}
    of_wheels = {(c["name"], c["version"]) for c in listed if c["purl"].startswith("pkg:pypi/")}
    assert of_wheels == installed
    assert {c["name"] for c in listed if c["purl"].startswith("pkg:deb/")} == debian
