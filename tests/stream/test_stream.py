import json
import multiprocessing
import os
import re
import select
from itertools import islice

import pytest
import structlog
import torch

from sonoforge_trainer.cache import DataError
from sonoforge_trainer.contract import ExecutionConfig, TrainConfig
from sonoforge_trainer.micro_batch import MicroBatch
from sonoforge_trainer.photometric import Photometrics
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.stream import Stream


def tensors(batch):
    """Everything in a micro-batch, by name, as something that can be compared."""
    named = {}
    for name in batch.__dataclass_fields__:
        part = getattr(batch, name)
        part = part.values_n7 if isinstance(part, Photometrics) else part
        named[name] = (part.dtype, part.shape, part.tolist()) if isinstance(part, torch.Tensor) else part
    return named


def run(stream, first_step, steps, ranks=(0, 1, 2, 3)):
    """The micro-batches of some steps, by step and virtual rank."""
    batches = [b for step in islice(stream.batches(first_step, ranks), steps) for b in step]
    assert [(b.step, b.virtual_rank) for b in batches] == [
        (step, rank) for step in range(first_step, first_step + steps) for rank in ranks
    ]
    return {(b.step, b.virtual_rank): tensors(b) for b in batches}


@pytest.fixture(scope="module")
def constant(data_set, make_training, tmp_path_factory):
    """Six steps of one process that was never stopped."""
    execution = ExecutionConfig(device="cpu", loader_workers=0, cache_dir=str(tmp_path_factory.mktemp("cache")))
    folder, manifest = data_set
    hasher = KeyHasher(b"0123456789abcdef")
    with Stream(manifest, folder.as_uri(), make_training(), execution, Storage(), hasher) as stream:
        return run(stream, 0, 6)


def test_a_micro_batch_has_the_promised_shapes(constant):
    """3 samples, 1 channel, crops of 32 and 16 pixels, patches of 8: two views and two local crops each."""
    batch = constant[2, 1]
    shapes = {name: tuple(part[1]) for name, part in batch.items() if isinstance(part, tuple) and part}
    assert shapes == {
        "globals_u8": (6, 1, 32, 32),
        "locals_u8": (6, 1, 16, 16),
        "globals_photo": (6, 7),
        "locals_photo": (6, 7),
        "masks": (6, 16),
        "mask_indices": (15,),
        "mask_weights": (15,),
        "sample_ids": (3,),
        "visits": (3,),
    }
    assert batch["globals_u8"][0] == batch["locals_u8"][0] == torch.uint8


def test_mask_weights_of_a_crop_sum_to_one_at_its_masked_patches(constant):
    for batch in constant.values():
        masks = torch.tensor(batch["masks"][2])
        assert torch.nonzero(masks.flatten()).flatten().tolist() == batch["mask_indices"][2]
        weights = torch.zeros(masks.numel())
        weights[batch["mask_indices"][2]] = torch.tensor(batch["mask_weights"][2])
        torch.testing.assert_close(weights.view(masks.shape).sum(dim=1), masks.any(dim=1).float())


@pytest.mark.parametrize("ranks", [(0,), (3, 1), (2, 3), (1,)])
@pytest.mark.parametrize("first_step", [0, 3])
def test_any_process_at_any_first_step_makes_the_same_micro_batches(constant, data_set, make_stream, ranks, first_step):
    for place, batch in run(make_stream(*data_set), first_step, 2, ranks).items():
        assert batch == constant[place]


def test_each_sample_comes_once_an_epoch_over_all_virtual_ranks(data_set, make_stream):
    """32 samples, 4 virtual ranks of 3: three steps reach into the second epoch."""
    visited = {}
    for batch in run(make_stream(*data_set), 0, 6).values():
        for ordinal, visit in zip(batch["sample_ids"][2], batch["visits"][2], strict=True):
            visited.setdefault(visit, []).append(ordinal)
    assert sorted(visited[0]) == list(range(32))
    assert sorted(visited[1]) == list(range(32))


def test_another_seed_gives_other_samples_and_pixels(constant, data_set, make_stream, make_training):
    other = run(make_stream(*data_set, training=make_training(seed=1)), 0, 1)
    assert other[0, 0]["sample_ids"] != constant[0, 0]["sample_ids"]
    assert other[0, 0]["masks"] != constant[0, 0]["masks"]


