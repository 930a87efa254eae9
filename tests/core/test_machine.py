"""The port to one machine in parts: processes that outlive a runner, ports, GPUs, and the folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from builders import job

from sonoforge_operator.api import Workers
from sonoforge_operator.gpus import gpus_of_node
from sonoforge_operator.local import Endpoints, LocalError, LocalPort
from sonoforge_operator.observed import Child, Event, Plan
from sonoforge_operator.processes import ENV_CHILD, Processes
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import ContractError

SLEEP = ["/bin/sh", "-c", "exec sleep 60"]


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def stopped(processes: Processes, name: str, grace_seconds: float = 0.0) -> bool:
    """Ask for an end once more; whether it is reached."""
    processes.remove(name, grace_seconds=grace_seconds)
    return processes.names() == []


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for processes; whatever is left of them is killed."""
    yield tmp_path
    mine = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(ENV_CHILD, "").startswith(f"{tmp_path.resolve()}/"):
                process.kill()
                mine.append(process)
        except psutil.Error:
            continue
    psutil.wait_procs(mine, timeout=10)


def test_a_child_is_found_again_by_the_next_runner_and_stopped_by_it(folder):
    first = Processes(folder)
    first.start("worker-a", SLEEP, {})
    eventually((folder / "children" / "worker-a.pid").exists)
    second = Processes(folder)
    assert second.fact("worker-a").running
    second.start("worker-a", SLEEP, {})
    second.remove("worker-a", grace_seconds=30)
    eventually(lambda: not first.fact("worker-a").running)
    second.remove("worker-a", grace_seconds=30)
    assert second.names() == []
    assert list((folder / "children").iterdir()) == []


def test_of_two_starts_at_the_same_moment_one_becomes_the_program(folder):
    """Two runners that do not know of each other: one was killed after its start, before the child was recorded."""
    runners = [Processes(folder) for _ in range(4)]
    for runner in runners:
        runner.start("eval-a", ["/bin/sh", "-c", f"echo one >> {folder}/ran; exec sleep 60"], {})
    eventually(lambda: (folder / "ran").exists())
    eventually(lambda: sum(p.poll() is None for r in runners for p in r._started.values()) == 1)
    assert (folder / "ran").read_text() == "one\n"
    assert all(runner.fact("eval-a").running for runner in runners)
    for runner in runners:
        eventually(lambda runner=runner: stopped(runner, "eval-a"))


