"""Ends what a run of the nodes left behind, by what it wrote down: never by a broad name."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import rack
from components import wait_for

_NOTE = "processes"


def note_process(folder: Path, pid: int) -> None:
    """Write down a process of a run, with when it began: numbers are used again."""
    with (folder / _NOTE).open("a") as file, suppress(psutil.NoSuchProcess):
        file.write(f"{pid} {psutil.Process(pid).create_time()}\n")


def end_pods(folder: Path) -> None:
    """Kill every container whose shim has a socket below the folder, as a power cut does."""

    def gone() -> bool:
        shims = list(_shims(folder))
        for shim in shims:
            with suppress(psutil.NoSuchProcess):
                # The shim goes last: a container that lost it could not be found again.
                for process in shim.children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                shim.kill()
        return not shims

    wait_for(gone, f"containers of {folder.name} are gone")


def clear(folder: Path) -> None:
    """End the processes of a run, unmount what they mounted, and remove the folder and the network."""
    with suppress(FileNotFoundError):
        for line in (folder / _NOTE).read_text().splitlines():
            pid, began = line.split()
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(pid))
                if process.create_time() == float(began):
                    process.kill()
    end_pods(folder)
    for _ in range(2):  # one mount may lie on another
        for mount in sorted(_mounts(folder), reverse=True):
            subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)
    rack.unwire()
    _remove_links(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _shims(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["name", "cmdline"]):
        command = process.info["cmdline"] or []
        if process.info["name"].startswith("containerd-shim") and any(a.startswith(f"{folder}/") for a in command):
            yield process


def _mounts(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [point for point in (line.split()[4] for line in lines) if point.startswith(f"{folder}/")]


def _remove_links(folder: Path) -> None:
    """Remove the links that a kubelet makes for the logs of its containers, in a folder that cannot be chosen."""
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and str(link.readlink()).startswith(f"{folder}/"):
            link.unlink()
