"""`sonoforge serve`: the pages of the runs in a bucket or folder, read-only, over HTTP.

`GET /` lists the runs, `GET /run/PATH` is the page of one (its path below the URI, percent-encoded, slashes too),
`GET /compare?run=PATH&run=PATH` is one page of several, and `GET /healthz` needs no token. Nothing is ever written, and
a path is looked up in the listing, never joined to a URI.
"""

from __future__ import annotations

import ipaddress
import signal
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import click
import structlog

from sonoforge_trainer.contract import ContractError
from sonoforge_trainer.http_server import READ_SECONDS, BoundedServer, admits, read_token
from sonoforge_trainer.report.pages import Page, Pages
from sonoforge_trainer.report.templates import content_policy
from sonoforge_trainer.storage import Storage, StorageError

_SIGNAL_SECONDS = 0.5
_RUN, _COMPARE = "/run/", "/compare"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ReadingRoom(BoundedServer):
    """The HTTP server. `token_file` is read for every request, so that a token can be changed while this runs."""

    def __init__(self, address: tuple[str, int], pages: Pages, token_file: Path | None = None) -> None:
        super().__init__(address, _Visitor)
        self.pages = pages
        self.policy = f"{content_policy()}; frame-ancestors 'none'"
        self.token_file = token_file
        self._loopback = is_loopback(address[0])

    def knows(self, host: str | None) -> bool:
        """Whether a request names this server. On the loopback a foreign name is a page that was led here by DNS."""
        try:
            name = urlsplit(f"//{host or ''}").hostname or ""
        except ValueError:
            return False
        return not self._loopback or is_loopback(name)


class _Visitor(BaseHTTPRequestHandler):
    server: ReadingRoom
    server_version = "sonoforge"
    sys_version = ""
    timeout = READ_SECONDS

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if not self.server.knows(self.headers.get("Host")):
            self._say(HTTPStatus.MISDIRECTED_REQUEST, "ask by the name of the loopback")
        elif path == "/healthz":
            self._say(HTTPStatus.OK, "ok")
        elif self.server.token_file and not admits(self.server.token_file, self.headers.get("Authorization")):
            self._say(HTTPStatus.UNAUTHORIZED, "send Authorization: Bearer TOKEN", ("WWW-Authenticate", "Bearer"))
        else:
            self._show(path, query)

    do_HEAD = do_GET  # noqa: N815 - the base class names it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # any other method, also one that nobody has thought of
            return lambda: self._say(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD", ("Allow", "GET, HEAD"))
        raise AttributeError(name)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        """Pages that are looked at are no news."""

    def _show(self, path: str, query: str) -> None:
        try:
            page = self._page(path, query)
        except (StorageError, ValueError) as error:  # what lies in a bucket is anybody's who may write there
            log.warning("serve.unreadable", reason=type(error).__name__)
            self._say(HTTPStatus.BAD_GATEWAY, "storage cannot be read, or holds what no page can be made from")
            return
        if page is None:
            self._say(HTTPStatus.NOT_FOUND, "there are / and the pages it links to")
            return
        etag = f'"{page.digest}"'
        if etag in (self.headers.get("If-None-Match") or ""):
            self._answer(HTTPStatus.NOT_MODIFIED, b"", ("ETag", etag))
        else:
            self._answer(HTTPStatus.OK, page.body, ("ETag", etag), ("Content-Type", "text/html; charset=utf-8"))

    def _page(self, path: str, query: str) -> Page | None:
        pages = self.server.pages
        if path == "/":
            return pages.index()
        if path == _COMPARE:
            return pages.runs([value for name, value in parse_qsl(query, keep_blank_values=True) if name == "run"])
        return pages.runs([unquote(path.removeprefix(_RUN))]) if path.startswith(_RUN) else None

    def _say(self, status: HTTPStatus, text: str, *headers: tuple[str, str]) -> None:
        self._answer(status, f"{text}\n".encode(), ("Content-Type", "text/plain; charset=utf-8"), *headers)

    def _answer(self, status: HTTPStatus, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (
            *headers,
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", self.server.policy),
            ("Cache-Control", "private, no-cache"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@click.command("serve", short_help="Show the runs of a bucket or folder in a browser.")
@click.argument("runs_uri")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8088, show_default=True, help="Port; 0 takes a free one.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="File with a bearer token that every request has to send. Without it anybody who reaches the port is let in.",
)
@click.option("--open-to-all", is_flag=True, help="Listen beyond the loopback without a token.")
@click.option("--no-images", is_flag=True, help="Leave out every picture: no pixel of the data leaves storage.")
def command(runs_uri: str, host: str, port: int, token_file: Path | None, open_to_all: bool, no_images: bool) -> None:
    """Serve the page of every run below RUNS_URI (s3://BUCKET/PREFIX, file:///FOLDER, or a folder), read-only.

    It listens on the loopback alone unless told otherwise, speaks plain HTTP, and knows no users: put a proxy with TLS
    and a login before it, or use an SSH tunnel. The pages show images of the data sets; --no-images leaves them out.

    Example: sonoforge serve s3://bucket/runs
    """
    from sonoforge_trainer import logs

    logs.configure(part="serve")
    if not is_loopback(host) and token_file is None and not open_to_all:
        raise ContractError(
            f"--host: found {host}, where others can reach it. Allowed without --token-file: the loopback. Give a "
            "token file, or --open-to-all where something before this server asks who is there"
        )
    if token_file is not None:
        read_token(token_file)
    uri = runs_uri if "://" in runs_uri else Path(runs_uri).resolve().as_uri()
    storage = Storage.from_env()
    try:
        pages = Pages(uri, storage, images=not no_images)
        pages.index()
        room = ReadingRoom((host, port), pages, token_file)
    except StorageError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    threading.Thread(target=room.serve_forever, name="http", daemon=True).start()
    click.echo(f"http://{f'[{host}]' if ':' in host else host}:{room.server_port}/")
    while not ended.wait(_SIGNAL_SECONDS):  # a signal that another thread receives does not wake a wait without end
        pass
    room.shutdown()
    room.server_close()
