"""What `make images` and `make image-bundle` say and write, without building an image."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9

Package: perl
Status: deinstall ok config-files
Architecture: amd64
Version: 5.36
"""


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom_under_test", ROOT / "images" / "sbom.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "images" / "build.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def wheel(folder: Path, name: str, metadata: str) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        stem = "-".join(name.split("-")[:2])
        archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.4\n{metadata}\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "BASE is missing"),
        (("--base=python:3.11-slim",), "Pin it by digest"),
        (("--base=python@sha256:12",), "Pin it by digest"),
    ],
)
def test_a_base_that_is_missing_or_can_change_is_refused_with_what_to_do(arguments, said):
    done = images(*arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "docs/images.md" in done.stderr
    assert "Traceback" not in done.stderr


def test_dockerfiles_have_the_same_steps_but_for_the_extra():
    def steps(name: str) -> list[str]:
        text = (ROOT / "images" / name / "Dockerfile").read_text()
        return [line.split("=")[0] for line in text.splitlines() if line.startswith(("FROM", "RUN", "USER", "ENTRY"))]

    assert steps("trainer") == steps("operator")


def test_locks_of_the_images_pin_what_the_tests_run_with():
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()
        return dict(line.split(" ")[0].split("==") for line in lines if "==" in line and not line.startswith(" "))

    tested = pins("dev")
    for image in ("trainer", "operator"):
        assert pins(image).items() <= tested.items(), "run `make lock`"
    assert "torch" in pins("trainer")
    assert "torch" not in pins("operator")
    assert "numpy" not in pins("operator")


def test_a_wheel_is_listed_with_its_digest_and_licence(sbom, tmp_path):
    path = wheel(tmp_path, "Some_Thing-1.2-py3-none-any.whl", "License-Expression: MIT")
    assert sbom.of_wheel(path) == {
        "type": "library",
        "name": "some-thing",
        "version": "1.2",
        "purl": "pkg:pypi/some-thing@1.2",
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}],
        "licenses": [{"expression": "MIT"}],
    }


def test_a_licence_is_also_found_in_classifiers_and_never_as_a_page_of_text(sbom, tmp_path):
    metadata = "License: a page\n  of text\nClassifier: License :: OSI Approved :: BSD License"
    listed = sbom.of_wheel(wheel(tmp_path, "a-1-py3-none-any.whl", metadata))
    assert listed["licenses"] == [{"license": {"name": "BSD License"}}]


def test_only_installed_debian_packages_are_listed(sbom):
    (listed,) = sbom.of_debian_packages(STATUS)
    assert listed["purl"] == "pkg:deb/debian/libc6@2.36-9?arch=amd64"


def test_only_wheels_of_the_lock_are_listed(sbom, tmp_path):
    wheel(tmp_path, "wanted-1.0-py3-none-any.whl", "")
    wheel(tmp_path, "other-1.0-py3-none-any.whl", "")
    lock = tmp_path / "x.lock"
    lock.write_text("wanted==1.0 \\\n    --hash=sha256:00\nabsent==2 ; sys_platform == 'win32' \\\n")
    assert [c["name"] for c in sbom.wheels_of_lock(lock, tmp_path)] == ["wanted"]


def test_an_empty_wheelhouse_is_an_error_and_not_an_empty_list(sbom, tmp_path):
    lock = tmp_path / "x.lock"
    lock.write_text("wanted==1.0 \\\n")
    with pytest.raises(sbom.SbomError, match="wheelhouse"):
        list(sbom.wheels_of_lock(lock, tmp_path))


def test_equal_contents_make_an_equal_document(sbom):
    parts = [{"type": "library", "name": n, "version": "1", "purl": f"pkg:pypi/{n}@1"} for n in ("a", "b")]
    one, two = sbom.document("i", "1", parts), sbom.document("i", "1", reversed(parts))
    assert json.dumps(one) == json.dumps(two)
    assert one["serialNumber"] != sbom.document("i", "1", parts[:1])["serialNumber"]
