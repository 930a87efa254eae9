"""Deleting checkpoints, and the command line."""

import json
import subprocess
import sys
from datetime import datetime

import pytest
from click.testing import CliRunner

from sonoforge_trainer.checkpoint import CheckpointStore, DamagedCheckpointError, UnknownCheckpointError, prune
from sonoforge_trainer.checkpoint_cli import command
from sonoforge_trainer.contract import ENV_TERMINATION_LOG, CheckpointRef, Termination
from sonoforge_trainer.storage import Storage

STATE = "state-00000-of-00001.safetensors"
NOW = 2_000_000_000.0
DAY = 24 * 3600.0


def _names_of(place, ref):
    return place.names(ref.uri.removeprefix(place.uri + "/") + "/")


def _flip(place, uri):
    data = bytearray(place.storage.read(uri))
    data[-1] ^= 1
    place.overwrite(uri, bytes(data))


def test_the_state_goes_and_scores_and_model_card_stay(place):
    first, second = place.save(1, 2)
    place.storage.write(f"{first.uri}/eval/planes-0011.json", b"{}")
    done = prune(place.store(), now=NOW, delete=[first.id])
    assert (done.verified, done.deleted) == (second.id, (first.id,))
    assert _names_of(place, first) == ["PRUNED", "eval/planes-0011.json", "model-card.json"]
    assert CheckpointRef.from_json(place.storage.read(f"{first.uri}/PRUNED")) == first
    assert place.store().committed() == [second]


def test_kept_features_go_with_the_state_and_those_of_a_kept_checkpoint_stay(place):
    """Also those that an evaluation keeps after the prune go with the next one."""
    first, second = place.save(1, 2)
    kept = ["features-0011.json", "features-0011-2233.safetensors"]
    for ref in (first, second):
        for name in (*kept, "eval/planes-0011.json"):
            place.storage.write(f"{ref.uri}/{name}", b"{}")
    prune(place.store(), now=NOW, delete=[first.id])
    assert _names_of(place, first) == ["PRUNED", "eval/planes-0011.json", "model-card.json"]
    assert {*kept, "eval/planes-0011.json"} < set(_names_of(place, second))
    place.storage.write(f"{first.uri}/{kept[0]}", b"{}")
    assert prune(place.store(), now=NOW).deleted == (first.id,)
    assert _names_of(place, first) == ["PRUNED", "eval/planes-0011.json", "model-card.json"]


def test_keeping_deletes_what_is_older_than_the_newest_kept_one_and_nothing_newer(folder):
    """A checkpoint committed after the plan was made is not in the plan, and must survive it."""
    refs = folder.save(1, 2, 3, 4, 5)
    done = prune(folder.store(), now=NOW, keep=[refs[1].id, refs[3].id])
    assert done.deleted == (refs[0].id, refs[2].id)
    assert folder.store().committed() == [refs[1], refs[3], refs[4]]


def test_pruning_twice_changes_nothing_more(folder):
    first, _ = folder.save(1, 2)
    prune(folder.store(), now=NOW, delete=[first.id])
    before = folder.names()
    again = prune(folder.store(), now=NOW, delete=[first.id])
    assert (again.verified, again.deleted, folder.names()) == (None, (), before)


def test_the_newest_is_never_deleted(folder):
    refs = folder.save(1, 2)
    with pytest.raises(ValueError, match="is the newest checkpoint"):
        prune(folder.store(), now=NOW, delete=[refs[0].id, refs[1].id])
    assert folder.store().committed() == refs


def test_an_id_that_never_existed_is_an_error_and_nothing_is_deleted(folder):
    first, second = folder.save(1, 2)
    for plan in ({"delete": [first.id, "step-7"]}, {"keep": [second.id, "step-7"]}):
        with pytest.raises(UnknownCheckpointError, match="no checkpoint step-7; committed: step-0000000001-"):
            prune(folder.store(), now=NOW, **plan)
    assert folder.store().committed() == [first, second]


