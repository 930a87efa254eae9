"""The port to one machine: children are processes, the status is a file.

Everything lives in one folder, so that a runner that was killed finds its processes and its status again:

    status.json  events.jsonl  config.json  token  hash.key  coordinator.json  lock
    children/  termination/  logs/    see processes.py
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import random
import secrets
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from sonoforge_operator.api import JobFile
from sonoforge_operator.gpus import gpus_of_node
from sonoforge_operator.observed import Child, Event, Observed, Plan
from sonoforge_operator.processes import Processes, write_atomically
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import (
    ENV_CONFIG,
    ENV_HASH_KEY_FILE,
    ContractError,
    Part,
    Progress,
    Request,
    RunConfig,
    RunEvent,
)

_WORKER_GRACE_SECONDS, _GRACE_SECONDS = 90.0, 10.0
_SHUTDOWN_SECONDS = 60
# Processes of one machine start and die quickly, so nobody has to wait long for the others.
_TIMERS = ("--keep-alive=1", "--keep-alive-misses=3", "--first-call=15", "--last-call=2", "--lost-timeout=2")
_HTTP_SECONDS = 2.0
_HOST, _PORTS = "127.0.0.1", range(16384, 32768)
_PORT_SECONDS = 3.0
# The coordinator is on this machine; a proxy of the environment must neither be asked nor see the token.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LocalError(RuntimeError):
    """This machine cannot run the job as asked; the message says what to do."""


class Endpoints(Part):
    """Where the coordinator listens; the same for every coordinator of the job, so that workers find the next one."""

    host: str
    """Loopback address."""
    store_port: int
    """Port of the rendezvous store."""
    http_port: int
    """Port of the progress endpoint."""


class LocalPort:
    """Processes on this machine, and the folder that remembers them."""

    def __init__(self, folder: Path, file: JobFile, uid: str) -> None:
        self.folder = folder
        self.file = file
        self._lock = self._take_lock()
        self._processes = Processes(folder)
        self._config = self._keep_config(file.run_config(uid))
        self._token = self._keep_secret("token")
        self._heard = ""
        self._keep_secret("hash.key")
        self._endpoints = self._keep_endpoints()

    # --- the folder ---------------------------------------------------------------------------------------------------

    def _take_lock(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise LocalError(f"another `sonoforge run` works on this job in {self.folder}") from None
        return handle

    def _keep_config(self, config: RunConfig) -> RunConfig:
        path = self.folder / "config.json"
        if path.exists():
            before = RunConfig.from_json(path.read_text(), where=str(path))
            if before.training != config.training:
                raise ContractError(
                    f"spec.training: changed since this job was started, and it is immutable. "
                    f"Give the new run another metadata.name, or remove {self.folder} and the old checkpoints"
                )
            for name, old, new in (
                ("spec.checkpoints.uri", before.checkpoints.uri, config.checkpoints.uri),
                ("metadata.name", before.job, config.job),
                ("metadata.uid", before.uid, config.uid),
            ):
                if old != new:
                    raise ContractError(
                        f"{name}: found {new!r}. Allowed: {old!r}, as long as {self.folder} is its state"
                    )
        if not path.exists() or path.read_text() != config.to_json():
            write_atomically(path, config.to_json())
        return config

    def _keep_secret(self, name: str) -> str:
        path = self.folder / name
        if not path.exists():
            write_atomically(path, secrets.token_hex(32))
        return path.read_text()

    def _keep_endpoints(self) -> Endpoints:
        path = self.folder / "coordinator.json"
        if not path.exists():
            return self._draw_endpoints()
        return Endpoints.from_json(path.read_text(), where=str(path))

    def _draw_endpoints(self) -> Endpoints:
        drawn = Endpoints(host=_HOST, store_port=_port(), http_port=_port())
        write_atomically(self.folder / "coordinator.json", drawn.to_json())
        return drawn

    def _wait_for_ports(self) -> None:
        """Draw new ports where somebody else took the old ones. Nodes that know the old ones end after a while."""
        deadline = time.monotonic() + _PORT_SECONDS
        while not (_free(self._endpoints.store_port) and _free(self._endpoints.http_port)):
            if time.monotonic() > deadline:
                self._endpoints = self._draw_endpoints()
                return
            time.sleep(0.05)

    def adopt(self, file: JobFile) -> None:
        """Go on with a changed job. Raises ContractError where what changed is immutable; nothing is then changed."""
        self._config = self._keep_config(file.run_config(self._config.uid))
        self.file = file

    def read_status(self) -> JobStatus:
        """The status as last written."""
        path = self.folder / "status.json"
        if not path.exists():
            return JobStatus(uid=self._config.uid)
        return JobStatus.from_json(path.read_text(), where=str(path))

    def record(self, status: JobStatus, events: tuple[Event, ...], now: float) -> None:
        """Write the status, then the events of the pass."""
        path = self.folder / "status.json"
        text = status.to_json()
        if not path.exists() or path.read_text() != text:
            write_atomically(path, text)
        if events:
            progress = status.progress
            with (self.folder / "events.jsonl").open("a") as log:
                if self._torn_line():
                    log.write("\n")
                for event in events:
                    line = RunEvent(
                        time=now,
                        reason=event.reason,
                        message=event.message,
                        warning=event.warning,
                        step=progress.step if progress else 0,
                        world_size=progress.world_size if progress else 0,
                    )
                    log.write(line.to_json() + "\n")

    def _torn_line(self) -> bool:
        """Whether a runner was killed while it wrote an event."""
        with (self.folder / "events.jsonl").open("rb") as log:
            if log.seek(0, os.SEEK_END) == 0:
                return False
            log.seek(-1, os.SEEK_END)
            return log.read(1) != b"\n"

    def events(self) -> tuple[RunEvent, ...]:
        """Every recorded event."""
        path = self.folder / "events.jsonl"
        if not path.exists():
            return ()
        found = []
        for line in path.read_text().splitlines():
            # A runner killed while writing leaves half a line; what it wanted to say is in the status.
            with contextlib.suppress(ContractError):
                found.append(RunEvent.from_json(line))
        return tuple(found)

    # --- observe ------------------------------------------------------------------------------------------------------

    def observe(self) -> Observed:
        """The facts: children first, progress after, as the plan expects."""
        status = self.read_status()
        facts = {name: self._processes.fact(name) for name in self._processes.names()}
        return Observed(status=status, children=facts, progress=self._progress(), heard=self._heard)

    def _progress(self) -> Progress | None:
        answer = self._http("/progress")
        if answer is None:
            return None
        try:
            return Progress.from_json(answer)
        except ContractError:
            return None

    def _http(self, path: str, body: bytes | None = None) -> bytes | None:
        url = f"http://{self._endpoints.host}:{self._endpoints.http_port}{path}"
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(url, data=body, headers=headers)
        try:
            with _HTTP.open(request, timeout=_HTTP_SECONDS) as response:
                data = response.read()
                assert isinstance(data, bytes)
                return data
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            return None  # not there yet, not there any more, or killed in the middle of its answer

    # --- apply --------------------------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> None:
        """Make the children what the plan says, and pass its requests on."""
        wanted = {child.name: child for child in plan.children}
        for name in self._processes.names():
            if name not in wanted:
                self._remove(name, at_once=name in plan.kill)
        for request in plan.requests:
            self._send(request)
        known = set(self._processes.names())
        for name, child in wanted.items():
            if name not in known:
                self._start(child)

    def stop(self, *, workers_only: bool = False, at_once: Callable[[], bool] = lambda: False) -> None:
        """Stop every child, workers first so that they can save. `at_once` is asked whether there is no time for it."""
        for turn in range(1 if workers_only else 3):
            while names := [n for n in self._processes.names() if _turn_to_stop(n) == turn]:
                for name in names:
                    self._remove(name, at_once=at_once())
                time.sleep(0.05)

    def _send(self, request: Request) -> None:
        if request.kind == "lost":
            request = request.model_copy(update={"node": _address(int(request.node))})
        if self._http("/request", request.to_json().encode()) is not None:
            self._heard = request.id

    def _start(self, child: Child) -> None:
        if child.kind == "coordinator":
            self._wait_for_ports()
        self._processes.start(child.name, self._command(child), self._environment(child))

    def _remove(self, name: str, *, at_once: bool) -> None:
        grace = _WORKER_GRACE_SECONDS if name.startswith("worker-") else _GRACE_SECONDS
        self._processes.remove(name, grace_seconds=0.0 if at_once else grace)

    def _command(self, child: Child) -> list[str]:
        python = [sys.executable, "-m", "sonoforge_trainer"]
        where = self._endpoints
        workers = child.workers
        match child.kind:
            case "coordinator":
                return [
                    *python,
                    "coordinator",
                    f"--host={where.host}",
                    f"--store-port={where.store_port}",
                    f"--http-port={where.http_port}",
                    f"--token-file={self.folder / 'token'}",
                ]
            case "worker":
                return [
                    sys.executable,
                    "-m",
                    "sonoforge_trainer.launch",
                    f"--nodes={workers.min_nodes}:{workers.max_nodes}",
                    f"--nproc-per-node={workers.gpus_per_node}",
                    f"--endpoint={where.host}:{where.store_port}",
                    f"--attempt={self._config.uid}-{child.attempt}",
                    f"--local-addr={_address(child.index)}",
                    f"--job={self._config.job}",
                    f"--shutdown-timeout={_SHUTDOWN_SECONDS}",
                    *_TIMERS,
                ]
            case "evaluation" | "floor":
                assert child.request is not None
                request = self.folder / "children" / f"{child.name}.request.json"
                write_atomically(request, child.request.to_json())
                floors = ["--floors"] if child.kind == "floor" and child.request.baseline is None else []
                best_by = self.file.job.spec.evaluation.best_by
                decides = [f"--best-by={best_by}"] if best_by and child.kind == "evaluation" else []
                return [*python, "eval", *floors, *decides, "--request", str(request)]
            case "retention":
                deletes = [f"--delete={id_}" for id_ in child.prune]
                return [*python, "checkpoints", "prune", self._config.checkpoints.uri, *deletes]
            case "inventory":
                known = [f"--known={id_}" for id_ in child.known]
                return [*python, "checkpoints", "list", self._config.checkpoints.uri, *known]

    def _environment(self, child: Child) -> dict[str, str]:
        environment = {ENV_HASH_KEY_FILE: str(self.folder / "hash.key")}
        if child.kind == "worker":
            environment[ENV_CONFIG] = str(self.folder / "config.json")
            environment |= gpus_of_node(child.index, child.workers)
        return environment


def _address(index: int) -> str:
    """Each node of a local run has a loopback address of its own."""
    return f"127.0.{1 + index // 250}.{1 + index % 250}"


def _turn_to_stop(name: str) -> int:
    return {"worker": 0, "coordinator": 2}.get(name.split("-")[0], 1)


def _port() -> int:
    """A free port that the system gives to nobody by itself: nodes call it also while nobody listens there."""
    draw = random.SystemRandom()
    while not _free(port := draw.choice(_PORTS)):
        pass
    return port


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: connections that ended do not count
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True
