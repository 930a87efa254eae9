"""The images that the test cluster writes itself."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from oci import PAUSE, write_pause
from packages import missing


def files(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        return {member.name: members.extractfile(member).read() for member in members if member.isfile()}


@pytest.fixture
def archive() -> dict[str, bytes]:
    out = io.BytesIO()
    write_pause(out)
    return files(out.getvalue())


def test_the_sandbox_image_names_blobs_that_are_in_it(archive):
    (descriptor,) = json.loads(archive["index.json"])["manifests"]
    assert descriptor["annotations"] == {"io.containerd.image.name": PAUSE}
    manifest = json.loads(archive[f"blobs/{descriptor['digest'].replace(':', '/')}"])
    for part in (manifest["config"], *manifest["layers"]):
        assert len(archive[f"blobs/{part['digest'].replace(':', '/')}"]) == part["size"]


@pytest.mark.skipif("x86-64" in missing(), reason="the program is for Linux on x86-64")
def test_its_program_waits_until_it_is_killed(archive, tmp_path: Path):
    layer = next(content for name, content in archive.items() if b"pause\0" in content and name != "index.json")
    program = tmp_path / "pause"
    program.write_bytes(files(layer)["pause"])
    program.chmod(0o755)
    process = subprocess.Popen([str(program)])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    before = process_seconds(process.pid)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    assert process_seconds(process.pid) == before, "it waits, and does not run in a circle"
    process.kill()
    assert process.wait(5) == -9


def process_seconds(pid: int) -> float:
    used = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return float(used[11]) + float(used[12])
