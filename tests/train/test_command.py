"""The `sonoforge` command as a process among others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def test_visitors_that_hang_up_do_not_end_the_process_they_talk_to(tiny):
    """Writing to them must be an error, not SIGPIPE: the coordinator, an upload and the runner all live longer."""
    tiny.start_coordinator()
    host, port = tiny.http.removeprefix("http://").split(":")
    for _ in range(100):
        with socket.create_connection((host, int(port))) as visitor:
            visitor.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert tiny.ask("/progress")["activity"] == "Waiting"
    assert tiny.processes["coordinator"].poll() is None


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    """As `sonoforge --help | head -1` does."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as pipe:  # noqa: PTH123 - a file descriptor has no path
        command = [sys.executable, "-m", "sonoforge_trainer", "--help"]
        result = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False, timeout=60)
    assert b"Traceback" not in result.stderr
    assert result.returncode == 1
