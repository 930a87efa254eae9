"""One program of the test cluster as a process that can be stopped, killed and started again."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Component:
    """A program, its arguments and its log. It ends with the process that started it, because its input does."""

    program: Path
    arguments: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id, also of one that has ended by itself."""
        assert self.process, f"{self.program.name} was not started"
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it and come back at once; whether it is ready is for others to ask."""
        assert not self.running, f"{self.program.name} is running already"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.program), *self.arguments],
                env={"PATH": os.defpath, "HOME": str(self.log.parent)},
                cwd=self.log.parent,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the one who started it, who then stops all in order
            )

    def stop(self, grace_seconds: float = 10.0) -> None:
        """Ask it to end, and end it where it does not."""
        if self.running:
            assert self.process
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_seconds)
        self.kill()

    def kill(self) -> None:
        """End it as a power cut does."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        assert self.process.stdin
        self.process.stdin.close()
        self.process = None

    def log_end(self) -> str:
        """The last lines that it wrote, for a message."""
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Look every 20 ms until the condition holds. Raises TimeoutError, which names what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    with ExitStack() as stack:  # all are held until all are drawn, so that they differ
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
