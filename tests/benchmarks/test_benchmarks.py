"""Benchmarks run, at sizes where their ratios mean nothing. `make bench` measures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-bench" / "bin" / "python"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("script", "count"), [("input_pipeline.py", 4), ("sinkhorn.py", 3), ("checkpoint_stall.py", 1)]
)
def test_the_table_has_a_finite_ratio_and_a_command_in_each_row(script: str, count: int) -> None:
    done = run("benchmarks/run.py", "--quick", "--only", script)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.strip().splitlines()[2:]]
    assert len(rows) == count
    for row in rows:
        ratio, command = float(row[3].split()[0]), row[5]
        assert math.isfinite(ratio)
        assert ratio > 0
        assert command.startswith(f"`{script}")


def test_loaders_give_every_image_once_from_s3() -> None:
    """The benchmark itself compares checksums."""
    if not PEERS.exists():
        pytest.skip("the peers are not installed: `make bench` makes .venv-bench")
    sizes = ("--samples=64", "--shard-mib=1", "--rounds=1", "--peer=webdataset")
    done = run("benchmarks/loaders.py", *sizes, "--kind=s3")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["kind"], record["peer"]) for record in records] == [("s3", "webdataset")]
    assert all(record["ratio"] > 0 for record in records)


def test_without_its_peers_the_table_ends_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for script in (ROOT / "benchmarks").glob("*.py"):
        (tmp_path / "benchmarks" / script.name).write_text(script.read_text())
    done = run(str(tmp_path / "benchmarks" / "run.py"), "--only", "loaders.py")
    assert done.returncode == 1
    assert "the peers are not installed: run `make bench`" in done.stderr


def test_a_partial_table_is_not_kept() -> None:
    done = run("benchmarks/run.py", "--write", "--quick")
    assert done.returncode == 2
    assert "--write takes the whole table" in done.stderr


def test_a_suite_of_fourteen_evaluations_costs_a_pass_for_each_set() -> None:
    done = run("benchmarks/evaluation.py", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["passes"] == {"checkpoint": 3, "pixels": 3}
    assert record["evaluations"] == {"checkpoint": 14, "pixels": 14}
    assert record["heads_ratio"] > 0
    assert set(record["seconds"]) == {"knn", "linear", "logreg", "fewshot", "segment-probe", "health"}
