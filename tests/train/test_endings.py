"""How a worker process ends: its exit code, and what its log says. Plain processes, as on a laptop."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sonoforge_trainer.contract import ExitCode


def test_a_configuration_is_all_that_a_laptop_needs(tiny):
    assert tiny.start_train(tiny.config(steps=3, loader_workers=2), SONOFORGE_HASH_KEY_FILE="").wait(60) == ExitCode.OK
    assert tiny.committed()[-1] == 3
    assert [line["step"] for line in tiny.said("train", "metrics")] == [1, 2, 3]
    assert [line["step"] for line in tiny.said("train", "finished")] == [3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_code_says_that_the_work_is_not_done(tiny, number):
    process = tiny.start_train(tiny.config(steps=5000, every=5000))
    out = tiny.folder / "train.out"
    tiny.wait_for(lambda: '"step": 5,' in out.read_text(), "step 5")
    process.send_signal(number)
    assert process.wait(60) == ExitCode.TERMINATED
    first, saved = tiny.committed()
    assert first == 0
    assert saved >= 5
    assert tiny.logged_steps() == list(range(1, saved + 1))
    assert tiny.said("train", "worker-failed") == []


def wrong_key(tiny) -> None:
    document = json.loads((tiny.folder / "config.json").read_text())
    document["training"]["recipe"]["globalBach"] = 8
    (tiny.folder / "config.json").write_text(json.dumps(document))


def missing_shard(tiny) -> None:
    copy = tiny.folder / "shards"
    copy.mkdir()
    source = Path(tiny.shards.removeprefix("file://")).parent
    for file in source.iterdir():
        if file.name != "tiny-00001.tar":
            (copy / file.name).symlink_to(file)
    text = (tiny.folder / "config.json").read_text()
    (tiny.folder / "config.json").write_text(text.replace(tiny.shards, f"file://{copy}/shards.json"))


def missing_manifest(tiny) -> None:
    text = (tiny.folder / "config.json").read_text()
    (tiny.folder / "config.json").write_text(text.replace("shards.json", "no-such.json"))


@pytest.mark.parametrize(
    ("spoil", "execution", "code", "named"),
    [
        (wrong_key, {}, ExitCode.CONFIG, "configuration.training.recipe.globalBach"),
        (None, {"device": "cuda"}, ExitCode.CONFIG, "execution.device"),
        (None, {"cache_bytes": 1000}, ExitCode.CONFIG, "execution.cacheBytes"),
        (missing_shard, {}, ExitCode.DATA, "tiny-00001.tar is missing"),
        (missing_shard, {"loader_workers": 1}, ExitCode.DATA, "tiny-00001.tar is missing"),
        (missing_manifest, {}, ExitCode.DATA, "no-such.json"),
    ],
)
def test_a_fault_ends_with_its_class_and_names_what_to_look_at(
    tiny, spoil: Callable[..., None] | None, execution, code, named
):
    tiny.write(tiny.config(**execution))
    if spoil:
        spoil(tiny)
    assert tiny.start("train", "-m", "sonoforge_trainer.train").wait(60) == code
    (failed,) = tiny.said("train", "worker-failed")
    assert named in failed["message"]
    assert tiny.said("train", "finished") == []


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
