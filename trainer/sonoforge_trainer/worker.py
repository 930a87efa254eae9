"""What every worker process runs: the training module, in a process that was forked with its imports already done.

Importing torch and the trainer costs seconds of every recovery. A fork server does it once, while the agent waits for
other nodes, and each group of workers is forked from there in milliseconds. The server is single-threaded and never
touches a device, so forking it is safe.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path

import structlog

from sonoforge_trainer import logs, termination

START_METHOD = "forkserver"
"""How torch's agent must start workers."""

_PRELOAD = ("torch.distributed.elastic.multiprocessing", "sonoforge_trainer.termination")
_FRAMES = 12

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def prepare(module: str) -> None:
    """Start the fork server, which begins to import what the workers of `module` need. Returns at once.

    It ignores SIGTERM: a signal to a whole process group is for the agent and the workers, which need the server alive.
    """
    multiprocessing.get_context(START_METHOD).set_forkserver_preload([*_PRELOAD, module])
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, handler)


def run(context: dict[str, str], module: str, *arguments: str) -> None:
    """Run a module as `python -m` does, and make every failure a report. `context` goes into every line of the log.

    Ends with SystemExit; foreign exceptions are logged by class and place, without their text.
    """
    threading.Thread(target=_die_with_agent, name="agent-watch", daemon=True).start()
    termination.die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logs.configure(**context, rank=os.environ["RANK"])
    logs.adopt_torch()
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # imported ahead for what it imports; runpy warns of what is there before it runs it
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:  # noqa: BLE001 - the last frame of a worker
        code = termination.report(error, rank=int(os.environ["RANK"]))
        frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
        places = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames]
        log.error("worker-failed", exception=type(error).__name__, places=places)  # noqa: TRY400 - without its text
        sys.exit(code)


def _die_with_agent() -> None:
    """A worker whose agent was killed must not train on. Its parent is the fork server, which outlives the agent."""
    agent = multiprocessing.parent_process()
    assert agent is not None
    multiprocessing.connection.wait([agent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
