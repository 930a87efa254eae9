"""What a failed S3 request means: one table from botocore's exceptions and S3's codes to ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import urllib3.exceptions
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    UnauthorizedSSOTokenError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from sonoforge_trainer.storage.errors import (
    CredentialsError,
    IntegrityError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
)

Action = Literal["stat", "read", "write", "list", "delete"]

FAILURES = (BotoCoreError, ClientError, urllib3.exceptions.HTTPError, OSError)
"""Everything that a boto3 call, or reading the body of its answer, raises for a request that failed."""

_PASSING = {
    "BadDigest",  # the body changed on its way to the server
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
    "XAmzContentSHA256Mismatch",  # the body changed on its way to the server
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_WRONG_KEY = {
    "AuthorizationHeaderMalformed",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidIdentityToken",
    "InvalidToken",
    "NotSignedUp",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
PRECONDITION = {"PreconditionFailed", "412"}
"""Codes of a condition (If-Match, If-None-Match) that did not hold."""
_NOT_IMPLEMENTED = {"NotImplemented", "501"}

_HOW_TO_GIVE = (
    "Give them as a file (AWS_SHARED_CREDENTIALS_FILE), by web identity (AWS_ROLE_ARN, AWS_WEB_IDENTITY_TOKEN_FILE) "
    "or in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)


@dataclass(frozen=True)
class Fault:
    """A failed request, decided."""

    error: StorageError
    """What to raise when it is not tried again."""
    retry: bool = False
    """Try again within the budget."""
    renew: bool = False
    """Read the credentials again first; once at once, even where `retry` is false."""


def code_of(error: ClientError) -> str:
    """S3's code, or the HTTP status as text where the answer had no body (HEAD)."""
    return str(error.response.get("Error", {}).get("Code", ""))


def explain(error: Exception, *, uri: str, action: Action, server: str) -> Fault:
    """Decide what a failure means. `server` is host:port, for messages. `error` is one of FAILURES."""
    if isinstance(error, ClientError):
        return _explain_answer(error, uri, action, server)
    name = type(error).__name__
    if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound | UnauthorizedSSOTokenError):
        return Fault(CredentialsError(f"{uri}: no complete credentials found ({name}). {_HOW_TO_GIVE}."))
    if isinstance(error, CredentialRetrievalError):
        text = f"{uri}: credentials could not be fetched ({name}); their provider did not answer"
        return Fault(CredentialsError(text, retryable=True), retry=True, renew=True)
    if isinstance(error, SSLError | urllib3.exceptions.SSLError) and "CERTIFICATE" in str(error).upper():
        text = f"{uri}: the certificate of {server} is not trusted; set AWS_CA_BUNDLE to a file with its CA"
        return Fault(StorageError(text))
    if isinstance(
        error,
        HTTPClientError | BotoConnectionError | IncompleteReadError | urllib3.exceptions.HTTPError | ConnectionError,
    ):
        return Fault(StorageError(f"{uri}: {action} failed at {server} ({name})", retryable=True), retry=True)
    if isinstance(error, OSError):
        text = f"{uri}: a file of the S3 client cannot be read: {error.filename}: {error.strerror}"
        return Fault(CredentialsError(text))
    return Fault(StorageError(f"{uri}: {action} is not possible as configured ({name}); check the AWS_* variables"))


def _explain_answer(error: ClientError, uri: str, action: Action, server: str) -> Fault:
    code = code_of(error)
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    what = f"{uri}: {action} was refused by {server} with {status} {code}"
    if code in _EXPIRED:
        return Fault(
            CredentialsError(f"{what}: the credentials have expired. {_HOW_TO_GIVE}.", retryable=True),
            retry=True,
            renew=True,
        )
    if code in _WRONG_KEY:
        return Fault(CredentialsError(f"{what}: the credentials are wrong. {_HOW_TO_GIVE}."), renew=True)
    if code in _PASSING or status == 429 or (status >= 500 and code not in _NOT_IMPLEMENTED):
        return Fault(StorageError(f"{what}, which passes as a rule", retryable=True), retry=True)
    if code in PRECONDITION:
        if action == "write":
            return Fault(ObjectExistsError(f"{uri}: the object is there already, so this write was not made"))
        return Fault(
            ObjectChangedError(
                f"{uri}: the object was replaced while it was read. Find out what rewrites it, and read again."
            )
        )
    if code in {"NoSuchKey", "404", "NotFound"}:
        return Fault(ObjectNotFoundError(f"{uri}: no such object"))
    if code == "NoSuchBucket":
        return Fault(StorageError(f"{uri}: there is no such bucket at {server}; create it, or correct the URI"))
    if code == "InvalidRange" or status == 416:
        return Fault(IntegrityError(f"{uri}: the object is shorter than expected. Restore or upload it again."))
    if code == "RequestTimeTooSkewed":
        return Fault(StorageError(f"{what}: set this machine's clock"))
    if status == 403:
        return Fault(StorageError(f"{what}: the credentials are valid but lack the right; extend their policy"))
    return Fault(StorageError(what))