def test_a_damaged_newer_one_is_quarantined_and_another_newer_one_is_read(folder):
    first, second, third = folder.save(1, 2, 3)
    _flip(folder, f"{third.uri}/{STATE}")
    done = prune(folder.store(), now=NOW, delete=[first.id])
    assert (done.verified, done.deleted) == (second.id, (first.id,))
    assert folder.store().quarantined() == [third.uri]


def test_without_a_sound_newer_one_nothing_is_deleted(folder):
    first, second = folder.save(1, 2)
    _flip(folder, f"{second.uri}/{STATE}")
    with pytest.raises(DamagedCheckpointError, match="all were kept"):
        prune(folder.store(), now=NOW, delete=[first.id])
    assert folder.store().load_latest().ref == first


class FailingStorage(Storage):
    """Storage that fails at its n-th change."""

    def __init__(self, changes):
        super().__init__()
        self.changes = changes

    def _count(self):
        self.changes -= 1
        if self.changes < 0:
            raise ConnectionError("killed")

    def write(self, uri, data, *, if_absent=False):
        self._count()
        return super().write(uri, data, if_absent=if_absent)

    def delete(self, uri):
        self._count()
        super().delete(uri)


@pytest.mark.parametrize("changes", range(6))
def test_a_prune_that_ends_anywhere_is_finished_by_the_next(folder, changes):
    """Changes: PRUNED, then COMMIT, manifest, state and teacher go."""
    first, second = folder.save(1, 2)
    killed = CheckpointStore(FailingStorage(changes), folder.uri)
    if changes < 5:
        with pytest.raises(ConnectionError):
            prune(killed, now=NOW, delete=[first.id])
        expected = [first, second] if changes == 0 else [second]
        assert folder.store().committed() == expected, "half-deleted is deleted"
        assert folder.store().load_latest().ref == second
    else:
        prune(killed, now=NOW, delete=[first.id])
    prune(folder.store(), now=NOW, delete=[first.id])
    assert _names_of(folder, first) == ["PRUNED", "model-card.json"]


def _created(ref) -> float:
    return datetime.fromisoformat(ref.created).timestamp()


def test_a_prefix_without_commit_is_swept_a_day_after_its_group_committed_a_later_step(place):
    first, second, third = place.save(1, 2, 3)
    place.storage.delete(f"{second.uri}/COMMIT")
    young = prune(place.store(), now=_created(third) + DAY - 1)
    assert (young.swept, len(_names_of(place, second))) == ((), 4)
    old = prune(place.store(), now=_created(third) + DAY + 1)
    assert (old.swept, _names_of(place, second)) == ((second.uri,), [])
    assert place.store().committed() == [first, third]


def test_what_may_still_be_uploading_is_never_swept(folder):
    (_, second) = folder.save(1, 2, attempt="B1")
    folder.storage.delete(f"{second.uri}/COMMIT")
    folder.save(9, attempt="A1")
    assert prune(folder.store(), now=NOW + 1000 * DAY).swept == (), "neither a later step of B1, nor a later group"
    (later,) = folder.save(1, attempt="C1")
    assert prune(folder.store(), now=_created(later) + DAY - 1).swept == ()
    assert prune(folder.store(), now=_created(later) + DAY + 1).swept == (second.uri,)


def test_quarantined_checkpoints_are_neither_swept_nor_pruned(folder):
    first, second, third = folder.save(1, 2, 3)
    folder.store().quarantine(first.uri, "test")
    folder.storage.delete(f"{first.uri}/COMMIT")
    prune(folder.store(), now=NOW + 1e9, keep=[third.id])
    assert len(_names_of(folder, first)) == 5
    assert folder.store().committed() == [third]
    assert second.uri not in folder.store().quarantined()


def test_delete_and_keep_together_are_refused(folder):
    with pytest.raises(ValueError, match="not both"):
        prune(folder.store(), now=NOW, delete=["a"], keep=["b"])


def test_a_checkpoint_pruned_while_it_is_read_is_not_called_damaged(folder):
    first, second = folder.save(1, 2)
    store = folder.store()
    assert store.committed() == [first, second]
    folder.storage.write(f"{second.uri}/PRUNED", second.to_json().encode())
    folder.storage.delete(f"{second.uri}/COMMIT")
    assert store.load_latest().ref == first
    assert store.quarantined() == []


