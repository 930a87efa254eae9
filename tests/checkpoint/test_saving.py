"""One process saves, and what it saved is loaded."""

import dataclasses
import hashlib
import json
import threading
import time
from datetime import UTC, datetime

import pytest
import safetensors.torch
import torch

from sonoforge_trainer.checkpoint import (
    CheckpointFailedError,
    CheckpointTimeoutError,
    CheckpointWriter,
    ForeignCheckpointError,
    RunIdentity,
    SupersededError,
    fresh_attempt,
)
from sonoforge_trainer.contract import CheckpointManifest, ModelCard, RunConfig, TrainConfig
from sonoforge_trainer.storage import ObjectNotFoundError, Storage, StorageError


class GatedStorage(Storage):
    """Storage whose writes wait at a gate, and can be made to fail there."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.arrived = threading.Event()
        self.fault: Exception | None = None

    def write(self, uri, data, *, if_absent=False):
        if "/step-" not in uri:
            return super().write(uri, data, if_absent=if_absent)
        self.arrived.set()
        assert self.gate.wait(60)
        if self.fault is not None:
            raise self.fault
        return super().write(uri, data, if_absent=if_absent)


@pytest.fixture
def gated(folder):
    """A place whose writes wait until `storage.gate` is set."""
    place = dataclasses.replace(folder, storage=GatedStorage())
    yield place
    place.storage.gate.set()


def _same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


def test_a_saved_state_is_loaded_bit_for_bit(place, snapshot):
    (ref,) = place.save(12)
    loaded = place.store().load_latest()
    assert (loaded.ref, loaded.manifest.samples, ref.samples) == (ref, 768, 768)
    _same(loaded.tensors, snapshot(12).tensors)


def test_the_prefix_holds_exactly_the_objects_of_the_contract(place):
    place.save(12)
    assert [name for name in place.names() if name.startswith("step-")] == [
        "step-0000000012/attempt-A1/COMMIT",
        "step-0000000012/attempt-A1/manifest.json",
        "step-0000000012/attempt-A1/model-card.json",
        "step-0000000012/attempt-A1/state-00000-of-00001.safetensors",
        "step-0000000012/attempt-A1/teacher.safetensors",
    ]


def test_the_manifest_says_what_the_objects_are_and_commit_names_the_manifest(folder):
    (ref,) = folder.save(12)
    body = folder.storage.read(f"{ref.uri}/manifest.json")
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    assert folder.storage.read(f"{ref.uri}/COMMIT").decode() == digest == ref.manifest_digest
    manifest = CheckpointManifest.from_json(body)
    for stored in manifest.objects:
        data = folder.storage.read(f"{ref.uri}/{stored.name}")
        assert (stored.bytes, stored.sha256) == (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
    assert (manifest.job, manifest.uid, manifest.seed, manifest.virtual_ranks) == ("fetal", "0b5c", 7, 4)
    assert (manifest.world_size, manifest.torch_version) == (1, torch.__version__)


def test_the_teacher_is_a_plain_safetensors_file_with_its_model_card(folder, snapshot):
    (ref,) = folder.save(12)
    teacher = folder.store(None).load_teacher(ref.uri, ref.manifest_digest)
    _same(teacher.tensors, snapshot(12).teacher)
    _same(safetensors.torch.load(folder.storage.read(f"{ref.uri}/teacher.safetensors")), snapshot(12).teacher)
    assert teacher.card == ModelCard.from_json(folder.storage.read(f"{ref.uri}/model-card.json"))
    assert (teacher.card.samples, teacher.manifest.step) == (768, 12)


def test_the_random_initialisation_can_be_saved(folder):
    (ref,) = folder.save(0)
    assert (ref.step, ref.samples, ref.id[:16]) == (0, 0, "step-0000000000-")
    assert folder.store().load_latest().ref == ref


def test_committed_lists_oldest_first_and_latest_is_by_step(folder):
    refs = folder.save(3, 7, attempt="B2") + folder.save(5, attempt="A1")
    store = folder.store()
    assert [ref.step for ref in store.committed()] == [3, 5, 7]
    assert store.load_latest().ref == refs[1]


def test_of_two_checkpoints_of_a_step_the_one_written_later_is_used(folder, snapshot):
    for attempt, minute in (("B", 1), ("A", 2), ("C", 0)):
        there = folder.store().load_latest()  # one that restored the other's, and writes the same step all the same
        writer = folder.writer(
            attempt,
            restored=there and there.ref,
            clock=lambda minute=minute: datetime(2030, 1, 1, 0, minute, tzinfo=UTC),
        )
        writer.save(snapshot(4))
        assert writer.wait(60).ref
    assert folder.store().load_latest().ref.uri.endswith("/attempt-A")


def test_nothing_is_found_where_nothing_was_saved(place):
    store = place.store()
    assert (store.committed(), store.load_latest()) == ([], None)


def test_manifests_form_a_chain(folder, snapshot):
    first, second = folder.save(1, 2)
    resumed = folder.writer("B", restored=second)
    resumed.save(snapshot(3))
    third = resumed.wait(60).ref
    previous = [
        json.loads(folder.storage.read(f"{ref.uri}/manifest.json"))["previous"] for ref in (first, second, third)
    ]
    assert previous == [None, first.manifest_digest, second.manifest_digest]


def test_changes_after_save_do_not_reach_the_checkpoint(gated, snapshot):
    state = snapshot(5)
    writer = gated.writer()
    assert writer.save(state)
    for tensor in [*state.tensors.values(), *state.teacher.values()]:
        tensor.zero_()
    gated.storage.gate.set()
    writer.wait(60)
    loaded = gated.store().load_latest()
    _same(loaded.tensors, snapshot(5).tensors)


def test_a_save_while_one_is_in_flight_is_skipped_and_counted(gated, snapshot):
    writer = gated.writer()
    assert not writer.busy()
    assert writer.save(snapshot(1))
    assert writer.busy()
    assert not writer.save(snapshot(2))
    writer.skip(3)
    assert writer.save(snapshot(1)), "the step in flight needs no second save"
    assert (writer.skipped, writer.poll()) == (2, None)
    gated.storage.gate.set()
    assert writer.wait(60).step == 1
    assert not writer.busy()
    assert writer.save(snapshot(2))
    assert writer.wait(60).step == 2
    assert [ref.step for ref in gated.store().committed()] == [1, 2]


def test_a_step_that_is_saved_is_not_saved_again(folder, snapshot):
    writer = folder.writer()
    writer.save(snapshot(1))
    writer.wait(60)
    assert writer.save(snapshot(1))
    assert (writer.busy(), writer.wait(60), len(folder.store().committed())) == (False, None, 1)


def test_waiting_for_an_upload_is_bounded(gated, snapshot):
    writer = gated.writer()
    writer.save(snapshot(1))
    started = time.monotonic()
    with pytest.raises(CheckpointTimeoutError, match=r"step 1 was not committed within 0 s"):
        writer.wait(0.2)
    assert time.monotonic() - started < 5
    assert gated.store().load_latest() is None


def test_a_failed_upload_is_reported_and_leaves_the_one_before(gated, snapshot):
    gated.storage.gate.set()
    writer = gated.writer()
    writer.save(snapshot(1))
    first = writer.wait(60).ref
    gated.storage.fault = StorageError("the bucket is gone")
    assert writer.save(snapshot(2))
    failed = writer.wait(60)
    assert (failed.ref, str(failed.error)) == (
        None,
        "the checkpoint of step 2 was not written: the bucket is gone",
    )
    gated.storage.fault = None
    assert writer.save(snapshot(3))
    third = writer.wait(60).ref
    assert gated.store().committed() == [first, third]
    previous = gated.store().manifest(third.uri, third.manifest_digest).previous
    assert previous == first.manifest_digest


def test_a_step_that_failed_can_be_tried_again_and_finishes_what_it_began(folder, snapshot):
    """The request for COMMIT fails, so that the second try finds all objects there but this one."""

    class LosesCommit(Storage):
        fail = True

        def write(self, uri, data, *, if_absent=False):
            if uri.endswith("/COMMIT") and self.fail:
                raise StorageError("no route")
            return super().write(uri, data, if_absent=if_absent)

    storage = LosesCommit()
    writer = dataclasses.replace(folder, storage=storage).writer()
    writer.save(snapshot(2))
    assert writer.wait(60).ref is None
    storage.fail = False
    assert writer.save(snapshot(2))
    ref = writer.wait(60).ref
    assert folder.store().load_latest().ref == ref


def test_further_files_are_part_of_the_checkpoint(folder, snapshot):
    writer = folder.writer()
    writer.save(dataclasses.replace(snapshot(2), files={"metrics.jsonl": b"{}\n", "samples.jsonl": b""}))
    ref = writer.wait(60).ref
    manifest = folder.store().verify(ref)
    assert [stored.name for stored in manifest.objects] == [
        "metrics.jsonl",
        "model-card.json",
        "samples.jsonl",
        "state-00000-of-00001.safetensors",
        "teacher.safetensors",
    ]
    assert folder.storage.read(f"{ref.uri}/metrics.jsonl") == b"{}\n"


@pytest.mark.parametrize("name", ["eval/planes.json", "COMMIT", "..", "", "state-00000-of-00001.safetensors"])
def test_a_file_with_a_name_that_means_something_else_is_refused_at_once(folder, snapshot, name):
    writer = folder.writer()
    with pytest.raises(ValueError, match="cannot be a part of a checkpoint"):
        writer.save(dataclasses.replace(snapshot(2), files={name: b"x"}))
    assert (writer.busy(), folder.names()) == (False, [])


def test_an_attempt_that_would_make_checkpoints_invisible_is_refused(folder):
    with pytest.raises(ValueError, match="letters and digits only"):
        folder.writer("attempt-1")


def test_results_wait_until_they_are_collected(folder, snapshot):
    writer = folder.writer()
    for step in (1, 2):
        writer.save(snapshot(step))
        while writer.busy():
            time.sleep(0.01)
    assert [writer.poll().step, writer.poll().step, writer.poll()] == [1, 2, None]


def test_a_failure_that_nobody_collected_is_raised_by_the_next_save(gated, snapshot):
    gated.storage.gate.set()
    gated.storage.fault = OSError("disk full")
    writer = gated.writer()
    writer.save(snapshot(1))
    while writer.busy():
        time.sleep(0.01)
    with pytest.raises(CheckpointFailedError, match="step 1 was not written: disk full"):
        writer.save(snapshot(2))
    gated.storage.fault = None
    assert writer.save(snapshot(2)), "the failure was reported once"
    assert writer.wait(60).ref.step == 2


def test_one_of_two_writers_with_the_same_identity_wins(place, snapshot):
    """A process group that was given up for dead, and the one that replaced it with a stale identity."""
    writers = [
        CheckpointWriter(
            place.storage,
            place.uri,
            dataclasses.replace(place.store().identity, image_digest=image),
            "A1",
        )
        for image in ("sha256:1", "sha256:2")
    ]
    for writer in writers:
        writer.save(snapshot(6))
    results = [writer.wait(60) for writer in writers]
    won = [result.ref for result in results if result.ref]
    assert len(won) == 1
    assert place.store().load_latest().ref == won[0]
    lost = next(result.error for result in results if result.error)
    assert "exists with other content: another process group" in str(lost)


@pytest.mark.parametrize("theirs", [3, 4, 9])
def test_a_group_does_not_commit_beside_one_that_went_on_from_the_same_checkpoint(place, snapshot, theirs):
    """Both were parted by the network: whichever steps the other committed, these would be in the logs twice."""
    (began_with,) = place.save(2)
    parted = place.writer("B", restored=began_with)
    (newest,) = place.save(theirs, attempt="C")
    parted.save(snapshot(4))
    result = parted.wait(60)
    assert (result.ref, type(result.error)) == (None, SupersededError)
    assert f"committed step {theirs}, and this one goes on from step 2" in str(result.error)
    assert place.store().committed() == [began_with, newest]


def test_of_two_groups_that_begin_with_nothing_one_commits(folder, snapshot):
    parted = folder.writer("B")
    (first,) = folder.save(0)
    parted.save(snapshot(0))
    assert "this one goes on from no checkpoint" in str(parted.wait(60).error)
    assert folder.store().committed() == [first]


def test_a_group_that_is_ahead_goes_on_whatever_comes_late(folder, snapshot):
    """An upload of a group that is gone may end after its successor's."""
    (began_with,) = folder.save(2)
    ahead = folder.writer("B", restored=began_with)
    ahead.save(snapshot(6))
    assert ahead.wait(60).ref
    late = folder.writer("A", restored=folder.store().committed()[-1])
    late.save(snapshot(4))
    assert late.wait(60).ref
    ahead.save(snapshot(8))
    assert ahead.wait(60).ref.step == 8


