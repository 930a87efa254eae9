"""Credentials by web identity, against a token service on loopback whose credentials the real S3 server accepts."""

from __future__ import annotations

import configparser
import socketserver
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler

import pytest

from sonoforge_trainer.storage import CredentialsError, Storage, StorageSettings

ROLE = "arn:aws:iam::123456789012:role/pretraining"
ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{access}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>
<SessionToken>{session}</SessionToken><Expiration>{expires}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""
REFUSAL = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>InvalidIdentityToken</Code><Message>token PLANTED-TOKEN is not one of ours</Message></Error></ErrorResponse>"""


@dataclass
class TokenService:
    """AWS STS as far as a web identity needs it: a known token is exchanged for the S3 server's own key."""

    access: str
    secret: str
    tokens: set[str] = field(default_factory=lambda: {"first"})
    """Tokens that it takes."""
    lifetime: timedelta = timedelta(hours=1)
    """Of the credentials it gives."""
    asked: list[dict[str, str]] = field(default_factory=list)
    """Parameters of each request."""
    endpoint: str = ""

    def answer(self, parameters: dict[str, str]) -> tuple[int, str]:
        """Status and body for a request."""
        self.asked.append(parameters)
        if parameters["WebIdentityToken"] not in self.tokens:
            return 400, REFUSAL
        expires = (datetime.now(UTC) + self.lifetime).strftime("%Y-%m-%dT%H:%M:%SZ")
        return 200, ANSWER.format(access=self.access, secret=self.secret, session="", expires=expires)


@pytest.fixture
def service(s3, tmp_path, monkeypatch) -> Iterator[TokenService]:
    """A token service, and an environment with a web identity as its only credentials."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(s3.server.credentials_file)
    service = TokenService(parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            status, text = service.answer(dict(urllib.parse.parse_qsl(body)))
            self.send_response(status)
            self.send_header("Content-Type", "text/xml")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        service.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        (tmp_path / "token").write_text("first")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", service.endpoint)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
        monkeypatch.setenv("AWS_ROLE_SESSION_NAME", "worker-0")
        yield service
        server.shutdown()


def test_a_web_identity_is_exchanged_once_for_credentials_that_the_server_accepts(service, s3):
    storage = Storage(StorageSettings(endpoint=s3.server.endpoint))
    storage.write(f"{s3.uri}/x", b"data")
    assert storage.read(f"{s3.uri}/x") == b"data"
    assert [info.uri for info in storage.list(f"{s3.uri}/")] == [f"{s3.uri}/x"]
    (asked,) = service.asked
    assert asked["Action"] == "AssumeRoleWithWebIdentity"
    assert (asked["RoleArn"], asked["WebIdentityToken"], asked["RoleSessionName"]) == (ROLE, "first", "worker-0")


def test_credentials_that_are_about_to_expire_are_fetched_again_with_the_token_of_that_time(service, s3, tmp_path):
    """A cluster replaces the token file long before the token expires."""
    service.lifetime = timedelta(minutes=5)  # botocore asks again ten minutes before the end
    storage = Storage(StorageSettings(endpoint=s3.server.endpoint))
    storage.write(f"{s3.uri}/x", b"data")
    service.tokens = {"second"}
    (tmp_path / "token").write_text("second")
    service.asked.clear()
    assert storage.read(f"{s3.uri}/x") == b"data"
    assert {asked["WebIdentityToken"] for asked in service.asked} == {"second"}


def test_a_token_that_is_refused_is_an_error_of_credentials_that_does_not_show_it(service, s3, tmp_path):
    (tmp_path / "token").write_text("PLANTED-TOKEN")
    storage = Storage(StorageSettings(endpoint=s3.server.endpoint))
    with pytest.raises(CredentialsError, match=rf"{s3.uri}/x: stat was refused by .*InvalidIdentityToken") as caught:
        storage.stat(f"{s3.uri}/x")
    assert "PLANTED" not in str(caught.value)
    assert not caught.value.retryable


def test_a_token_file_that_is_missing_is_named(service, s3, tmp_path):
    (tmp_path / "token").unlink()
    storage = Storage(StorageSettings(endpoint=s3.server.endpoint))
    with pytest.raises(CredentialsError, match=f"cannot be read: {tmp_path}/token"):
        storage.stat(f"{s3.uri}/x")
    assert service.asked == []