def test_an_exit_code_is_kept_and_what_an_earlier_process_of_the_name_left_is_not(folder):
    for name, text in (("termination/eval-a.json", '{"cause": "config"}'), ("children/eval-a.exit", "64")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    processes = Processes(folder)
    processes.start("eval-a", ["/bin/sh", "-c", "exit 7"], {})
    eventually(lambda: processes.names() == ["eval-a"] and not processes.fact("eval-a").running)
    assert (processes.fact("eval-a").exit_code, processes.fact("eval-a").termination) == (7, None)
    assert Processes(folder).fact("eval-a").exit_code == 7


def test_a_child_that_nobody_saw_end_has_no_exit_code_and_a_stranger_with_its_number_is_left_alone(folder):
    processes = Processes(folder)
    (folder / "children" / "eval-a.pid").write_text(f"{os.getpid()}\n")
    (folder / "children" / "eval-a.exit").write_text("")
    fact = processes.fact("eval-a")
    assert (fact.running, fact.exit_code) == (False, None)
    processes.remove("eval-a", grace_seconds=0)
    assert processes.names() == []


def test_what_a_dead_child_left_behind_is_killed_with_it(folder):
    processes = Processes(folder)
    processes.start("worker-a", ["/bin/sh", "-c", f"sleep 60 & echo $! > {folder}/orphan; wait"], {})
    eventually(lambda: (folder / "orphan").exists() and bool((folder / "orphan").read_text()))
    orphan = psutil.Process(int((folder / "orphan").read_text()))
    (process,) = processes._started.values()
    process.kill()
    eventually(lambda: not processes.fact("worker-a").running)
    processes.remove("worker-a", grace_seconds=30)
    eventually(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)


def test_a_child_that_does_not_listen_is_killed_after_its_grace(folder):
    processes = Processes(folder)
    processes.start(
        "eval-a", ["/bin/sh", "-c", f"trap '' TERM; echo > {folder}/ready; while :; do sleep 0.1; done"], {}
    )
    eventually(lambda: (folder / "ready").exists())
    processes.remove("eval-a", grace_seconds=0.3)
    assert processes.fact("eval-a").running
    eventually(lambda: stopped(processes, "eval-a", grace_seconds=0.3))


def test_a_program_that_cannot_start_is_seen_to_end(folder):
    processes = Processes(folder)
    processes.start("eval-a", ["/nonexistent/program"], {})
    eventually(lambda: processes.names() == ["eval-a"] and not processes.fact("eval-a").running)
    assert processes.fact("eval-a").exit_code == 127


def test_a_coordinator_gets_new_ports_where_somebody_took_the_old_ones(folder):
    port = LocalPort(folder, job(), "uid")
    before = Endpoints.from_json((folder / "coordinator.json").read_text())
    with socket.socket() as stranger:
        stranger.bind((before.host, before.store_port))
        stranger.listen()
        port.apply(Plan(children=(Child("coordinator-000", "coordinator"),), status=JobStatus()))
        after = Endpoints.from_json((folder / "coordinator.json").read_text())
    assert before.store_port != after.store_port
    port.stop(at_once=lambda: True)


def test_ports_are_none_that_the_system_hands_out_by_itself(folder):
    LocalPort(folder, job(), "uid")
    drawn = Endpoints.from_json((folder / "coordinator.json").read_text())
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(drawn.store_port, drawn.http_port) < max(lowest, 32768)


def test_the_coordinator_is_not_looked_for_behind_a_proxy(folder, monkeypatch):
    port = LocalPort(folder, job(), "uid")
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.settimeout(0.2)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert port.observe().progress is None
        with pytest.raises(TimeoutError):
            proxy.accept()


def test_an_event_that_was_cut_does_not_take_the_next_one_with_it(folder):
    port = LocalPort(folder, job(), "uid")
    (folder / "events.jsonl").write_text('{"time": 1.0, "reas')
    port.record(JobStatus(), (Event("Accepted", "x"),), 2.0)
    assert [event.reason for event in port.events()] == ["Accepted"]


def test_a_folder_belongs_to_one_runner_and_to_one_job(folder):
    port = LocalPort(folder, job(), "uid")
    with pytest.raises(LocalError, match="another `sonoforge run` works on this job"):
        LocalPort(folder, job(), "uid")
    renamed = job().model_copy(update={"job": job().job.model_copy(update={"metadata": job().job.metadata})})
    port.adopt(renamed)
    other = job().job.metadata.model_copy(update={"name": "cardiac"})
    with pytest.raises(ContractError, match=r"metadata.name: found 'cardiac'. Allowed: 'fetal'"):
        port.adopt(job().model_copy(update={"job": job().job.model_copy(update={"metadata": other})}))


@pytest.mark.parametrize(
    ("visible", "index", "wanted"),
    [("0,1,2,3", 1, "2,3"), ("GPU-a, GPU-b,GPU-c,GPU-d", 0, "GPU-a,GPU-b"), ("0,1,2", 1, None), ("", 0, None)],
)
def test_each_node_of_a_machine_has_its_own_gpus_where_there_are_enough(visible, index, wanted):
    workers = Workers(min_nodes=1, max_nodes=2, gpus_per_node=2)
    found = gpus_of_node(index, workers, environ={"CUDA_VISIBLE_DEVICES": visible})
    assert found == ({} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted})


def test_gpus_are_counted_by_the_driver_where_no_variable_names_them(tmp_path):
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    workers = Workers(max_nodes=2)
    assert gpus_of_node(1, workers, environ={}, driver=tmp_path) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert gpus_of_node(1, workers, environ={}, driver=tmp_path / "none") == {}
