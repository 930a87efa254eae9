"""When a run saves, what its logs hold, and how it goes on: one process, inside the test."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sonoforge_trainer import termination
from sonoforge_trainer.checkpoint import CheckpointFailedError
from sonoforge_trainer.contract import ExitCode
from sonoforge_trainer.train import Told


def block(folder: Path, step: int) -> None:
    """Put a file where the folder of a step's checkpoint has to be: uploads of it fail."""
    folder.mkdir(exist_ok=True)
    (folder / f"step-{step:010d}").write_text("in the way")


def test_a_checkpoint_after_every_step_waits_for_the_one_before_and_the_logs_go_on_from_one_to_the_next(here):
    assert here.run_here(here.config(steps=5, every=1)) == ExitCode.OK
    assert here.committed() == [0, 1, 2, 3, 4, 5]
    assert here.logged_steps() == [1, 2, 3, 4, 5]
    assert here.logged_samples() == [(step, rank) for step in range(5) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("image", "named"),
    [
        ("registry:5000/trainer:1@sha256:" + "a" * 64, "sha256:" + "a" * 64),
        ("registry:5000/trainer:1", "registry:5000/trainer:1"),
    ],
)
def test_a_checkpoint_names_the_image_that_made_it(here, monkeypatch, image, named):
    monkeypatch.setenv("SONOFORGE_IMAGE", image)
    assert here.run_here(here.config(steps=1)) == ExitCode.OK
    manifests = [json.loads(path.read_text()) for path in here.checkpoints.glob("*/*/manifest.json")]
    assert [manifest["imageDigest"] for manifest in manifests] == [named, named]


def test_what_is_due_while_the_one_before_still_uploads_is_left_out_and_its_logs_are_in_the_next(here):
    assert here.run_here(here.config(steps=41, every=2)) == ExitCode.OK
    steps = here.committed()
    assert (steps[0], steps[-1]) == (0, 41)
    assert {step % 2 for step in steps[:-1]} == {0}
    assert here.logged_steps() == list(range(1, 42))
    assert here.logged_samples() == [(step, rank) for step in range(41) for rank in (0, 1)]


def test_the_clock_makes_one_checkpoint_an_interval(here):
    """Not two: the ranks hear of the wish one step late, when the clock has asked once more."""
    began = time.monotonic()
    assert here.run_here(here.config(steps=60, every=None, every_seconds=1)) == ExitCode.OK
    seconds = time.monotonic() - began
    steps = here.committed()
    assert (steps[0], steps[-1]) == (0, 60)
    assert len(steps) <= seconds + 2
    assert min(later - earlier for earlier, later in itertools.pairwise(steps[:-1])) > 1
    assert here.logged_steps() == list(range(1, 61))


def test_a_run_whose_uploads_fail_trains_on_and_the_next_checkpoint_has_the_logs(here):
    block(here.checkpoints, 2)
    block(here.checkpoints, 3)
    assert here.run_here(here.config(steps=5, every=1)) == ExitCode.OK
    assert here.committed() == [0, 1, 4, 5]
    assert here.logged_steps() == [1, 2, 3, 4, 5]
    assert here.logged_samples() == [(step, rank) for step in range(5) for rank in (0, 1)]


def test_three_failed_uploads_in_a_row_end_the_run_as_a_fault_of_storage(here):
    for step in (2, 3, 4):
        block(here.checkpoints, step)
    with pytest.raises(CheckpointFailedError, match="the checkpoint of step 4 was not written") as caught:
        here.run_here(here.config(steps=40, every=1))
    assert termination.exit_code(termination.classify(caught.value)) == ExitCode.STORAGE
    assert here.committed() == [0, 1]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(here):
    block(here.checkpoints, 3)
    with pytest.raises(CheckpointFailedError, match="step 3"):
        here.run_here(here.config(steps=3, every=None))
    assert here.committed() == [0]