def test_a_checkpoint_that_was_found_damaged_keeps_nobody_from_going_on(folder, snapshot):
    first, second = folder.save(1, 2)
    folder.overwrite(f"{second.uri}/teacher.safetensors", b"")
    assert folder.store().load_latest().ref == first
    writer = folder.writer("B", restored=first)
    writer.save(snapshot(2))
    assert writer.wait(60).ref.step == 2


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"uid": "ffff"}, r"job uid 0b5c \(this run: ffff\)"),
        ({"config_digest": "sha256:" + "e" * 64}, r"config digest sha256:c+ \(this run: sha256:e+\)"),
        ({"data_digest": "sha256:" + "e" * 64}, r"data digest sha256:d+ \(this run: sha256:e+\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(folder, identity, changes, difference):
    (ref,) = folder.save(1)
    other = folder.store(dataclasses.replace(identity, **changes))
    for load in (other.load_latest, lambda: other.load(ref)):
        with pytest.raises(ValueError, match=difference) as caught:
            load()
        assert isinstance(caught.value, ForeignCheckpointError)
    assert folder.store().quarantined() == []


def test_how_a_run_is_executed_and_retained_is_not_part_of_its_identity():
    def identity(**changes: object) -> RunIdentity:
        training = {"data": {"shards": "file:///data/shards.json"}, "recipe": {"preset": "tiny"}}
        document = {
            "job": "fetal",
            "uid": "0b5c",
            "training": TrainConfig.resolve(training).document(),
            "checkpoints": {"uri": "file:///runs", "keepLast": 3},
            "execution": {"prefetchBatches": 4},
        }
        return RunIdentity.of(RunConfig.parse({**document, **changes}), "sha256:" + "d" * 64)

    same = identity(checkpoints={"uri": "file:///runs", "keepLast": 9}, execution={"prefetchBatches": 8})
    assert same == identity()
    assert identity(uid="ffff") != identity()


def test_attempt_identities_are_ulids_that_sort_by_time():
    early = fresh_attempt(datetime(2030, 1, 1, tzinfo=UTC))
    late = fresh_attempt(datetime(2030, 1, 2, tzinfo=UTC))
    assert early < late
    assert (len(early), early[:10]) == (26, "01Q3DCBD00")
    assert fresh_attempt() != fresh_attempt()


def test_objects_that_are_not_checkpoints_are_left_alone(folder):
    (ref,) = folder.save(1)
    folder.storage.write(f"{folder.uri}/notes.txt", b"hello")
    folder.storage.write(f"{folder.uri}/step-12/attempt-x/COMMIT", b"hello")
    folder.storage.write(f"{ref.uri}/eval/planes-0011.json", b"{}")
    assert folder.store().committed() == [ref]
    with pytest.raises(ObjectNotFoundError):
        folder.storage.stat(f"{ref.uri}/QUARANTINE")
