"""Agents, a coordinator and workers as real processes on loopback addresses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TOKEN = "a-token-of-the-tests-0123456789"


class Machines:
    """One coordinator and any number of agents. Every agent's group of processes is one machine: it dies as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.store = ""
        self.http = ""
        (folder / "token").write_text(TOKEN)

    def start_coordinator(self) -> None:
        """Start it; a second call starts its successor at the same addresses."""
        file = self.folder / "addresses.json"
        ports = [self.store.rpartition(":")[2] or "0", self.http.rpartition(":")[2] or "0"]
        file.unlink(missing_ok=True)
        self._start(
            "coordinator",
            ["-m", "sonoforge_trainer", "coordinator"],
            ["--host", "127.0.0.10", "--store-port", ports[0], "--http-port", ports[1]],
            ["--token-file", str(self.folder / "token"), "--address-file", str(file)],
        )
        wait_for(file.exists, 60, "the coordinator's addresses")
        addresses = json.loads(file.read_text())
        self.store, self.http = addresses["store"], addresses["http"]

    def start_agent(
        self, node: str, *, nodes: str, mode: str = "collective", attempt: str = "a", keep_alive: float = 1
    ) -> float:
        """Start an agent at a loopback address. Returns the time at which that was."""
        options = {"first-call": 1, "last-call": 2, "shutdown-timeout": 5, "exit-barrier": 20}
        began = time.time()
        self._start(
            node,
            ["-m", "sonoforge_trainer.launch", "--nodes", nodes, "--endpoint", self.store, "--attempt", attempt],
            ["--local-addr", node, "--keep-alive", str(keep_alive), "--worker", "elastic_worker"],
            [str(part) for name, value in options.items() for part in (f"--{name}", value)],
            env={
                "ELASTIC_LOG": str(self.folder),
                "ELASTIC_MODE": mode,
                "ELASTIC_NODE": node,
                "PYTHONPATH": str(Path(__file__).parent),
                "SONOFORGE_TERMINATION_LOG": str(self.folder / f"{node}.termination"),
            },
        )
        return began

    def _start(self, name: str, *arguments: list[str], env: dict[str, str] | None = None) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *(a for part in arguments for a in part)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                start_new_session=True,
            )

    def kill(self, name: str, *, whole: bool = True) -> float:
        """End a machine as a power cut would; not `whole`: only its agent. Returns the time at which it happened."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            if whole:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        return time.time()

    def terminate(self, name: str) -> float:
        """Tell an agent to end. Returns the time at which it was told."""
        self.processes[name].terminate()
        return time.time()

    def exit_code(self, name: str, seconds: float = 60) -> int:
        """Wait for an agent to end by itself."""
        wait_for(lambda: self.processes[name].poll() is not None, seconds, f"end of {name}", self.output)
        return self.processes[name].wait()

    def steps(self, node: str) -> list[dict[str, Any]]:
        """The log of a node's workers."""
        file = self.folder / f"{node}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_world(self, nodes: list[str], *, since: float, seconds: float) -> float:
        """Wait until exactly these nodes step together, in this order of ranks. Returns when they began."""
        found: list[float] = []

        def formed() -> bool:
            found.clear()
            for rank, node in enumerate(nodes):
                mine = [s for s in self.steps(node) if s["time"] > since]
                found.extend(
                    [s["time"] for s in mine if s["world"] == len(nodes) and s["rank"] == rank and s["step"] == 1][-1:]
                )
            return len(found) == len(nodes)

        wait_for(formed, seconds, f"a world of {nodes}", self.output)
        return max(found)

    def wait_for_step(self, node: str, *, since: float, seconds: float) -> None:
        """Wait until a node's workers step after a time."""
        wait_for(lambda: self.steps(node)[-1]["time"] > since, seconds, f"step of {node}", self.output)

    def finish(self) -> None:
        """Let the workers come to their end."""
        (self.folder / "finish").touch()

    def termination(self, node: str) -> dict[str, Any]:
        """The termination message of a node."""
        document: dict[str, Any] = json.loads((self.folder / f"{node}.termination").read_text())
        return document

    def output(self) -> str:
        """What the processes printed, for failed assertions."""
        return "\n".join(f"--- {f.name}\n{f.read_text()[-4000:]}" for f in sorted(self.folder.glob("*.out")))

    def ask(self, path: str, body: object = None, *, token: str | None = TOKEN) -> tuple[int, Any]:
        """A request to the coordinator: status and document."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.http + path, data=data)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, json.load(refused)

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until a condition holds, or fail with what was awaited and what the processes printed."""
        wait_for(condition, seconds, what, self.output)

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)


def wait_for(condition: Callable[[], bool], seconds: float, what: str, explain: Callable[[], str] = str) -> None:
    """Wait until a condition holds, or fail with what was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} within {seconds} s\n{explain()}")
        time.sleep(0.05)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """A coordinator and, once started, agents; all ended at the end."""
    machines = Machines(tmp_path)
    try:
        machines.start_coordinator()
        yield machines
    finally:
        machines.close()


@pytest.fixture
def note(capsys: pytest.CaptureFixture[str]) -> Callable[[str, float], float]:
    """Print a measured duration to the terminal and return it."""

    def write(what: str, duration: float) -> float:
        with capsys.disabled():
            print(f"\n    {duration:5.1f} s  {what}", end="")
        return duration

    return write