def test_a_run_told_to_stop_saves_where_it_stands_and_goes_on_from_there_as_if_nothing_had_been(here, tmp_path):
    config = here.config(steps=8, every=4)
    assert here.run_here(config, Told(stop=True)) == ExitCode.TERMINATED
    assert here.committed() == [0, 2]
    assert here.run_here(config) == ExitCode.OK
    assert here.committed() == [0, 2, 4, 8]
    assert here.logged_steps() == [1, 2, 3, 4, 5, 6, 7, 8]
    stopped = here.log("metrics.jsonl")
    shutil.move(here.checkpoints, tmp_path / "stopped")
    assert here.run_here(config) == ExitCode.OK
    assert [(r["loss"], r["lr"]) for r in here.log("metrics.jsonl")] == [(r["loss"], r["lr"]) for r in stopped]


def test_corrupt_samples_are_counted_in_the_log_also_over_a_restart(here, spoil, tmp_path):
    spoil(here.copy_shards(), 7)
    config = here.config(steps=24, every=4)
    assert here.run_here(config) == ExitCode.OK
    counts = [record["corrupt_samples"] for record in here.log("metrics.jsonl")]
    assert sum(counts) >= 1
    shutil.move(here.checkpoints, tmp_path / "whole")
    assert here.run_here(config, Told(stop=True)) == ExitCode.TERMINATED
    assert here.run_here(config) == ExitCode.OK
    assert [record["corrupt_samples"] for record in here.log("metrics.jsonl")] == counts


def test_a_run_told_to_stop_in_its_last_steps_finishes(here):
    assert here.run_here(here.config(steps=2), Told(stop=True)) == ExitCode.OK
    assert here.committed() == [0, 2]


def test_a_finished_run_that_is_started_again_changes_nothing(here):
    config = here.config(steps=3)
    assert here.run_here(config) == ExitCode.OK
    before = sorted(here.checkpoints.rglob("*"))
    assert here.run_here(config) == ExitCode.OK
    assert sorted(here.checkpoints.rglob("*")) == before


def test_a_damaged_checkpoint_is_done_again_from_the_one_before(here):
    config = here.config(steps=4, every=1)
    assert here.run_here(config) == ExitCode.OK
    (state,) = here.checkpoints.glob("step-0000000004/*/state-*.safetensors")
    data = bytearray(state.read_bytes())
    data[-1] ^= 0xFF
    state.write_bytes(data)
    assert here.run_here(config) == ExitCode.OK
    assert here.committed() == [0, 1, 2, 3, 4, 4]
    assert here.logged_steps() == [1, 2, 3, 4, 4]


def test_records_are_means_over_an_interval_and_the_last_step_has_one(here):
    assert here.run_here(here.config(steps=5, every=None, log_every_steps=2)) == ExitCode.OK
    coarse = here.log("metrics.jsonl")
    assert [record["step"] for record in coarse] == [2, 4, 5]
    shutil.rmtree(here.checkpoints)
    assert here.run_here(here.config(steps=5, every=None)) == ExitCode.OK
    fine = [record["loss"] for record in here.log("metrics.jsonl")]
    wanted = [(fine[0] + fine[1]) / 2, (fine[2] + fine[3]) / 2, fine[4]]
    assert [record["loss"] for record in coarse] == pytest.approx(wanted, rel=1e-6)


def test_tensorboard_shows_each_step_once_also_after_steps_were_lost(here, tmp_path):
    """The events of step 4, which no checkpoint has, are taken back by the process group that does it again."""
    board = tmp_path / "board"
    config = here.config(steps=4, every=1, tensorboard_dir=str(board))
    assert here.run_here(config) == ExitCode.OK
    shutil.rmtree(here.checkpoints / "step-0000000004")
    assert here.run_here(config) == ExitCode.OK
    events = EventAccumulator(str(board)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_two_runs_at_once_share_a_cache_that_holds_each_shard_once(here, tmp_path):
    cache = tmp_path / "cache"
    codes: list[ExitCode] = []

    def train(name: str) -> None:
        config = here.config(steps=4, cache_dir=str(cache))
        checkpoints = config.checkpoints.model_copy(update={"uri": f"file://{tmp_path}/{name}"})
        codes.append(here.run_here(config.model_copy(update={"checkpoints": checkpoints})))

    runs = [threading.Thread(target=train, args=(name,)) for name in ("one", "other")]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert codes == [ExitCode.OK, ExitCode.OK]
    assert len(list(cache.glob("*.tar"))) == 3
    assert list(cache.glob("*.part")) == []
    assert [len(list((tmp_path / name).glob("*/*/COMMIT"))) >= 2 for name in ("one", "other")] == [True, True]
