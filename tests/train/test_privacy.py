"""A whole run on data full of identifiers: none of them is in any byte that it writes or says."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.timeout(1200)
PLANTED = (b"DOE^JANE", b"Doe_Jane", b"MRN-4711", b"1970-02-31", b"cine-DOE", b"ACC-0815")
"""In folder names, file names, columns (patient, clip, others), and inside the image files."""

JOB = """
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainJob
metadata: {{name: private}}
spec:
  runtimeRef: {{name: cpu}}
  training:
    model: {{depth: 1}}
    data: {{shards: "file://{folder}/train/shards.json"}}
    recipe:
      preset: tiny
      budgetSamples: 64
      globalBatch: 8
      virtualRanks: 2
      head: {{prototypes: 32, hiddenDim: 32, bottleneckDim: 16}}
      crops: {{globalSize: 16, localSize: 8, localCount: 1}}
  workers: {{minNodes: 1, maxNodes: 1}}
  checkpoints: {{uri: "file://{folder}/checkpoints", everySamples: 64}}
  evaluation: {{suiteRef: {{name: two}}, bestBy: good-knn/f1_macro}}
---
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainRuntime
metadata: {{name: cpu}}
spec:
  execution:
    {{device: cpu, loaderWorkers: 1, recordSamples: true, logEverySteps: 1, tensorboardDir: "{folder}/board"}}
---
apiVersion: sonoforge.dev/v1alpha1
kind: EvalSuite
metadata: {{name: two}}
spec:
  evaluations:
    - {{name: good, shards: "file://{folder}/eval/shards.json", protocols: [knn], bootstrap: 0}}
    - {{name: bad, shards: "file://{folder}/damaged/shards.json", protocols: [knn], bootstrap: 0}}
"""


def plant(folder: Path, rows: int, seed: int) -> Path:
    """A CSV of speckle images, one broken and one of 16 bits, all named and tagged with identifiers."""
    images = folder / "DOE^JANE"
    images.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x010E] = "DOE^JANE MRN-4711"
    listed = []
    for row in range(rows):
        gray = rng.integers(0, 256, (32, 32), dtype=np.uint8) // (1 + row % 2)
        name = f"Doe_Jane-{seed}-{row}.{'png' if row == 1 else 'jpg'}"
        if row == 1:
            Image.fromarray(gray.astype(np.uint16) * 257).save(images / name)
        else:
            Image.fromarray(gray).save(images / name, exif=exif)
        if row == 0:
            (images / name).write_bytes(b"\xff\xd8\xff\xe0DOE^JANE")
        listed.append(
            {
                "path": f"DOE^JANE/{name}",
                "mrn": f"MRN-4711-{row // 2}",
                "cine": f"cine-DOE-{row}",
                "born": "1970-02-31",
                "accession": "ACC-0815",
                "plane": ("head", "abdomen")[row % 2],
            }
        )
    path = folder / f"list-{seed}.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(listed[0]))
        writer.writeheader()
        writer.writerows(listed)
    return path


def sonoforge(folder: Path, *arguments: str) -> tuple[int, bytes]:
    """Exit code and everything printed."""
    command = [sys.executable, "-m", "sonoforge_trainer", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, timeout=900, check=False)
    return result.returncode, result.stdout + result.stderr


def test_no_identifier_is_in_any_byte_of_a_run(tmp_path, spoil, monkeypatch: pytest.MonkeyPatch):
    """With an image in the stream and one in an evaluation set that cannot be decoded, so that errors speak too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source, folder = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    folder.mkdir()
    (folder / "key").write_text("cd" * 32)
    spoken = b""
    for name, rows, splits in (("train", 40, "1,0,0"), ("eval", 40, "0.5,0.2,0.3"), ("damaged", 40, "0.5,0.2,0.3")):
        columns = ("--patient-column", "mrn", "--clip-column", "cine", "--label-column", "plane", "--splits", splits)
        output = ("--output", str(folder / name), "--name", name, "--hash-key-file", str(folder / "key"))
        table = plant(source, rows, len(name))
        code, said = sonoforge(folder, "shards", "build", "--csv", str(table), *columns, *output, "--on-error", "skip")
        assert code == 0, said
        assert b"Left out 1 sample" in said
        spoken += said
    spoil(folder / "train", 5)
    for ordinal in range(3, 39, 3):
        spoil(folder / "damaged", ordinal)
    (folder / "job.yaml").write_text(JOB.format(folder=folder))
    _, said = sonoforge(folder, "run", "job.yaml", "--state", "state", "--quiet")
    spoken += said

    status = json.loads((folder / "state" / "status.json").read_text())
    ends = {e["name"]: e["phase"] for e in status["checkpoints"][-1]["evaluations"]}
    assert ends == {"good": "Succeeded", "bad": "Failed"}, said
    assert status["checkpoints"][-1]["ref"]["step"] == 8
    logs = b"".join(file.read_bytes() for file in (folder / "state" / "logs").rglob("*") if file.is_file())
    assert b"stream.corrupt_sample" in logs
    written = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    names = {file.name.partition(".")[0] for file in written}
    assert {"report", "status", "events", "metrics", "model-card", "teacher", "samples-00000-of-00001"} <= names
    assert any(file.name.startswith("events.out.tfevents") for file in written)
    planted = b"".join(file.read_bytes() + str(file).encode() for file in source.rglob("*") if file.is_file())
    for name in PLANTED:
        assert name in planted
        assert name not in spoken
        assert [str(file) for file, data in written.items() if name in data or name in str(file).encode()] == []
