"""`sonoforge coordinator`: the rendezvous store, and the door through which an operator sees and steers a run.

`GET /progress` is the newest `contract.Progress`, `POST /request` takes a `contract.Request`, and `GET /healthz` is
the only path that needs no token. State lives in the store alone: a coordinator that dies is replaced by an empty one,
and the agents and rank 0 fill it again.

The store itself has no password. It must be reachable from the nodes of this run alone (a NetworkPolicy); what comes
out of it is parsed strictly and never unpickled.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import uuid
from collections import deque
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import structlog

from sonoforge_trainer.contract import ContractError, Progress, Request
from sonoforge_trainer.http_server import READ_SECONDS, BoundedServer, admits, read_token

if TYPE_CHECKING:
    from sonoforge_trainer.store_link import StoreLink

MAX_BODY_BYTES = 16 * 1024
"""A request is a few dozen bytes."""

_SIGNAL_SECONDS = 0.5
_REQUESTS_KEPT = 64
_IDENTITIES_KEPT = 4096

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Desk:
    """What the coordinator does, apart from HTTP. Safe to use from several threads."""

    def __init__(self, link: StoreLink) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._known: deque[str] = deque(maxlen=_IDENTITIES_KEPT)

    def progress(self) -> Progress:
        """The newest progress; activity Waiting before there is one.

        Raises ContractError where the store holds something else, StoreUnavailableError where it does not answer.
        """
        from sonoforge_trainer.store_link import PROGRESS_KEY

        raw = self._link.get(PROGRESS_KEY)
        return Progress.from_json(raw, show_values=False) if raw else Progress()

    def accept(self, request: Request) -> dict[str, Any]:
        """Pass a request on. The answer has its `id`, and whether it was `accepted` (False: seen before).

        Raises ContractError where the request makes no sense, StoreUnavailableError and RendezvousStateError where
        the store does not take it; it may then be sent again.
        """
        from sonoforge_trainer.coordinator_client import read_requests
        from sonoforge_trainer.membership import drop_address
        from sonoforge_trainer.store_link import REQUESTS_KEY

        if request.kind == "lost" and not request.node:
            raise ContractError("request.node: required for `lost`: the address the agent was started with")
        request = request if request.id else request.model_copy(update={"id": uuid.uuid4().hex})
        with self._lock:
            if request.id in self._known:
                return {"id": request.id, "accepted": False}
            answer: dict[str, Any] = {"id": request.id, "accepted": True}
            if request.kind == "lost":
                answer["nodes"] = drop_address(self._link, request.node)
            else:
                kept = [*read_requests(self._link), request][-_REQUESTS_KEPT:]
                self._link.set(REQUESTS_KEY, json.dumps([entry.document() for entry in kept]))
            self._known.append(request.id)
        log.info("request", kind=request.kind, id=request.id, **{k: v for k, v in answer.items() if k == "nodes"})
        return answer


class Door(BoundedServer):
    """The HTTP server. `token_file` is read for every request, so that a token can be changed while this runs."""

    def __init__(self, address: tuple[str, int], desk: Desk, token_file: Path) -> None:
        super().__init__(address, _Visitor)
        self.desk = desk
        self.token_file = token_file


class _Visitor(BaseHTTPRequestHandler):
    server: Door
    server_version = "sonoforge-coordinator"
    sys_version = ""
    timeout = READ_SECONDS

    def do_GET(self) -> None:
        from sonoforge_trainer.store_link import StoreUnavailableError

        if self.path == "/healthz":
            self._answer(HTTPStatus.OK, {"status": "ok"})
        elif not self._admitted():
            return
        elif self.path == "/progress":
            try:
                self._answer(HTTPStatus.OK, self.server.desk.progress().document())
            except StoreUnavailableError:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the store does not answer; ask again"})
            except ContractError:
                self._answer(HTTPStatus.BAD_GATEWAY, {"error": "the store holds no readable progress"})
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"error": "there are /progress, /request and /healthz"})

    def do_POST(self) -> None:
        from torch.distributed.elastic.rendezvous import RendezvousStateError

        from sonoforge_trainer.store_link import StoreUnavailableError

        if not self._admitted():
            return
        if self.path != "/request":
            self._answer(HTTPStatus.NOT_FOUND, {"error": "post to /request"})
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            self._answer(HTTPStatus.LENGTH_REQUIRED, {"error": "give Content-Length"})
            return
        if not 0 <= length <= MAX_BODY_BYTES:
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"at most {MAX_BODY_BYTES} bytes"})
            return
        try:
            request = Request.from_json(self.rfile.read(length), where="request")
            self._answer(HTTPStatus.ACCEPTED, self.server.desk.accept(request))
        except ContractError as error:
            self._answer(HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)})
        except (StoreUnavailableError, RendezvousStateError):
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the store does not take it now; send it again"})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        """Requests that matter are logged where they are carried out."""

    def _admitted(self) -> bool:
        if admits(self.server.token_file, self.headers.get("Authorization")):
            return True
        self._answer(HTTPStatus.UNAUTHORIZED, {"error": "send Authorization: Bearer TOKEN"})
        return False

    def _answer(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(body)


@click.command("coordinator")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--store-port", default=29400, show_default=True, help="Port of the store; 0 takes a free one.")
@click.option("--http-port", default=8080, show_default=True, help="Port of HTTP; 0 takes a free one.")
@click.option(
    "--token-file",
    envvar="SONOFORGE_TOKEN_FILE",
    required=True,
    type=click.Path(path_type=Path),
    help="File with the bearer token, or with sha256:DIGEST of it.",
)
@click.option(
    "--address-file",
    type=click.Path(path_type=Path),
    help='Write {"store": "HOST:PORT", "http": "http://HOST:PORT"} here once both answer.',
)
def command(host: str, store_port: int, http_port: int, token_file: Path, address_file: Path | None) -> None:
    """Host a run's rendezvous store, show its progress and take requests, until SIGTERM."""
    from sonoforge_trainer import logs

    logs.configure(part="coordinator")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a client that hangs up is no news
    read_token(token_file)

    from sonoforge_trainer.store_link import StoreLink, serve_store

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        store = serve_store(host, store_port)
        door = Door((host, http_port), Desk(StoreLink(host, store.port)), token_file)
    except OSError as error:
        raise click.ClickException(
            f"cannot listen on {host}: {error.strerror}; is another coordinator there?"
        ) from None
    threading.Thread(target=door.serve_forever, name="http", daemon=True).start()
    addresses = {"store": _joined(host, store.port), "http": f"http://{_joined(host, door.server_port)}"}
    if address_file:
        _write_atomically(address_file, json.dumps(addresses))
    click.echo(json.dumps(addresses))
    while not ended.wait(_SIGNAL_SECONDS):  # a signal that another thread receives does not wake a wait without end
        pass
    door.shutdown()
    door.server_close()


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _write_atomically(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
