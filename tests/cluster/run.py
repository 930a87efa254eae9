"""`make cluster`: a control plane with played nodes for a person to try things on, until Ctrl-C or cluster-stop."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import threading

import psutil
from binaries import ROOT, BuildError, build
from components import wait_for
from control_plane import ControlPlane
from kwok import Kwok

STATE = ROOT / ".cache" / "cluster"
PID = STATE / "pid"


def main() -> None:
    """Start or stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["start", "stop"])
    parser.add_argument("--nodes", type=int, default=3, help="how many nodes are played, each with 4 GPUs")
    options = parser.parse_args()
    if options.command == "stop":
        stop()
    else:
        start(options.nodes)


def start(nodes: int) -> None:
    """Run until a signal, and leave nothing behind."""
    if running():
        sys.exit("a cluster is running already; `make cluster-stop` ends it")
    try:
        programs, kwok_programs = build()
    except BuildError as error:
        sys.exit(f"the test cluster cannot be built: {error}")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    shutil.rmtree(STATE, ignore_errors=True)
    STATE.mkdir(parents=True)
    PID.write_text(f"{os.getpid()} {psutil.Process().create_time()}")
    try:
        with ControlPlane(programs, STATE) as plane, Kwok(kwok_programs / "kwok", plane) as kwok:
            kwok.add_nodes(nodes)
            print(f"export KUBECONFIG={shlex.quote(str(plane.kubeconfig))}")
            print(f"export PATH={shlex.quote(str(programs))}:$PATH")
            print(f"# {nodes} played nodes; logs are in {STATE.relative_to(ROOT)}/; Ctrl-C ends it", flush=True)
            while not ended.wait(1.0):
                for component in (*plane.components.values(), kwok.component):
                    if not component.running:
                        sys.exit(f"{component.program.name} ended: {component.log_end()}")
    finally:
        shutil.rmtree(STATE)


def stop() -> None:
    """Ask the one that runs to end, and wait until it has."""
    process = running()
    if process is None:
        print("no cluster is running")
        return
    process.terminate()
    wait_for(lambda: not process.is_running(), "the cluster ended", 60)


def running() -> psutil.Process | None:
    """The cluster of this checkout; a process that only has the same id is none."""
    try:
        pid, created = PID.read_text().split()
        process = psutil.Process(int(pid))
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    return process if process.create_time() == float(created) else None


if __name__ == "__main__":
    main()
