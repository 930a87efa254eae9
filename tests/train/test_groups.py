"""Groups of processes under real agents and a real coordinator: asked, told, damaged, and started again."""

from __future__ import annotations

import signal

import psutil

from sonoforge_trainer.contract import Activity, ExitCode
from sonoforge_trainer.train import Run


def test_a_run_does_what_it_is_asked_and_says_what_it_sees(tiny, spoil):
    """One checkpoint for a request, whoever uploads; then a stop, after which no agent starts its worker again."""
    spoil(tiny.copy_shards(), 7)
    tiny.start_coordinator()
    tiny.write(tiny.config(steps=100_000, every=None, every_seconds=3600, loader_workers=1, log_every_steps=2))
    agents = [tiny.start_agent(index, nodes=2) for index in range(2)]
    tiny.wait_for_step(8)
    asked = tiny.ask("/request", {"kind": "checkpoint", "id": "one"})
    assert asked == {"id": "one", "accepted": True}
    tiny.wait_for(lambda: len(tiny.ask("/progress")["checkpoints"]) == 2, "checkpoint that was asked for")
    tiny.ask("/request", {"kind": "stop", "id": "stray", "attempt": "a group that is gone"})
    tiny.wait_for_step(tiny.ask("/progress")["step"] + 8)
    tiny.ask("/request", {"kind": "stop", "id": "two", "attempt": tiny.ask("/progress")["attempt"]})
    assert [agent.wait(60) for agent in agents] == [ExitCode.TERMINATED, ExitCode.TERMINATED]

    progress = tiny.ask("/progress")
    saved = tiny.committed()
    assert progress["activity"] == "Stopped"
    assert [checkpoint["step"] for checkpoint in progress["checkpoints"]] == saved
    assert len(saved) == 3
    assert saved[-1] == progress["step"]
    assert progress["worldSize"] == progress["nodes"] == 2
    assert progress["corruptSamples"] >= 1
    assert progress["checkpointsSkipped"] == 0
    assert 0 < progress["checkpointStallSeconds"] < progress["checkpointSeconds"]
    assert 0 < progress["teacherEntropy"] < 3.5  # log of 32 prototypes
    assert set(progress["losses"]) == {"dino", "ibot", "koleo"}
    assert tiny.logged_samples()[-1] == (saved[-1] - 1, 1)
    for index in range(2):
        said = tiny.termination(index)
        assert (said["cause"], said["final"], said["rank"]) == ("terminated", True, index)
        assert said["message"] == f"saved step {saved[-1]} and left, as the run was asked to stop"

    # What was done is acknowledged: the run goes on when it is started again, and is not stopped by the old request.
    agent = tiny.start_agent(2, nodes=1, attempt="b")
    tiny.wait_for_step(saved[-1] + 8)
    assert tiny.ask("/progress")["restoredStep"] == saved[-1]
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(60) == ExitCode.TERMINATED
    steps = [step for step, _ in tiny.logged_samples()]
    assert tiny.said("agent-0", "stopped")[0]["node"] == "127.0.3.1"
    assert {line["rank"] for line in tiny.said("agent-1", "checkpoint committed")} == {"1"}
    assert sorted(steps) == [step for step in range(tiny.committed()[-1]) for _ in range(2)]


def test_a_first_rank_that_was_away_does_not_speak_for_the_group_that_went_on(tiny):
    """A node stands still until the other one trains alone; then its worker goes on, and ends."""
    tiny.start_coordinator()
    tiny.write(tiny.config(steps=100_000, every=None, every_seconds=3600))
    first, other = (tiny.start_agent(index, nodes="1:2") for index in range(2))
    tiny.wait_for(lambda: tiny.ask("/progress")["nodes"] == 2 and tiny.ask("/progress")["step"] > 4, "steps of both")
    workers = psutil.Process(first.pid).children(recursive=True)
    for process in (first, *workers):
        process.send_signal(signal.SIGSTOP)
    tiny.wait_for(lambda: tiny.ask("/progress")["nodes"] == 1 and tiny.ask("/progress")["step"] > 4, "steps of one")
    alone = tiny.ask("/progress")["attempt"]
    for process in workers:
        process.send_signal(signal.SIGCONT)
    seen = set()
    tiny.wait_for(
        lambda: seen.add(tiny.ask("/progress")["attempt"]) or tiny.said("agent-0", "worker-failed"), "end of its worker"
    )
    later = tiny.ask("/progress")["step"] + 8
    tiny.wait_for(lambda: seen.add(tiny.ask("/progress")["attempt"]) or tiny.ask("/progress")["step"] > later, "steps")
    assert seen == {alone}
    other.send_signal(signal.SIGTERM)
    assert other.wait(60) == ExitCode.TERMINATED


def test_a_group_that_leaves_says_that_it_saves_before_it_waits_for_an_older_upload():
    """Until then its newest report is of a step, and an upload that takes minutes would look like a stall."""
    order: list[object] = []

    class Saving:
        def complete(self, step: int) -> None:
            order.append(("complete", step))

    class Ranks:
        def meet(self) -> None:
            order.append("meet")

    run = object.__new__(Run)
    run.step, run.ranks, run._checkpointing = 7, Ranks(), Saving()
    run._publish = order.append
    run._save_together()
    assert order == [Activity.CHECKPOINTING, ("complete", 7), "meet"]
