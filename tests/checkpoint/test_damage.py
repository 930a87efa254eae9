"""Damaged checkpoints are set aside, and the newest sound one is used."""

import hashlib
import itertools
import json
from types import SimpleNamespace

import pytest

from sonoforge_trainer.checkpoint import AllCheckpointsDamagedError, CheckpointStore, DamagedCheckpointError
from sonoforge_trainer.storage import Storage, StorageError

STATE = "state-00000-of-00001.safetensors"
OBJECTS = [STATE, "teacher.safetensors", "model-card.json", "manifest.json", "COMMIT"]
NEEDED_TO_RESUME = [STATE, "manifest.json", "COMMIT"]


def _flip(place, uri: str, position: int = -2) -> None:
    data = bytearray(place.storage.read(uri))
    data[position] ^= 0x10
    place.overwrite(uri, bytes(data))


@pytest.mark.parametrize("name", OBJECTS)
def test_a_flipped_byte_in_any_object_is_found_by_verifying(place, name):
    first, second = place.save(1, 2)
    _flip(place, f"{second.uri}/{name}")
    store = place.store()
    with pytest.raises(DamagedCheckpointError):
        store.verify(second)
    assert store.verify(first).step == 1


@pytest.mark.parametrize("name", NEEDED_TO_RESUME)
def test_a_flipped_byte_is_found_while_loading(folder, name):
    first, second = folder.save(1, 2)
    _flip(folder, f"{second.uri}/{name}")
    assert folder.store().load_latest().ref == first
    reason = json.loads(folder.storage.read(f"{second.uri}/QUARANTINE"))["reason"]
    assert ("COMMIT" if name == "COMMIT" else name) in reason


@pytest.mark.parametrize("position", [0, 8, 100, -1])
def test_a_flipped_byte_anywhere_in_a_part_is_found(folder, position):
    first, second = folder.save(1, 2)
    _flip(folder, f"{second.uri}/{STATE}", position)
    assert folder.store().load_latest().ref == first


@pytest.mark.parametrize("name", OBJECTS[:3])
def test_a_shortened_object_is_found_by_the_listing_alone(folder, name):
    first, second = folder.save(1, 2)
    folder.overwrite(f"{second.uri}/{name}", folder.storage.read(f"{second.uri}/{name}")[:-1])
    assert folder.store().committed() == [first]
    assert folder.store().load_latest().ref == first


@pytest.mark.parametrize("name", OBJECTS[:4])
def test_a_missing_object_makes_a_checkpoint_damaged(folder, name):
    first, second = folder.save(1, 2)
    folder.storage.delete(f"{second.uri}/{name}")
    assert folder.store().committed() == [first]
    assert folder.store().load_latest().ref == first
    assert folder.store().quarantined() == [second.uri]


def test_without_commit_a_checkpoint_does_not_exist_and_is_no_damage(folder):
    first, second = folder.save(1, 2)
    folder.storage.delete(f"{second.uri}/COMMIT")
    assert folder.store().load_latest().ref == first
    assert folder.store().quarantined() == []


@pytest.mark.parametrize("body", [b"", b"sha256:" + b"0" * 64, b"\xff\xfe", b"yes"])
def test_a_wrong_commit_commits_nothing(folder, body):
    first, second = folder.save(1, 2)
    folder.overwrite(f"{second.uri}/COMMIT", body)
    assert folder.store().committed() == [first]
    assert folder.store().load_latest().ref == first
    assert folder.store().quarantined() == [second.uri]


def test_a_manifest_copied_from_another_step_is_not_believed(folder):
    first, second = folder.save(1, 2)
    for name in ("manifest.json", "COMMIT"):
        folder.overwrite(f"{second.uri}/{name}", folder.storage.read(f"{first.uri}/{name}"))
    assert folder.store().load_latest().ref == first


