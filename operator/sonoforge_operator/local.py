"""The port to one machine: children are processes, the status is a file.

Everything lives in one folder, so that a runner that was killed finds its processes and its status again:

    status.json  events.jsonl  config.json  token  hash.key  coordinator.json  lock
    children/NAME.pid     written by the child itself before it becomes the program, so no start goes unseen
    children/NAME.exit    exit code, where this runner saw the end
    termination/NAME.json what the process said at its end
    logs/NAME.log         its output
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from sonoforge_operator.api import JobFile
from sonoforge_operator.observed import Child, ChildFact, Event, Observed, Plan
from sonoforge_operator.status import JobStatus
from sonoforge_trainer.contract import (
    ENV_CONFIG,
    ENV_HASH_KEY_FILE,
    ENV_TERMINATION_LOG,
    ContractError,
    Part,
    Progress,
    Request,
    RunConfig,
    RunEvent,
    Termination,
)

_ENV_CHILD = "SONOFORGE_CHILD"
_GRACE_SECONDS = {"worker": 90.0}
_SHUTDOWN_SECONDS = 60
# Processes of one machine start and die quickly, so nobody has to wait long for the others.
_TIMERS = ("--keep-alive=1", "--keep-alive-misses=3", "--first-call=15", "--last-call=2", "--lost-timeout=2")
_HTTP_SECONDS = 2.0
_ALREADY_STARTED = 113
# `set -C` refuses to overwrite: of two starts of one child, the second ends before it becomes the program.
_SHIM = f'set -C; echo "$$" > "$0" || exit {_ALREADY_STARTED}; set +C; exec "$@"'


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
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping: dict[str, float] = {}
        self._lock = self._take_lock()
        for name in ("children", "termination", "logs"):
            (folder / name).mkdir(exist_ok=True)
        self._config = self._keep_config(file.run_config(uid))
        self._token = self._keep_secret("token")
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
            if before.checkpoints.uri != config.checkpoints.uri:
                raise ContractError(
                    f"spec.checkpoints.uri: found {config.checkpoints.uri!r}. Allowed: {before.checkpoints.uri!r}, "
                    f"where this job keeps its checkpoints"
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
            write_atomically(path, Endpoints(host="127.0.0.1", store_port=_port(), http_port=_port()).to_json())
        return Endpoints.from_json(path.read_text(), where=str(path))

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
        facts = {name: self._fact(name) for name in self._known()}
        return Observed(status=status, children=facts, progress=self._progress())

    def _known(self) -> list[str]:
        return sorted(p.stem for p in (self.folder / "children").glob("*.pid"))

    def _fact(self, name: str) -> ChildFact:
        record = self.folder / "children" / f"{name}.pid"
        running = self._running(name)
        return ChildFact(
            name=name,
            running=running,
            exit_code=None if running else self._exit_code(name),
            termination=None if running else self._termination(name),
            started=record.stat().st_mtime,
        )

    def _running(self, name: str) -> bool:
        process = self._processes.get(name)
        if process is not None:
            code = process.poll()
            if code is None:
                return True
            del self._processes[name]
            if code != _ALREADY_STARTED:
                (self.folder / "children" / f"{name}.exit").write_text(str(code))
                return False
        return self._adopted(name) is not None

    def _adopted(self, name: str) -> psutil.Process | None:
        """A child of an earlier runner, if it lives and really is the one that was started under this name."""
        text = (self.folder / "children" / f"{name}.pid").read_text().strip()
        if not text.isdigit():
            return None
        try:
            process = psutil.Process(int(text))
            if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(_ENV_CHILD) != self._mark(name):
                return None
        except psutil.Error:
            return None
        return process

    def _exit_code(self, name: str) -> int | None:
        path = self.folder / "children" / f"{name}.exit"
        return int(path.read_text()) if path.exists() else None

    def _termination(self, name: str) -> Termination | None:
        path = self.folder / "termination" / f"{name}.json"
        if not path.exists():
            return None
        try:
            return Termination.from_json(path.read_text())
        except ContractError:
            return None

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
            with urllib.request.urlopen(request, timeout=_HTTP_SECONDS) as response:  # noqa: S310 - as above
                data = response.read()
                assert isinstance(data, bytes)
                return data
        except (urllib.error.URLError, OSError):
            return None

    # --- apply --------------------------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> None:
        """Make the children what the plan says, and pass its requests on."""
        wanted = {child.name: child for child in plan.children}
        for name in self._known():
            if name not in wanted:
                self._remove(name, at_once=name in plan.kill)
        for request in plan.requests:
            self._send(request)
        known = set(self._known())
        for name, child in wanted.items():
            if name not in known and name not in self._processes:
                self._start(child)

    def _send(self, request: Request) -> None:
        if request.kind == "lost":
            request = request.model_copy(update={"node": _address(int(request.node))})
        self._http("/request", request.to_json().encode())

    def _start(self, child: Child) -> None:
        name = child.name
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                ["/bin/sh", "-c", _SHIM, str(self.folder / "children" / f"{name}.pid"), *self._command(child)],
                env={**os.environ, **self._environment(child)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _command(self, child: Child) -> list[str]:
        python = [sys.executable, "-m", "sonoforge_trainer"]
        where = self._endpoints
        workers = self.file.job.spec.workers
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
            case "evaluation":
                assert child.request is not None
                request = self.folder / "children" / f"{child.name}.request.json"
                write_atomically(request, child.request.to_json())
                return [*python, "eval", "--request", str(request)]
            case "retention":
                deletes = [f"--delete={id_}" for id_ in child.prune]
                return [*python, "checkpoints", "prune", self._config.checkpoints.uri, *deletes]

    def _environment(self, child: Child) -> Mapping[str, str]:
        environment = {
            _ENV_CHILD: self._mark(child.name),
            ENV_TERMINATION_LOG: str(self.folder / "termination" / f"{child.name}.json"),
            ENV_HASH_KEY_FILE: str(self.folder / "hash.key"),
        }
        if child.kind == "worker":
            environment |= {
                ENV_CONFIG: str(self.folder / "config.json"),
            }
        return environment

    def _mark(self, name: str) -> str:
        return f"{self.folder.resolve()}/{name}"

    def _remove(self, name: str, *, at_once: bool = False) -> None:
        """Stop a child that is not wanted, and forget it once it is gone. Called again until it is."""
        if not self._running(name):
            for process in self._family(name):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._stopping.pop(name, None)
            for path in (self.folder / "children").glob(f"{name}.*"):
                path.unlink(missing_ok=True)
            return
        now = time.monotonic()
        asked = self._stopping.setdefault(name, now)
        if at_once:
            self._signal(name, signal.SIGKILL)
        elif asked == now:
            self._signal(name, signal.SIGTERM)
        elif now - asked > _GRACE_SECONDS.get(name.split("-")[0], 10.0):
            self._signal(name, signal.SIGKILL)

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._processes.get(name) or self._adopted(name)
        if process is not None:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.send_signal(number)

    def _family(self, name: str) -> Iterator[psutil.Process]:
        """What a child that died left behind: processes that carry its mark."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(_ENV_CHILD) == self._mark(name):
                    yield process
            except psutil.Error:
                continue

    def stop_everything(self) -> None:
        """Stop every child, workers first so that they can save. For a runner that was told to end."""
        for kind in ("worker-", "eval-", "retention-", "coordinator-"):
            while names := [n for n in self._known() if n.startswith(kind)]:
                for name in names:
                    self._remove(name)
                time.sleep(0.1)

    def log_tail(self, name: str, lines: int = 20) -> str:
        """The end of a child's output."""
        path = self.folder / "logs" / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def _address(index: int) -> str:
    """Each node of a local run has a loopback address of its own; zero-padding keeps rank order by number."""
    return f"127.0.1.{index + 1}"


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def write_atomically(path: Path, text: str) -> None:
    """Write a private file in one step: who reads it sees the old text or the new one."""
    temporary = path.with_name(path.name + ".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:  # noqa: PTH123 - mode
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