def test_worker_processes_make_what_the_thread_makes(constant, data_set, make_stream):
    stream = make_stream(*data_set, workers=2)
    for place, batch in run(stream, 1, 3, (0, 2, 3)).items():
        assert batch == constant[place]


def test_an_error_in_a_worker_process_arrives_as_itself(make_data_set, make_stream, tmp_path):
    manifest = make_data_set(tmp_path / "shards")
    (tmp_path / "shards" / "test-000001.tar").unlink()
    stream = make_stream(tmp_path / "shards", manifest, workers=1)
    with pytest.raises(DataError, match=r"^shard file://.*/test-000001.tar is missing"):
        run(stream, 0, 3)


def test_the_stream_ends_with_the_recipe(data_set, make_stream, make_training):
    stream = make_stream(*data_set, training=make_training(budgetSamples=30))
    assert [batches[0].step for batches in stream.batches(1, [0])] == [1, 2]


def test_local_crops_may_be_left_out(data_set, make_stream, make_training):
    crops = {"globalSize": 32, "localSize": 16, "localCount": 0}
    batch = run(make_stream(*data_set, training=make_training(crops=crops)), 0, 1)[0, 0]
    assert batch["locals_u8"][1] == (0, 1, 16, 16)


def test_colour_models_get_three_channels(data_set, make_stream, make_training):
    document = make_training().document()
    document["model"]["inChannels"] = 3
    document["data"].update(mean=[0.5] * 3, std=[0.5] * 3)
    batch = run(make_stream(*data_set, training=TrainConfig.parse(document)), 0, 1)[0, 0]
    crops = torch.tensor(batch["globals_u8"][2])
    assert crops.shape == (6, 3, 32, 32)
    assert torch.equal(crops[:, 0], crops[:, 2])


# Faults.


def changed(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "is missing. Restore it"),
        (lambda data: data[:-512], "is not the one that the manifest lists"),
        (lambda data: data + bytes(512), "is not the one that the manifest lists"),
        (lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:], "is not the one that the manifest lists"),
        (lambda data: b"", "is not the one that the manifest lists"),
    ],
    ids=["missing", "truncated", "longer", "one flipped bit", "empty"],
)
def test_a_damaged_shard_is_an_error_that_names_it(make_data_set, make_stream, tmp_path, change, says):
    folder = tmp_path / "shards"
    manifest = make_data_set(folder)
    if change:
        changed(folder, "test-000002.tar", change)
    else:
        (folder / "test-000002.tar").unlink()
    with pytest.raises(DataError, match=rf"^shard file://.*/shards/test-000002\.tar {says}") as caught:
        run(make_stream(folder, manifest), 0, 3)
    assert "MRN" not in str(caught.value)