def test_a_manifest_cannot_name_objects_outside_its_prefix(folder):
    (ref,) = folder.save(1)
    document = json.loads(folder.storage.read(f"{ref.uri}/manifest.json"))
    document["objects"].append({**document["objects"][0], "name": "../../../secret"})
    body = json.dumps(document).encode()
    folder.overwrite(f"{ref.uri}/manifest.json", body)
    folder.overwrite(f"{ref.uri}/COMMIT", f"sha256:{hashlib.sha256(body).hexdigest()}".encode())
    with pytest.raises(AllCheckpointsDamagedError):
        folder.store().load_latest()


def test_two_damaged_ones_in_a_row_still_fall_back_to_the_third(place):
    first, second, third = place.save(1, 2, 3)
    for ref in (second, third):
        _flip(place, f"{ref.uri}/{STATE}")
    store = place.store()
    assert store.load_latest().ref == first
    assert store.quarantined() == [second.uri, third.uri]
    assert store.load_latest().ref == first, "and again, from the quarantine alone"


def test_when_every_checkpoint_is_damaged_nobody_starts_again_in_silence(folder):
    first, second = folder.save(1, 2)
    for ref in (first, second):
        _flip(folder, f"{ref.uri}/{STATE}")
    for _ in range(2):  # found damaged, then found quarantined
        with pytest.raises(AllCheckpointsDamagedError, match="start a new job") as caught:
            folder.store().load_latest()
        assert set(caught.value.damaged) == {first.uri, second.uri}


def test_nothing_of_a_quarantined_checkpoint_is_deleted(folder):
    _, second = folder.save(1, 2)
    before = folder.names()
    _flip(folder, f"{second.uri}/{STATE}")
    folder.store().load_latest()
    assert sorted(folder.names()) == sorted([*before, f"{second.uri.removeprefix(folder.uri + '/')}/QUARANTINE"])


def test_a_teacher_that_does_not_match_is_refused(folder):
    (ref,) = folder.save(1)
    _flip(folder, f"{ref.uri}/teacher.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"teacher\.safetensors"):
        folder.store(None).load_teacher(ref.uri, ref.manifest_digest)
    with pytest.raises(DamagedCheckpointError, match="expected sha256:0000"):
        folder.store(None).load_teacher(ref.uri, "sha256:" + "0" * 64)


class UnreachableStorage(Storage):
    """Storage that lists, and then loses its server."""

    def read_into(self, uri, buffer, *, sha256=None):
        raise StorageError(f"{uri}: connection refused")


def test_a_server_that_does_not_answer_is_no_reason_to_quarantine(folder):
    folder.save(1, 2)
    with pytest.raises(StorageError, match="connection refused"):
        CheckpointStore(UnreachableStorage(), folder.uri).load_latest()
    assert folder.store().quarantined() == []


def fault(**kind):
    """A fault of the proxy's."""
    return SimpleNamespace(
        **{"status": None, "cut": None, "reset": False, "flip": None, "stall": None, "lose_answer": False, **kind}
    )


def test_a_byte_flipped_on_the_way_is_read_again_and_is_no_damage(faulty, proxy):
    behind, direct = faulty
    first, second = direct.save(1, 2)
    state = f"{second.uri.removeprefix('s3:/')}/{STATE}"
    left = [fault(flip=700)]
    proxy.rule = lambda request: left.pop() if left and request.target.startswith(state) else None
    assert behind.store().load_latest().ref == second
    assert proxy.faults == 1
    assert direct.store().committed() == [first, second]


def test_a_server_that_is_slow_down_and_cuts_answers_loses_no_checkpoint(faulty, proxy):
    behind, direct = faulty
    faults = itertools.cycle(
        [None, fault(status=(503, "SlowDown")), None, fault(lose_answer=True), None, fault(cut=1), None]
    )
    proxy.rule = lambda request: next(faults)
    refs = behind.save(1, 2, 3)
    loaded = behind.store().load_latest()
    assert proxy.faults > 10
    assert (loaded.ref, direct.store().committed()) == (refs[2], refs)
    assert [direct.store().verify(ref).step for ref in refs] == [1, 2, 3]
