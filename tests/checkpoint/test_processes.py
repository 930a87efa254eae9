"""Real processes: killed in the middle of saving, and several that save and load together."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("processes.py")


def _start(mode: str, place, **arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **place.environment}
    document = json.dumps({"uri": place.uri, **arguments})
    return subprocess.run(
        [sys.executable, SCRIPT, mode, document], env=environment, capture_output=True, text=True, timeout=240
    )


def _run(mode: str, place, **arguments):
    done = _start(mode, place, **arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _sums(snapshot):
    return {name: tensor.double().sum().item() for name, tensor in sorted(snapshot.tensors.items())}


def test_a_writer_killed_at_any_object_leaves_the_checkpoint_before_it(place):
    """State, teacher, model card, manifest, COMMIT: killed before each, and after each."""
    (first,) = place.save(1)
    deaths = [(2, f"D{at}{'after' if after else 'before'}", at, after) for at in range(1, 6) for after in (False, True)]
    assert _run("crash", place, deaths=deaths) == [-9] * 10
    committed = place.store().committed()
    assert [ref.uri.rpartition("/")[2] for ref in committed] == ["attempt-A1", "attempt-D5after"]
    assert place.store().load_latest().ref == committed[1], "a COMMIT that is written counts, whatever happens then"
    place.storage.delete(f"{committed[1].uri}/COMMIT")
    assert place.store().load_latest().ref == first
    assert place.store().quarantined() == []


def test_three_processes_save_and_any_number_loads(place, snapshot):
    saved = _run("ranks", place, world_size=3, attempt="A1", saves=[1, 2])
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
    assert {name: tensor.double().sum().item() for name, tensor in sorted(loaded.tensors.items())} == _sums(snapshot(2))

    resumed = _run("ranks", place, world_size=2, attempt="B2", saves=[3])
    assert [report["restored"] for report in resumed] == [loaded.ref.id] * 2
    assert [report["sums"] for report in resumed] == [_sums(snapshot(2))] * 2
    third = place.store().load_latest()
    assert (third.ref.step, third.manifest.world_size, third.manifest.previous) == (3, 2, loaded.ref.manifest_digest)


def test_a_process_killed_while_it_uploads_its_part_fails_the_checkpoint_for_the_others(folder):
    (first,) = folder.save(1)
    reports = _run(
        "ranks",
        folder,
        world_size=3,
        attempt="B2",
        saves=[2],
        timeouts=[2, 2, 2],
        damage={"kind": "kill", "rank": 2, "write": 1, "after": True},
    )
    assert reports[2] is None
    for report in reports[:2]:
        assert report["results"][0]["id"] is None
        assert "heard nothing on '2/part-2' for 2 s; another process is gone" in report["results"][0]["error"]
    assert folder.store().committed() == [first]


def test_ranks_that_disagree_whether_to_save_fail_at_once_and_agree_again(folder):
    """Rank 1 is still waiting for the commit of a step that the others did not save."""
    reports = _run(
        "ranks",
        folder,
        world_size=2,
        attempt="A1",
        saves=[6, 7],
        timeouts=[60, 1],
        damage={"kind": "ahead", "rank": 1, "step": 5},
    )
    assert "rank 1 was still uploading the one before" in reports[0]["results"][0]["error"]
    assert "heard nothing on '5/outcome'" in reports[1]["results"][0]["error"]
    assert reports[0]["results"][1]["id"] == reports[1]["results"][1]["id"]
    assert [ref.step for ref in folder.store().committed()] == [7]


def test_every_rank_ends_with_the_reason_when_the_first_cannot_restore(folder):
    (ref,) = folder.save(1)
    folder.overwrite(f"{ref.uri}/COMMIT", b"no")
    done = _start("ranks", folder, world_size=2, attempt="B2", saves=[])
    assert json.loads(done.stdout.splitlines()[-1]) == [None, None]
    assert "AllCheckpointsDamagedError: every checkpoint below" in done.stderr
    assert "RestoreError: rank 0 could not restore: AllCheckpointsDamagedError" in done.stderr
