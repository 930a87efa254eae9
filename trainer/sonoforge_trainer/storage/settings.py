"""How storage is reached: the few settings that botocore has no variable for, and the budgets of a read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

from sonoforge_trainer.contract import ContractError
from sonoforge_trainer.storage.retry import RetryPolicy

Addressing = Literal["auto", "path", "virtual"]

_MIB = 2**20
_PREFIX = "SONOFORGE_S3_"


@dataclass(frozen=True)
class StorageSettings:
    """Settings of one Storage. Endpoint, region, credentials and proxies are botocore's own (AWS_ENDPOINT_URL_S3, ...).

    Every field but `endpoint` is read from the environment by `from_env`, as SONOFORGE_S3_ and the field's name in
    capitals, for example SONOFORGE_S3_ADDRESSING=path.
    """

    endpoint: str = ""
    """URL of the S3 server. Empty: what botocore finds in AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or its config file."""
    addressing: Addressing = "auto"
    """`path` (server/bucket/key), `virtual` (bucket.server/key), or `auto`: path wherever an endpoint is set."""
    range_bytes: int = 8 * _MIB
    """Length of one ranged GET. 8 to 16 MiB measured best."""
    threads: int = 8
    """Ranges, or parts of an upload, in flight in one process; also the size of the connection pool."""
    multipart_bytes: int = 64 * _MIB
    """Objects of at least this size are written in parts."""
    part_bytes: int = 16 * _MIB
    """Length of a part, at least 5 MiB by S3's rules; longer where an object would need more than 10,000 parts."""
    connect_seconds: float = 5.0
    """Time to open a connection."""
    stall_seconds: float = 20.0
    """Longest silence of a server, before its first byte or between two, until the request counts as failed."""
    retry_attempts: int = 20
    """Failures in a row until a request is given up."""
    retry_seconds: float = 120.0
    """Seconds from the first failure in a row until a request is given up."""
    retry_first_delay_seconds: float = 0.1
    """Wait after the first failure; it doubles with every further one."""
    retry_max_delay_seconds: float = 8.0
    """Longest wait between two attempts."""

    def __post_init__(self) -> None:
        if self.addressing not in get_args(Addressing):
            raise ContractError(f"addressing: found {self.addressing!r}. Allowed: one of auto, path, virtual")
        for name in ("range_bytes", "threads", "multipart_bytes", "retry_attempts"):
            self._require(name, least=1)
        self._require("part_bytes", least=5 * _MIB)
        for name in ("connect_seconds", "stall_seconds", "retry_seconds"):
            self._require(name, least=0.001)
        for name in ("retry_first_delay_seconds", "retry_max_delay_seconds"):
            self._require(name, least=0)

    def _require(self, name: str, *, least: float) -> None:
        value = getattr(self, name)
        if not value >= least:
            raise ContractError(f"{name}: found {value}. Allowed: {least} or more")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read SONOFORGE_S3_*; what is not set keeps its default. Raises ContractError naming the variable."""
        values: dict[str, str | int | float] = {}
        for field in fields(cls):
            name = _PREFIX + field.name.upper()
            text = environ.get(name, "")
            if not text or field.name == "endpoint":
                continue
            kind = next(kind for kind in (int, float, str) if isinstance(field.default, kind))
            try:
                values[field.name] = kind(text)
            except ValueError:
                raise ContractError(f"{name}: found {text!r}. Allowed: a number") from None
        try:
            return cls(**values)  # type: ignore[arg-type]  # each value was made by the type of its field's default
        except ContractError as error:
            raise ContractError(f"{_PREFIX}* in the environment: {error}") from None

    @property
    def retry(self) -> RetryPolicy:
        """The budget of one request."""
        return RetryPolicy(
            attempts=self.retry_attempts,
            seconds=self.retry_seconds,
            first_delay_seconds=self.retry_first_delay_seconds,
            max_delay_seconds=self.retry_max_delay_seconds,
        )
