"""`dying_runner.py N run …` is `sonoforge run …`, killed just before its Nth change of a file or start of a process."""

from __future__ import annotations

import os
import signal
import sys

from sonoforge_trainer.cli import main

_CHANGES = ("os.rename", "os.remove", "subprocess.Popen")


def die_at(change: int) -> None:
    """Count what the interpreter itself tells about changes, and die at one of them."""
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in _CHANGES and not (event == "open" and arguments[1] == "a"):
            return
        seen += 1
        if seen == change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


if __name__ == "__main__":
    die_at(int(sys.argv.pop(1)))
    main()
