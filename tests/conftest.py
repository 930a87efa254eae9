"""A real S3 server, and a byte-exact fault proxy in front of it, for every area's tests.

The proxy is ours rather than microburst: a test here says at which byte of which answer a connection is cut, reset,
silenced or changed, and then looks at what the client asked for next; a rule file for another process cannot.
"""

from __future__ import annotations

import re
import socket
import socketserver
import ssl
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from sonoforge_trainer.storage import Storage, StorageSettings
from sonoforge_trainer.storage.server import BUCKET, S3Server

_OTHERS = ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

# Small ranges and parts, short waits: faults are met in milliseconds, with the budget of a real run in attempts.
FAST = StorageSettings(
    range_bytes=256 * 1024,
    multipart_bytes=6 * 2**20,
    part_bytes=5 * 2**20,
    stall_seconds=1.0,
    retry_seconds=30.0,
    retry_first_delay_seconds=0.01,
    retry_max_delay_seconds=0.25,
)


@dataclass(frozen=True)
class S3:
    """A place of one test on the real server."""

    uri: str
    """An empty prefix, without a slash at its end."""
    storage: Storage
    env: dict[str, str]
    """What a child process needs; the test's own environment has it already."""
    server: S3Server


class _ByFile(LoadScopeScheduling):
    """Each file to one process, and all of the cluster to the same: they wait a lot, and share a control plane."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tests/cluster" if file.startswith("tests/cluster/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """How processes share the tests where there are several."""
    return _ByFile(config, log)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The session's SeaweedFS, started by the first test that asks."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: S3Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """A prefix of its own for each test: a bucket takes seven of SeaweedFS's volumes."""
    for name in _OTHERS:
        monkeypatch.delenv(name, raising=False)
    env = {**s3_server.environment(), "AWS_CONFIG_FILE": str(tmp_path / "no-aws-config")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    place = re.sub(r"[^A-Za-z0-9-]+", "-", request.node.name)[:60]
    return S3(f"s3://{BUCKET}/{place}-{uuid.uuid4().hex}", Storage(FAST), env, s3_server)


@dataclass
class Request:
    """One request as the proxy saw it."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte asked for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class Fault:
    """What to do with one answer. Offsets count the bytes of its body."""

    status: tuple[int, str] | None = None
    """Answer with this status and S3 code instead of asking the server."""
    cut: int | None = None
    """Close the connection after so many bytes."""
    reset: bool = False
    """Make the closing a TCP reset."""
    flip: int | None = None
    """Change the byte at this offset."""
    stall: int | None = None
    """Send so many bytes and then nothing, until the client goes."""
    lose_answer: bool = False
    """Let the server do it, then close without an answer."""


Rule = Callable[[Request], Fault | None]


@dataclass
class FaultProxy:
    """A loopback proxy that passes bytes on unchanged (signatures stay valid) but for the faults its rule names."""

    upstream: str
    """host:port of the server; read at every connection."""
    rule: Rule = lambda _: None
    requests: list[Request] = field(default_factory=list)
    faults: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    endpoint: str = ""

    def once(self, *faults: Fault, method: str = "GET") -> None:
        """Use each fault for one request of the method, then none."""
        left = list(faults)
        self.rule = lambda request: left.pop(0) if left and request.method == method else None

    def serve(self, client: socket.socket) -> None:
        """Carry the requests of one connection until either side ends it."""
        with client, client.makefile("rb") as reader:
            while True:
                head = _read_head(reader)
                if not head:
                    return
                request = _parse(head)
                if "100-continue" in request.headers.get("expect", ""):
                    client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.body = reader.read(int(request.headers.get("content-length", "0")))
                with self.lock:
                    self.requests.append(request)
                    fault = self.rule(request)
                    self.faults += fault is not None
                if not self._answer(client, reader, request, head + request.body, fault):
                    return

    def _answer(self, client, reader, request: Request, message: bytes, fault: Fault | None) -> bool:
        if fault and fault.status:
            number, code = fault.status
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
            if request.method == "HEAD":
                text = b""
            client.sendall(f"HTTP/1.1 {number} Fault\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
            return True
        host, _, port = self.upstream.rpartition(":")
        try:
            with socket.create_connection((host, int(port))) as server, server.makefile("rb") as answers:
                server.sendall(message)
                answer = _read_head(answers)
                while answer.startswith(b"HTTP/1.1 100"):
                    answer = _read_head(answers)
                headers = _parse(answer).headers
                no_body = request.method == "HEAD" or b" 204 " in answer.split(b"\r\n")[0]
                body = b""
                if not no_body and headers.get("transfer-encoding") == "chunked":
                    body = _read_chunks(answers)
                elif not no_body:
                    body = answers.read(int(headers.get("content-length", "0")))
        except OSError:
            return False
        if not answer:
            return False
        return self._deliver(client, reader, answer, body, fault or Fault())

    def _deliver(self, client, reader, head: bytes, body: bytes, fault: Fault) -> bool:
        if fault.lose_answer:
            return False
        if fault.flip is not None and fault.flip < len(body):
            body = body[: fault.flip] + bytes([body[fault.flip] ^ 0xFF]) + body[fault.flip + 1 :]
        limit = min((x for x in (fault.cut, fault.stall) if x is not None), default=None)
        client.sendall(head + (body if limit is None else body[:limit]))
        if fault.stall is not None:
            reader.read(1)  # returns when the client gives up and closes
        if fault.reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return limit is None


def _read_head(reader) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = reader.readline()
        if not line:
            return b""
        head += line
    return head


def _read_chunks(reader) -> bytes:
    raw = b""
    while True:
        line = reader.readline()
        size = int(line, 16)
        raw += line + reader.read(size + 2)
        if size == 0:
            return raw


def _parse(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, target = first.split(" ")[:2]
    pairs = (line.partition(":") for line in lines)
    return Request(method, target, {name.lower(): value.strip() for name, _, value in pairs})


@pytest.fixture
def proxy_fault() -> type[Fault]:
    """Makes one fault of the proxy: `proxy_fault(cut=1000)`."""
    return Fault


@pytest.fixture
def start_proxy() -> Iterator[Callable[..., FaultProxy]]:
    """Start fault proxies: `start_proxy(server.endpoint)`, or with `tls=context` for https."""
    servers = []

    def start(endpoint: str, tls: ssl.SSLContext | None = None) -> FaultProxy:
        proxy = FaultProxy(endpoint.removeprefix("http://"))

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    connection = tls.wrap_socket(self.request, server_side=True) if tls else self.request
                    proxy.serve(connection)
                except OSError:
                    pass  # the client went, which is what many of the tests make it do

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 64

        server = Server(("127.0.0.1", 0), Handler)
        proxy.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return proxy

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def proxy(s3: S3, start_proxy: Callable[..., FaultProxy]) -> FaultProxy:
    """A fault proxy before the session's server."""
    return start_proxy(s3.server.endpoint)