def test_corrupt_images_are_replaced_and_nothing_else_moves(constant, make_data_set, make_stream, tmp_path):
    """Samples 5 and 21 are cut in half: they alone are replaced, by samples of other clips, in every run alike."""
    folder = tmp_path / "shards"
    manifest = make_data_set(folder, corrupt=(5, 21))
    # The order depends on seed and counts, not on the digests of the shards.
    with structlog.testing.capture_logs() as logs:
        damaged = run(make_stream(folder, manifest), 0, 6)
    again = run(make_stream(folder, manifest, cache_dir=str(tmp_path / "other")), 4, 2, (2, 0))
    assert all(again[place] == damaged[place] for place in again)
    replaced = []
    for place, batch in damaged.items():
        before, after = constant[place]["sample_ids"][2], batch["sample_ids"][2]
        replaced += [b for b, a in zip(before, after, strict=True) if b != a]
        assert sorted(set(batch["corrupt_ids"])) == sorted(b for b, a in zip(before, after, strict=True) if b != a)
        assert len({ordinal // 2 for ordinal in after}) == 3
        assert batch["masks"] == constant[place]["masks"]
    assert sorted(set(replaced)) == [5, 21]
    named = [entry for entry in logs if entry["event"] == "stream.corrupt_sample"]
    assert len(named) == 2, "each is named once, however often it comes"
    assert all(re.fullmatch("[0-9a-f]{12}", entry["sample"]) for entry in named)
    assert "MRN" not in json.dumps(logs)


def test_a_shard_without_one_good_image_is_made_up_for_by_others(make_data_set, make_stream, tmp_path):
    manifest = make_data_set(tmp_path / "shards", corrupt=range(8))
    for batch in run(make_stream(tmp_path / "shards", manifest), 0, 2).values():
        assert min(batch["sample_ids"][2]) >= 8


def test_a_data_set_without_one_good_image_is_an_error_that_names_a_shard(make_data_set, make_stream, tmp_path):
    manifest = make_data_set(tmp_path / "shards", corrupt=range(32))
    with pytest.raises(DataError, match=r"shard file://.*\.tar: an image and every one that could replace it"):
        run(make_stream(tmp_path / "shards", manifest), 0, 1)


def test_no_key_of_a_sample_is_in_the_sample_log_or_in_a_batch(data_set, make_stream):
    stream = make_stream(*data_set)
    step = next(iter(stream.batches(0, [1, 2])))
    lines = stream.sample_log_lines(step)
    assert [(line["step"], line["vrank"]) for line in lines] == [(0, 1), (0, 2)]
    assert all(re.fullmatch("[0-9a-f]{12}", name) for line in lines for name in line["samples"])
    assert len({name for line in lines for name in line["samples"]}) == 6
    assert "MRN" not in json.dumps(lines)
    assert "MRN" not in repr(step)


def test_the_same_sample_has_the_same_name_in_every_run(data_set, make_stream):
    first, second = (next(iter(make_stream(*data_set).batches(0, [1]))) for _ in range(2))
    stream = make_stream(*data_set)
    assert stream.sample_log_lines(first) == stream.sample_log_lines(second)


def train_until_killed(pipe, folder, manifest, training, cache):
    """Take a step with two workers, tell their process ids, and wait."""
    execution = ExecutionConfig(device="cpu", loader_workers=2, cache_dir=cache)
    hasher = KeyHasher(b"0123456789abcdef")
    with Stream(manifest, folder.as_uri(), training, execution, Storage(), hasher) as stream:
        next(stream.batches(0, [0, 1]))
        pipe.send([process.pid for process in multiprocessing.active_children()])
        pipe.recv()


def test_workers_end_with_a_killed_training_process(data_set, make_training, tmp_path):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, *data_set, make_training(), str(tmp_path / "cache"))
    process = context.Process(target=train_until_killed, args=arguments)
    process.start()
    there.close()
    workers = [os.pidfd_open(pid) for pid in here.recv()]
    process.kill()
    process.join()
    assert len(workers) == 2
    for worker in workers:
        assert select.select([worker], [], [], 20)[0], "it ended"
        os.close(worker)


# What does not fit.


def test_another_data_set_than_the_one_asked_for_is_refused(data_set, make_stream, make_training):
    document = make_training().document()
    document["data"]["datasetDigest"] = f"sha256:{'0' * 64}"
    with pytest.raises(ValueError, match=r"data.datasetDigest asks for sha256:0+, but file://.* holds sha256:"):
        make_stream(*data_set, training=TrainConfig.parse(document))


def test_a_cache_smaller_than_a_shard_is_refused(data_set, make_stream):
    with pytest.raises(ValueError, match=r"execution.cacheBytes is 1000, but the largest shard has"):
        make_stream(*data_set, cache_bytes=1000)


def test_a_cache_smaller_than_the_shards_in_use_works_and_says_so(constant, data_set, make_stream):
    largest = max(shard.bytes for shard in data_set[1].shards)
    with structlog.testing.capture_logs() as logs:
        few = run(make_stream(*data_set, cache_bytes=largest), 0, 2)
    assert all(few[place] == constant[place] for place in few)
    assert [entry["in_use_bytes"] for entry in logs if entry["event"] == "stream.cache_is_small"] == [
        sum(shard.bytes for shard in data_set[1].shards)
    ]


def test_closing_ends_the_workers_and_removes_a_private_cache(data_set, make_stream):
    stream = make_stream(*data_set, cache_dir=None)
    next(iter(stream.batches(0, [0])))
    folder = stream._cache._folder
    assert list(folder.glob("*.tar"))
    stream.close()
    assert not folder.exists()


def test_moving_a_micro_batch_keeps_everything(data_set, make_stream):
    batch = next(iter(make_stream(*data_set).batches(0, [0])))[0]
    moved = batch.to("cpu")
    assert isinstance(moved, MicroBatch)
    assert tensors(moved) == tensors(batch)
