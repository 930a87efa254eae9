"""Real agents on loopback addresses, lost in every way that reliability.md §2.2 lists as E1 to E14.

The bounds are for two busy cores; the measured times are printed.
"""

import os
import signal
import time
from itertools import pairwise

from sonoforge_trainer.contract import ExitCode


def test_the_group_survives_newcomers_losses_and_a_replaced_coordinator(machines, note):
    """E1-E4, E7-E9, E12, E14 in one life of a group that works together in collectives."""
    low, middle, high = "127.0.0.2", "127.0.0.3", "127.0.0.4"

    began = machines.start_agent(middle, nodes="2:3")
    machines.start_agent(high, nodes="2:3")
    formed = machines.wait_for_world([middle, high], since=began, seconds=120)
    note("from the start of two agents to the first step", formed - began)

    began = machines.start_agent(low, nodes="2:3")
    formed = machines.wait_for_world([low, middle, high], since=began, seconds=90)
    note("from the start of an agent that sorts first to a step of three (E8: never with torch)", formed - began)

    before = machines.steps(low)[-1]
    machines.kill("coordinator")
    outage = time.time()
    machines.start_coordinator()
    back = time.time()
    machines.wait_for_step(low, since=back + 1, seconds=10)
    times = [s["time"] for s in machines.steps(low) if s["time"] >= before["time"]]
    pause = max(b - a for a, b in pairwise(times))
    note(f"longest pause of training while the coordinator was away for {back - outage:.1f} s (E12: dead)", pause)
    assert {s["pid"] for s in machines.steps(low) if s["time"] >= before["time"]} == {before["pid"]}

    killed = machines.kill(low)
    formed = machines.wait_for_world([middle, high], since=killed, seconds=60)
    assert (
        note("from the kill of the rank-0 node to the next step, store replaced before (E2, E14)", formed - killed) < 40
    )

    killed = time.time()
    os.kill(machines.steps(middle)[-1]["pid"], signal.SIGKILL)
    formed = machines.wait_for_world([middle, high], since=killed, seconds=60)
    assert note("from the kill of a worker process to the next step", formed - killed) < 40

    told = machines.terminate(high)
    assert machines.exit_code(high) == ExitCode.TERMINATED
    assert machines.termination(high)["cause"] == "terminated"
    note("from SIGTERM to the end of an agent", time.time() - told)
    began = machines.start_agent(high, nodes="2:3")
    formed = machines.wait_for_world([middle, high], since=began, seconds=90)
    note("from the start of its successor at the same address to the next step (E9)", formed - began)

    machines.finish()
    assert [machines.exit_code(node) for node in (middle, high)] == [ExitCode.OK, ExitCode.OK]


def test_a_lost_node_is_noticed_though_no_collective_fails(machines, note):
    """E11 and E13: by missing heartbeats, and at once where the coordinator is told."""
    nodes = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    began = time.time()
    for node in nodes:
        machines.start_agent(node, nodes="1:3", mode="idle", keep_alive=2)
    machines.wait_for_world(nodes, since=began, seconds=150)

    worker = machines.steps(nodes[0])[-1]["pid"]
    killed = machines.kill(nodes[0], whole=False)
    formed = machines.wait_for_world(nodes[1:], since=killed, seconds=60)
    by_heartbeat = note("from the kill of the rank-0 agent to the next step, by heartbeats of 3 × 2 s", formed - killed)
    last = max(s["time"] for s in machines.steps(nodes[0]) if s["pid"] == worker)
    assert last - killed < 2, "the worker of a killed agent must not train on"

    killed = machines.kill(nodes[1])
    status, answer = machines.ask("/request", {"kind": "lost", "node": nodes[1], "id": "lost-1"})
    assert (status, answer) == (202, {"id": "lost-1", "accepted": True, "nodes": 1})
    formed = machines.wait_for_world(nodes[2:], since=killed, seconds=60)
    assert note("the same, and the coordinator is told", formed - killed) < by_heartbeat - 2

    machines.finish()
    assert machines.exit_code(nodes[2]) == ExitCode.OK
    machines.start_agent(nodes[0], nodes="1:3", mode="idle")
    assert machines.exit_code(nodes[0]) == ExitCode.OK, "a node that comes when all is done has not failed"


def test_an_attempt_ends_with_the_class_of_its_failure_and_the_next_one_is_free(machines):
    """E5, E6, E10: a failure is not retried in place, names its cause, ends its peers and closes its attempt alone."""
    machines.start_agent("127.0.0.2", nodes="2:2", mode="config")
    machines.start_agent("127.0.0.3", nodes="2:2", mode="config")
    machines.start_agent("127.0.0.4", nodes="1:1", mode="foreign", attempt="b")

    assert machines.exit_code("127.0.0.2", 120) == ExitCode.CONFIG
    assert machines.termination("127.0.0.2") == {
        "cause": "config",
        "exception": "ContractError",
        "final": False,
        "message": "training.recipe.globalBatch: found 3. Allowed: a multiple of virtualRanks",
        "rank": 0,
        "result": None,
        "step": None,
    }
    assert machines.exit_code("127.0.0.3") == ExitCode.FAILED
    assert machines.termination("127.0.0.3")["cause"] == "collective"

    assert machines.exit_code("127.0.0.4", 120) == ExitCode.FAILED
    assert machines.termination("127.0.0.4")["exception"] == "FileNotFoundError"
    assert "DOE_JANE" not in machines.output()

    machines.start_agent("127.0.0.5", nodes="1:2", mode="config")
    assert machines.exit_code("127.0.0.5") == ExitCode.FAILED, "an attempt that failed takes nobody in"
