"""S3 clients: made once in a process, configured for servers off AWS, and made anew when credentials change."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config

from sonoforge_trainer.storage.settings import StorageSettings

_AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")


@dataclass(frozen=True)
class Connection:
    """One client and what it was made from."""

    client: Any
    """A boto3 S3 client; safe to share between threads."""
    server: str
    """host:port, for messages."""
    fixed: bool
    """The credentials come from the environment, which cannot change in a running process."""
    sources: tuple[tuple[str, int, int, int], ...]
    """Path, inode, size and time of change of the files that credentials were read from."""


class Connections:
    """Gives the client of this process.

    botocore reads a shared credentials file once and never again, so the files are looked at before every request (one
    stat each; a rotated Kubernetes secret is a new inode) and the client is made anew when they changed. Web identity
    and container credentials refresh themselves.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def current(self) -> Connection:
        """The client to use now. Raises what botocore raises."""
        connection = self._connection
        if connection is not None and connection.sources == _sources():
            return connection
        with self._lock:
            if self._connection is None or self._connection.sources != _sources():
                self._connection = _connect(self._settings)
            return self._connection

    def renew(self, used: Connection) -> None:
        """Read credentials again at the next request, unless another thread saw to it since `used` was given out."""
        with self._lock:
            if self._connection is used:
                self._connection = None


def is_aws(endpoint: str) -> bool:
    """Whether a URL is one of AWS's own."""
    return (urlsplit(endpoint).hostname or "").endswith(_AWS_DOMAINS)


def _connect(settings: StorageSettings) -> Connection:
    # Taken before the files are read: a change in between is then seen at the next request.
    sources = _sources()
    core = botocore.session.Session()
    bundle = _ca_bundle()
    if bundle:
        # On the session rather than on the client, so that the STS client of web identity has it too.
        core.set_config_variable("ca_bundle", bundle)
    endpoint = settings.endpoint or None
    # An unsigned client looks for no credentials; it only tells where requests would go.
    unsigned = Config(signature_version=UNSIGNED)
    off_aws = not is_aws(
        core.create_client("s3", endpoint_url=endpoint, region_name=_region(core), config=unsigned).meta.endpoint_url
    )
    if off_aws and "AWS_EC2_METADATA_DISABLED" not in os.environ:
        # Off AWS there is no metadata service, and asking for it takes seconds.
        core.get_component("credential_provider").remove("iam-role")
    client = boto3.Session(botocore_session=core, region_name=_region(core)).client(
        "s3", endpoint_url=endpoint, config=_config(settings, off_aws=off_aws)
    )
    credentials = core.get_credentials()
    url = urlsplit(client.meta.endpoint_url)
    return Connection(
        client=client,
        server=f"{url.hostname}:{url.port}" if url.port else f"{url.hostname}",
        fixed=credentials is not None and credentials.method == "env",
        sources=sources,
    )


def _config(settings: StorageSettings, *, off_aws: bool) -> Config:
    addressing = settings.addressing
    if addressing == "auto" and off_aws:
        addressing = "path"
    # Newer default checksums break S3-compatible servers (botocore 3277); ours are sha256 and Content-MD5.
    checksums: dict[str, str] = (
        {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        if off_aws
        else {}
    )
    return Config(
        s3={"addressing_style": addressing},
        connect_timeout=settings.connect_seconds,
        read_timeout=settings.stall_seconds,
        max_pool_connections=settings.threads,
        tcp_keepalive=True,
        # botocore does not retry a body that has begun, so we retry everything in one place.
        retries={"mode": "standard", "total_max_attempts": 1},
        user_agent_extra="sonoforge",
        **checksums,
    )


def _region(core: botocore.session.Session) -> str:
    # Signatures need a region; the usual on-premises servers expect this one.
    return core.get_config_variable("region") or os.environ.get("AWS_REGION") or "us-east-1"


def _ca_bundle() -> str:
    """AWS_CA_BUNDLE, or SSL_CERT_FILE where only that is set: boto3 reads the first, most other clients the second."""
    return os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or ""


def _sources() -> tuple[tuple[str, int, int, int], ...]:
    found = []
    for variable, default in (
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        ("AWS_CONFIG_FILE", "~/.aws/config"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", ""),
    ):
        name = os.environ.get(variable) or default
        if not name:
            continue
        path = Path(name).expanduser()
        try:
            stat = path.stat()
        except OSError:
            found.append((str(path), 0, 0, 0))
        else:
            found.append((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
