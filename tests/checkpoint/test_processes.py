"""Real processes: killed in the middle of saving, and several that save and load together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def processes():
    """`processes(place, kind=..., ...)`: what the processes of `processes.py` answer."""
    script = Path(__file__).with_name("processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], env=environment, stdin=pipe, stdout=pipe, text=True) as server:

        def ask(place, **request):
            print(json.dumps({"uri": place.uri, "environment": place.environment, **request}), file=server.stdin)
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield ask
        server.stdin.close()


def _sums(tensors):
    return {name: tensor.double().sum().item() for name, tensor in sorted(tensors.items())}


def test_a_writer_killed_at_any_object_leaves_the_checkpoint_before_it(processes, place):
    """State, teacher, model card, manifest, COMMIT: killed before each, and after each."""
    (first,) = place.save(1)
    deaths = [(2, f"D{at}{'after' if after else 'before'}", at, after) for at in range(1, 6) for after in (False, True)]
    assert processes(place, kind="crash", deaths=deaths) == [-9] * 10
    committed = place.store().committed()
    assert [ref.uri.rpartition("/")[2] for ref in committed] == ["attempt-A1", "attempt-D5after"]
    assert place.store().load_latest().ref == committed[1], "a COMMIT that is written counts, whatever happens then"
    place.storage.delete(f"{committed[1].uri}/COMMIT")
    assert place.store().load_latest().ref == first
    assert place.store().quarantined() == []


def test_three_processes_save_and_any_number_loads(processes, place, snapshot):
    saved = processes(place, kind="ranks", world_size=3, attempt="A1", saves=[1, 2])
    assert [report["restored"] for report in saved] == [None, None, None]
    first, second = ({report["results"][n]["id"] for report in saved} for n in (0, 1))
    assert (len(first), len(second)) == (1, 1), "every rank learns the same commit"
    assert [name for name in place.names("step-0000000002/attempt-A1/") if name.startswith("state-")] == [
        "state-00000-of-00003.safetensors",
        "state-00001-of-00003.safetensors",
        "state-00002-of-00003.safetensors",
    ]
    loaded = place.store().load_latest()
    assert (loaded.ref.id, loaded.manifest.world_size) == (second.pop(), 3)
    assert _sums(loaded.tensors) == _sums(snapshot(2).tensors)

    resumed = processes(place, kind="ranks", world_size=2, attempt="B2", saves=[3])
    assert [report["restored"] for report in resumed] == [loaded.ref.id] * 2
    assert [report["sums"] for report in resumed] == [_sums(snapshot(2).tensors)] * 2
    third = place.store().load_latest()
    assert (third.ref.step, third.manifest.world_size, third.manifest.previous) == (3, 2, loaded.ref.manifest_digest)


def test_a_process_killed_while_it_uploads_its_part_fails_the_checkpoint_for_the_others(processes, folder):
    (first,) = folder.save(1)
    damage = {"kind": "kill", "rank": 2, "write": 1, "after": True}
    reports = processes(
        folder, kind="ranks", world_size=3, attempt="B2", saves=[2], timeouts=[2, 30, 30], damage=damage
    )
    assert reports[2] is None
    for report in reports[:2]:
        assert report["results"][0]["id"] is None
        assert "heard nothing on checkpoint/B2/2/0/part-2 for 2 s; another process" in report["results"][0]["error"]
    assert folder.store().committed() == [first]


def test_ranks_that_disagree_whether_to_save_fail_at_once_and_agree_again(processes, folder):
    """Rank 1 is still waiting for the commit of a step that the others did not save."""
    damage = {"kind": "ahead", "rank": 1, "step": 5}
    reports = processes(folder, kind="ranks", world_size=2, attempt="A1", saves=[6, 6], timeouts=[60, 1], damage=damage)
    assert "rank 1 was still uploading the one before" in reports[0]["results"][0]["error"]
    assert "heard nothing on checkpoint/A1/5/0/outcome for 1 s" in reports[1]["results"][0]["error"]
    assert reports[0]["results"][1]["id"] == reports[1]["results"][1]["id"]
    assert [ref.step for ref in folder.store().committed()] == [6]


def test_every_rank_learns_that_another_group_committed(processes, place):
    (first,) = place.save(1)
    damage = {"kind": "superseded", "attempt": "C3", "step": 3}
    reports = processes(place, kind="ranks", world_size=2, attempt="B2", saves=[2], damage=damage)
    for report in reports:
        assert report["restored"] == first.id
        assert report["results"][0]["error"].startswith("SupersededError: another process group of this run committed")
    assert [ref.step for ref in place.store().committed()] == [1, 3]


def test_every_rank_ends_with_the_reason_when_the_first_cannot_restore(processes, folder):
    (ref,) = folder.save(1)
    folder.overwrite(f"{ref.uri}/COMMIT", b"no")
    reports = processes(folder, kind="ranks", world_size=2, attempt="B2", saves=[])
    assert reports[0]["raised"].startswith("AllCheckpointsDamagedError: every checkpoint below")
    assert reports[1]["raised"].startswith("RestoreError: rank 0 could not restore: AllCheckpointsDamagedError")
