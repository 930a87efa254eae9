"""How a worker process ends: its exit code, and what its log says. Without agents, as on a laptop."""

from __future__ import annotations

import json
import signal

import pytest

from sonoforge_trainer import termination
from sonoforge_trainer.contract import ContractError, ExitCode


def test_a_configuration_is_all_that_a_laptop_needs(tiny):
    process = tiny.start_train(tiny.config(steps=3, loader_workers=2), SONOFORGE_HASH_KEY_FILE="")
    assert process.wait(90) == ExitCode.OK
    assert tiny.committed()[-1] == 3
    assert [line["step"] for line in tiny.said("train", "metrics")] == [1, 2, 3]
    assert [line["step"] for line in tiny.said("train", "finished")] == [3]


def test_a_signal_to_any_rank_saves_at_a_step_that_all_agree_on(tiny):
    """No rank leaves before all know that the checkpoint is committed, although rank 0 hosts the store they ask."""
    ranks = tiny.start_ranks(tiny.config(steps=5000, every=5000), 2)
    out = tiny.folder / "rank-0.out"
    tiny.wait_for(lambda: '"step": 5,' in out.read_text(), "step 5")
    ranks[1].send_signal(signal.SIGTERM)
    assert [rank.wait(90) for rank in ranks] == [ExitCode.TERMINATED, ExitCode.TERMINATED], tiny.output()
    first, saved = tiny.committed()
    assert first == 0
    assert saved >= 5
    assert tiny.logged_steps() == list(range(1, saved + 1))
    assert sorted(tiny.logged_samples()) == [(step, rank) for step in range(saved) for rank in (0, 1)]
    for name in ("rank-0", "rank-1"):
        assert [line["step"] for line in tiny.said(name, "stopped")] == [saved]
        assert tiny.said(name, "worker-failed") == []


def test_of_two_groups_that_train_at_once_one_goes_on_and_the_logs_hold_each_step_once(tiny):
    """The first group is parted from all others while it trains, and comes back when another one has gone on."""
    config = tiny.config(steps=30, every=10)
    parted = tiny.start_train(config)
    tiny.wait_for(lambda: tiny.checkpoints.exists() and 0 in tiny.committed(), "the first checkpoint")
    parted.send_signal(signal.SIGSTOP)
    reached = tiny.committed()[-1]
    assert reached < 30, "it was stopped too late"
    assert tiny.start("other", "-m", "sonoforge_trainer.train").wait(90) == ExitCode.OK
    parted.send_signal(signal.SIGCONT)
    assert parted.wait(90) == ExitCode.FAILED
    (failed,) = tiny.said("train", "worker-failed")
    assert failed["cause"] == "collective"
    assert "another process group of this run committed step" in failed["message"]
    assert tiny.committed() == [0, 10, 20, 30]
    assert tiny.logged_steps() == list(range(1, 31))


def test_ranks_that_cannot_restore_end_in_consequence_of_the_one_that_tried(tiny):
    config = tiny.config(steps=2)
    assert tiny.run_here(config.model_copy(update={"uid": "another"})) == ExitCode.OK
    codes = [rank.wait(90) for rank in tiny.start_ranks(config, 2)]
    assert codes == [ExitCode.CONFIG, ExitCode.FAILED], tiny.output()
    causes = [tiny.said(f"rank-{rank}", "worker-failed")[0]["cause"] for rank in (0, 1)]
    assert causes == ["config", "collective"]
    assert tiny.committed() == [0, 2]


def test_a_shard_that_is_missing_is_named_by_the_process_that_needs_it(tiny):
    """Also where a loader's process was the first to look for it."""
    (tiny.copy_shards() / "tiny-00001.tar").unlink()
    assert tiny.start_train(tiny.config(loader_workers=1)).wait(90) == ExitCode.DATA
    (failed,) = tiny.said("train", "worker-failed")
    assert "tiny-00001.tar is missing" in failed["message"]
    assert (failed["cause"], failed["rank"]) == ("data", 0)


def test_a_wrong_configuration_names_the_field(tiny):
    tiny.write(tiny.config())
    document = json.loads((tiny.folder / "config.json").read_text())
    document["training"]["recipe"]["globalBach"] = 8
    (tiny.folder / "config.json").write_text(json.dumps(document))
    assert tiny.start("train", "-m", "sonoforge_trainer.train").wait(90) == ExitCode.CONFIG
    (failed,) = tiny.said("train", "worker-failed")
    assert "configuration.training.recipe.globalBach: unknown key" in failed["message"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"device": "cuda"}, "execution.device"),
        ({"cache_bytes": 1000}, "execution.cacheBytes"),
        ({"recipe": {"budgetSamples": 128, "globalBatch": 128, "virtualRanks": 1}}, "recipe.globalBatch"),
    ],
)
def test_what_only_a_worker_can_find_wrong_is_a_configuration_error_that_names_the_field(here, changes, field):
    with pytest.raises(ContractError) as caught:
        here.run_here(here.config(**changes))
    ending = termination.classify(caught.value)
    assert termination.exit_code(ending) == ExitCode.CONFIG
    assert field in ending.message


def test_a_run_that_diverges_is_given_up_and_says_so_in_json_that_others_read(tiny):
    recipe = {
        "optim": {"baseLr": 1e36, "clipNorm": 0},
        "schedule": {"warmupSamples": 0, "freezeLastLayerSamples": 0},
    }
    process = tiny.start_train(tiny.config(steps=200, every=10, recipe=recipe))
    assert process.wait(60) == ExitCode.NOT_FINITE
    (failed,) = tiny.said("train", "worker-failed")
    assert "no finite gradient in 50 steps in a row" in failed["message"]
    records = tiny.said("train", "metrics") + tiny.log("metrics.jsonl")
    assert "NaN" not in json.dumps(records)
    assert "Infinity" not in json.dumps(records)
    assert records[-1]["skipped_steps"] >= 1
