"""The audit of a run's logs finds each thing that must not be in them."""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import json
import sys
from pathlib import Path

import pytest

KEY = b"ab" * 32
SHARDS = (("a", "b"), ("c", "d"), ("e", "f"))
# Two virtual ranks of one image a step. Dealt in turn: epoch 0 gives shards 1 and 3 to rank 0 and shard 2 to rank 1;
# epoch 1 gives shard 2 to rank 0 and the others to rank 1; then epoch 2 begins.
STREAMS = ("abefdcfe", "cdabefab")


@pytest.fixture(scope="module")
def audit():
    """benchmarks/audit.py, whose folder is no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "audit.py"
    spec = importlib.util.spec_from_file_location("audit_under_test", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "shards.json"
    path.write_text(json.dumps({"shards": [{"keys": keys} for keys in SHARDS]}))
    return path


def name(key: str) -> str:
    return hmac.new(KEY, key.encode(), hashlib.sha256).hexdigest()[:12]


def write(folder: Path, streams=STREAMS, metric_steps=range(1, 9)) -> list[Path]:
    """Two checkpoints, of four steps each, with their logs."""
    for number, steps in enumerate((range(4), range(4, 8))):
        checkpoint = folder / f"step-{number}"
        checkpoint.mkdir()
        lines = [{"step": s, "vrank": r, "samples": [name(streams[r][s])]} for s in steps for r in (0, 1)]
        (checkpoint / "samples-00000-of-00001.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        shown = [s for s in metric_steps if s - 1 in steps]
        (checkpoint / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in shown))
    return sorted(folder.glob("step-*"))


def test_the_logs_of_a_good_run_have_no_fault(audit, manifest, tmp_path):
    logs = audit.read_logs(write(tmp_path))
    assert audit.log_faults(logs, steps=8, virtual_ranks=2) == []
    assert audit.epoch_faults(logs, manifest, KEY, virtual_ranks=2) == []


def test_a_step_that_two_checkpoints_have_is_found(audit, tmp_path):
    first, second = write(tmp_path)
    lines = (first / "samples-00000-of-00001.jsonl").read_text().splitlines(keepends=True)
    (second / "samples-00001-of-00002.jsonl").write_text(lines[-1])
    with (second / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4}\n')
    assert audit.log_faults(audit.read_logs([first, second]), steps=8, virtual_ranks=2) == [
        "1 x (step, virtual rank) repeated, first [(3, 1)]",
        "1 x metric step repeated, first [4]",
    ]


def test_a_step_that_no_checkpoint_has_is_found(audit, tmp_path):
    first, _ = write(tmp_path, metric_steps=[1, 2, 4])
    assert audit.log_faults(audit.read_logs([first]), steps=8, virtual_ranks=2) == [
        "8 x (step, virtual rank) missing, first [(4, 0), (4, 1), (5, 0)]",
        "5 x metric step missing, first [3, 5, 6]",
    ]


@pytest.mark.parametrize(
    ("streams", "faults"),
    [
        # Sample d, in epoch 0, is left out for a second c.
        (("abefdcfe", "ccabefab"), {0: ["more than once", "never"]}),
        # A virtual rank goes on with an epoch that is not over: what was dealt to it in epoch 1 comes too early.
        (("abefdcfe", "cabefdab"), {0: ["more than once", "never"], 1: ["more than once", "never"]}),
        # A sample that the manifest does not have.
        (("abefxcfe", "cdabefab"), {1: ["unknown", "never"]}),
        # Epoch 2 is under way: what is missing may come, what came twice may not.
        (("abefdcff", "cdabefab"), {2: ["more than once"]}),
    ],
)
def test_an_epoch_that_does_not_hold_each_sample_once_is_found(audit, manifest, tmp_path, streams, faults):
    found = audit.epoch_faults(audit.read_logs(write(tmp_path, streams)), manifest, KEY, virtual_ranks=2)
    told = [f"epoch {epoch}: 1 samples {what}" for epoch, kinds in faults.items() for what in kinds]
    assert [line.partition(",")[0] for line in found] == told


def test_evaluations_that_were_told_twice_or_never_are_found(audit, tmp_path):
    events = tmp_path / "events.jsonl"
    told = ["s-1, tiny: x", "s-2, tiny: x", "s-2, tiny: x", "floors of tiny: x"]
    lines = [{"reason": "Evaluated", "message": message} for message in told]
    lines.append({"reason": "EvaluationRetried", "message": "s-3, tiny: x"})
    events.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"reason": "Eval')
    assert audit.event_faults(events, ["s-1"]) == ["s-2 was told to be evaluated 2 times"]
    assert audit.event_faults(events, ["s-1", "s-2", "s-3"]) == [
        "s-2 was told to be evaluated 2 times",
        "s-3 was told to be evaluated 0 times",
    ]
