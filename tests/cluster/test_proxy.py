"""The operator with an API server that only a proxy of the environment reaches."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from socketserver import StreamRequestHandler, ThreadingTCPServer
from urllib.parse import urlsplit

import pytest
import yaml
from operators import OperatorProcess, grant, own_namespace
from sites import job

HOST = "kubernetes.default.svc"
"""A name in the certificate of the API server that nobody here resolves."""


class Tunnel(StreamRequestHandler):
    """One tunnel of an HTTP proxy, to the loopback whatever host is asked for."""

    def handle(self) -> None:
        method, target, _ = self.rfile.readline().decode().split()
        while self.rfile.readline().strip():
            pass
        self.server.asked.append((method, target))
        with socket.create_connection(("127.0.0.1", int(target.rpartition(":")[2]))) as upstream:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_copy, args=(upstream, self.connection), daemon=True)
            back.start()
            _copy(self.connection, upstream)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy until one side ends, then end the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class Proxy(ThreadingTCPServer):
    """A proxy that remembers what it was asked."""

    daemon_threads, block_on_close = True, False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.asked: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as made:
        yield made
        made.shutdown()


def test_watches_and_writes_go_through_the_proxy_of_the_environment(control_plane, nodes, proxy, tmp_path):
    """One of the two clients once went around it: then a job was seen and never written, or the other way round."""
    port = urlsplit(control_plane.url).port
    with own_namespace(control_plane, "proxy") as namespace:
        document = yaml.safe_load(grant(control_plane, namespace).read_text())
        document["clusters"][0]["cluster"]["server"] = f"https://{HOST}:{port}"
        behind = tmp_path / "behind.kubeconfig"
        behind.write_text(yaml.safe_dump(document))
        operator = OperatorProcess(behind, namespace, tmp_path, "http://127.0.0.1:9/{namespace}/{service}")
        operator.start(HTTPS_PROXY=proxy.url, NO_PROXY="127.0.0.1")
        try:
            operator.wait_until_ready()
            manifest = job("seen", runtimeRef={"name": "missing"})
            control_plane.kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=yaml.safe_dump(manifest))
            operator.wait_for(
                lambda: "phase" in control_plane.get("pj", "seen", f"--namespace={namespace}").get("status", {}),
                "the status of a job that was made after the start",
            )
        finally:
            operator.kill()
        assert set(proxy.asked) == {("CONNECT", f"{HOST}:{port}")}