def _invoke(*arguments):
    return CliRunner().invoke(command, arguments)


def test_the_list_shows_every_state(folder):
    refs = folder.save(1, 2, 3, 4, 5)
    prune(folder.store(), now=NOW, delete=[refs[0].id])
    folder.store().quarantine(refs[1].uri, "test")
    folder.storage.delete(f"{refs[2].uri}/COMMIT")
    folder.overwrite(f"{refs[3].uri}/COMMIT", b"no")
    done = _invoke("list", folder.uri, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["step"], row["state"]) for row in rows] == [
        (1, "pruned"),
        (2, "quarantined"),
        (3, "uncommitted"),
        (4, "damaged"),
        (5, "committed"),
    ]
    assert (rows[4]["id"], rows[4]["manifestDigest"]) == (refs[4].id, refs[4].manifest_digest)
    text = _invoke("list", folder.uri).stdout
    assert refs[4].id in text
    assert "320 images" in text


def _answer(path, place, known, monkeypatch):
    """What a listing says at its end, to somebody who knows these."""
    for name, value in {**place.environment, ENV_TERMINATION_LOG: str(path)}.items():
        monkeypatch.setenv(name, value)
    done = _invoke("list", place.uri, *(f"--known={ref.id}" for ref in known))
    assert done.exit_code == 0, done.stderr
    said = Termination.from_json(path.read_text())
    assert said.result is not None
    shown = [line.split()[0] for line in done.stdout.splitlines() if "committed" in line]
    return [CheckpointRef.parse(entry) for entry in said.result["checkpoints"]], shown


def test_a_listing_answers_the_oldest_that_are_not_known_wherever_they_lie(place, tmp_path, monkeypatch):
    refs = place.save(1, 2, 3)
    found, shown = _answer(tmp_path / "said", place, [refs[0], refs[2]], monkeypatch)
    assert (found, shown) == ([refs[1]], [refs[1].id])
    assert _answer(tmp_path / "said", place, refs, monkeypatch) == ([], [])


def test_one_listing_after_the_other_finds_every_checkpoint_of_a_long_run(folder, tmp_path, monkeypatch):
    """A message holds few: each listing knows what the ones before it found."""
    refs = folder.save(*range(1, 41))
    known, listings = refs[::7], 0
    while True:
        found, _ = _answer(tmp_path / "said", folder, known, monkeypatch)
        assert (tmp_path / "said").stat().st_size <= 4096
        if not found:
            break
        listings += 1
        known = [*known, *found]
    assert sorted(ref.step for ref in known) == list(range(1, 41))
    assert 2 <= listings <= 8


def test_verify_ends_with_the_code_for_damaged_data_and_quarantines_on_request(folder):
    first, second = folder.save(1, 2)
    assert _invoke("verify", folder.uri).exit_code == 0
    _flip(folder, f"{second.uri}/teacher.safetensors")
    only_first = _invoke("verify", folder.uri, "--id", first.id)
    assert (only_first.exit_code, only_first.stdout) == (0, f"{first.id}  sound\n")
    done = _invoke("verify", folder.uri)
    assert (done.exit_code, folder.store().quarantined()) == (65, [])
    assert "damaged: teacher.safetensors" in done.stdout
    assert _invoke("verify", folder.uri, "--quarantine").exit_code == 65
    assert folder.store().quarantined() == [second.uri]


def test_prune_on_the_command_line(folder):
    refs = folder.save(1, 2, 3)
    done = _invoke("prune", folder.uri, "--keep", refs[2].id, "--keep", refs[0].id)
    assert (done.exit_code, done.stdout) == (0, f"{refs[2].id}  verified\n{refs[1].id}  deleted\n")
    refused = _invoke("prune", folder.uri, "--delete", refs[2].id)
    assert (refused.exit_code, folder.store().committed()) == (64, [refs[0], refs[2]])
    assert "is the newest checkpoint" in refused.stderr


def test_listing_and_pruning_do_not_load_torch():
    code = "import sys, sonoforge_trainer.checkpoint_cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
