"""Processes that outlive the runner that started them, and the folder that remembers them.

children/NAME.pid     process id, written by the process itself before it becomes the program, in one step
children/NAME.exit    exit code, where a runner saw the end
termination/NAME.json what the process said at its end
logs/NAME.log         its output
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from sonoforge_operator.observed import ChildFact
from sonoforge_trainer.contract import ENV_TERMINATION_LOG, ContractError, Termination

ENV_CHILD = "SONOFORGE_CHILD"
"""Marks a child and everything that it starts: the folder and the child's name."""

_ALREADY_STARTED = 113
# A link is made in one step and never replaces another: of two starts of one child, the second ends before it becomes
# the program. Then what an earlier process of that name left is removed, because it says nothing about this one.
_SHIM = f"""
echo "$$" > "$0.$$" || exit 1
ln "$0.$$" "$0" || {{ rm -f "$0.$$"; exit {_ALREADY_STARTED}; }}
rm -f "$0.$$" "${{0%.pid}}.exit" "${ENV_TERMINATION_LOG}"
exec "$@"
"""


class Processes:
    """The children of one job on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping: dict[str, float] = {}
        for name in ("children", "termination", "logs"):
            (folder / name).mkdir(exist_ok=True)

    def names(self) -> list[str]:
        """Every child that exists or existed and was not removed, also one that is just about to record itself."""
        unrecorded = {name for name, process in self._started.items() if process.poll() is None}
        return sorted(unrecorded | {p.stem for p in (self._folder / "children").glob("*.pid")})

    def fact(self, name: str) -> ChildFact:
        """What is known of a child."""
        running = self._running(name)
        record = self._record(name)
        return ChildFact(
            name=name,
            running=running,
            exit_code=None if running else self._exit_code(name),
            termination=None if running else self._termination(name),
            started=record.stat().st_mtime if record.exists() else time.time(),
        )

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a child, unless it exists. Whoever calls twice, or was killed in between, starts it once."""
        before = self._started.get(name)
        over = before is None or before.poll() is not None
        if not over or self._record(name).exists():  # asked in this order, because the record comes before the end
            return
        mark = {ENV_CHILD: self._mark(name), ENV_TERMINATION_LOG: str(self._folder / "termination" / f"{name}.json")}
        with (self._folder / "logs" / f"{name}.log").open("ab") as log:
            self._started[name] = subprocess.Popen(
                ["/bin/sh", "-c", _SHIM, str(self._record(name)), *command],
                env={**os.environ, **environment, **mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def remove(self, name: str, *, grace_seconds: float) -> None:
        """Stop a child that is not wanted, and forget it once it is gone. Called again until it is.

        It is asked to end, and killed after the grace; at once where there is none.
        """
        if not self._running(name):
            for process in self._family(name):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._stopping.pop(name, None)
            for path in (self._folder / "children").glob(f"{name}.*"):
                if path != self._record(name):
                    path.unlink(missing_ok=True)
            self._record(name).unlink(missing_ok=True)  # last, so that a removal that is cut is done again
            return
        now = time.monotonic()
        asked = self._stopping.setdefault(name, now)
        if now - asked >= grace_seconds:
            self._signal(name, signal.SIGKILL)
        elif asked == now:
            self._signal(name, signal.SIGTERM)

    def _record(self, name: str) -> Path:
        return self._folder / "children" / f"{name}.pid"

    def _mark(self, name: str) -> str:
        return f"{self._folder.resolve()}/{name}"

    def _running(self, name: str) -> bool:
        process = self._started.get(name)
        if process is not None:
            code = process.poll()
            if code is None:
                return True
            del self._started[name]
            if code != _ALREADY_STARTED:
                write_atomically(self._folder / "children" / f"{name}.exit", str(code))
                return False
        return self._adopted(name) is not None

    def _adopted(self, name: str) -> psutil.Process | None:
        """A child of an earlier runner, if it lives and really is the one that was started under this name."""
        try:
            process = psutil.Process(int(self._record(name).read_text()))
            if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(ENV_CHILD) != self._mark(name):
                return None
        except (psutil.Error, FileNotFoundError, ValueError):
            return None
        return process

    def _exit_code(self, name: str) -> int | None:
        try:
            return int((self._folder / "children" / f"{name}.exit").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _termination(self, name: str) -> Termination | None:
        try:
            return Termination.from_json((self._folder / "termination" / f"{name}.json").read_text())
        except (FileNotFoundError, UnicodeDecodeError, ContractError):
            return None  # it was killed before it said anything, or while it wrote

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._started.get(name) or self._adopted(name)
        if process is not None:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.send_signal(number)

    def _family(self, name: str) -> Iterator[psutil.Process]:
        """What a child that died left behind: processes that carry its mark."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(ENV_CHILD) == self._mark(name):
                    yield process
            except psutil.Error:
                continue


def write_atomically(path: Path, text: str) -> None:
    """Write a private file in one step: who reads it sees the old text or the new one."""
    temporary = path.with_name(path.name + ".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:  # noqa: PTH123 - mode
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
