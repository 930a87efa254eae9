"""The repository keeps the promises that a tool cannot."""

from __future__ import annotations

import operator
import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tracked(*patterns: str) -> list[Path]:
    out = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, check=True, text=True)
    return [ROOT / name for name in out.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_folder_shadows_the_standard_library():
    assert operator.__file__ is not None
    assert Path(operator.__file__).parent == Path(sysconfig.get_path("stdlib"))
    assert [p for p in ("operator", "trainer", "tests") if (ROOT / p / "__init__.py").exists()] == []


def test_every_direct_dependency_has_a_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    assert [d for d in direct if ">=" not in d] == []


def test_the_old_torchelastic_package_is_not_installed():
    assert "torchelastic" not in (ROOT / "requirements" / "dev.lock").read_text()


def test_locks_have_hashes_and_no_index_address():
    for lock in tracked("requirements/*.lock"):
        text = lock.read_text()
        pins = re.findall(r"^[a-z0-9][^ ]*==[^ ]+", text, re.MULTILINE)
        assert pins, lock.name
        assert text.count("--hash=sha256:") >= len(pins)
        assert "://" not in text
        assert "--index-url" not in text


def test_every_make_target_says_what_it_does():
    lines = (ROOT / "Makefile").read_text().splitlines()
    phony = {name for line in lines if line.startswith(".PHONY:") for name in line.split()[1:]}
    described = {line.split(":")[0] for line in lines if "##" in line and ":" in line}
    assert phony - described == set()
    assert {"demo", "test", "check", "bench"} <= phony


def test_the_readme_has_the_two_commands_and_says_what_torchelastic_is():
    readme = (ROOT / "README.md").read_text()
    assert readme.index("make demo") < readme.index("make test")
    assert "torch.distributed.elastic" in readme
