"""The coordinators of played runs: real programs, and one address for all of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sonoforge_trainer.contract import Progress
from sonoforge_trainer.coordinator_client import ProgressPublisher
from sonoforge_trainer.store_link import PROGRESS_KEY, StoreLink, parse_endpoint


class Coordinator:
    """The real `sonoforge coordinator` of a job, started with what its pod would be started with."""

    def __init__(self, folder: Path, token: str, job: str) -> None:
        self.job = job
        """Name of the PretrainJob."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "token").write_text(token)
        self.token_file = folder / "token"
        self._addresses = folder / "addresses.json"
        self._addresses.unlink(missing_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SONOFORGE_")}
        kept |= {"OMP_NUM_THREADS": "1"}
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        command = ["coordinator", "--host=127.0.0.1", "--store-port=0", "--http-port=0"]
        with (folder / "coordinator.log").open("ab") as out:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sonoforge_trainer", *command),
                    *(f"--token-file={self.token_file}", f"--address-file={self._addresses}"),
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=kept,
            )
        self._publisher: ProgressPublisher | None = None
        self._link: StoreLink | None = None

    @property
    def addresses(self) -> dict[str, str] | None:
        """Where it listens; None before it does."""
        if not self._addresses.exists():
            return None
        found: dict[str, str] = json.loads(self._addresses.read_text())
        return found

    @property
    def publisher(self) -> ProgressPublisher | None:
        """Rank 0's connection; None before the coordinator listens."""
        if self._publisher is None and self.addresses:
            self._publisher = ProgressPublisher(self.addresses["store"], interval_seconds=0.2)
        return self._publisher

    def heard(self, step: int) -> bool:
        """Whether the coordinator holds a report of this step, for whoever asks it now."""
        if self._link is None and self.addresses:
            self._link = StoreLink(*parse_endpoint(self.addresses["store"]))
        said = self._link.get(PROGRESS_KEY) if self._link else b""
        return bool(said) and Progress.from_json(said).step >= step

    def take_token(self, token: str) -> None:
        """Change the file of the token as a mounted ConfigMap changes: whoever reads it reads the old or the new."""
        if self.token_file.read_text() != token:
            fresh = self.token_file.with_suffix(".new")
            fresh.write_text(token)
            fresh.replace(self.token_file)

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        if self._publisher is not None:
            threading.Thread(target=self._publisher.close, daemon=True).start()
            self._publisher = None


class Switchboard:
    """One address for all coordinators: http://HOST:PORT/NAMESPACE/SERVICE is passed on to the real one."""

    def __init__(self) -> None:
        self.targets: dict[str, str] = {}
        board = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                board._pass(self, None)

            def do_POST(self) -> None:
                board._pass(self, self.rfile.read(int(self.headers.get("Content-Length", "0"))))

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/{{namespace}}/{{service}}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def _pass(self, visitor: BaseHTTPRequestHandler, body: bytes | None) -> None:
        _, namespace, service, rest = visitor.path.split("/", 3)
        target = self.targets.get(f"{namespace}/{service}")
        status, answer = 503, b"{}"
        if target:
            headers = {"Authorization": visitor.headers.get("Authorization", ""), "Content-Type": "application/json"}
            request = urllib.request.Request(f"{target}/{rest}", data=body, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=5) as found:
                    status, answer = found.status, found.read()
            except urllib.error.HTTPError as error:
                status, answer = error.code, error.read()
            except OSError:
                status = 503
        with contextlib.suppress(OSError):
            visitor.send_response(status)
            visitor.send_header("Content-Length", str(len(answer)))
            visitor.end_headers()
            visitor.wfile.write(answer)
