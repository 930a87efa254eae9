"""s3:// by boto3: parallel ranged reads that resume inside an object, and writes that tell one winner."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog
from botocore.exceptions import ClientError, IncompleteReadError

from sonoforge_trainer.storage.connections import Connections
from sonoforge_trainer.storage.errors import (
    CredentialsError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
)
from sonoforge_trainer.storage.faults import FAILURES, PRECONDITION, Action, code_of, explain
from sonoforge_trainer.storage.objects import ObjectInfo, Pin, parse_s3
from sonoforge_trainer.storage.retry import Clock, RetrySeries
from sonoforge_trainer.storage.settings import StorageSettings

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

_SLICE_BYTES = (
    256 * 1024
)  # what one readinto asks for: urllib3 makes a copy of it, so it should stay in the CPU's cache
_PROGRESS_BYTES = 64 * 1024  # fewer bytes than this do not begin a new retry series, so a range ends
_MAX_PARTS = 10_000
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_WRITER = "sonoforge-writer"  # metadata that says whose write an object is, where an answer was lost


@dataclass
class _Range:
    """A piece of a read: what of the buffer is filled."""

    buffer: memoryview
    offset: int
    done: int = 0


class S3Backend:
    """Everything that needs the network. One instance belongs to one process."""

    def __init__(self, settings: StorageSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._connections = Connections(settings)
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="storage")
        self._conditional: dict[str, bool] = {}
        self._probe = threading.Lock()

    # Reading

    def stat(self, uri: str) -> ObjectInfo:
        """See Storage.stat."""
        bucket, key = parse_s3(uri)

        def attempt(client: Any, _: RetrySeries) -> ObjectInfo:
            try:
                answer = client.head_object(Bucket=bucket, Key=key)
                size = int(answer["ContentLength"])
            except ClientError as error:
                if not code_of(error).isdigit() or int(code_of(error)) >= 500:
                    raise
                # HEAD has no body to say what is wrong; a GET of one byte has, or it just works.
                answer = client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")
                answer["Body"].close()
                size = int(answer["ContentRange"].rpartition("/")[2])
            return ObjectInfo(uri=uri, size=size, etag=_etag(answer), modified=_modified(answer))

        return self._run(uri, "stat", attempt)

    def fill(self, uri: str, buffer: memoryview, offset: int, pin: Pin) -> None:
        """See Backend.fill."""
        length = len(buffer)
        if length == 0 or length > self._settings.range_bytes:
            # Ranges run side by side, so all must know beforehand which version they are about.
            info = self.stat(uri)
            pin.check(uri, size=info.size, etag=info.etag)
        step = self._settings.range_bytes
        ranges = [_Range(buffer[start : start + step], offset + start) for start in range(0, length, step)]
        stop = threading.Event()
        if len(ranges) == 1:
            self._fill_range(uri, ranges[0], pin, stop)
        elif ranges:
            self._all([partial(self._fill_range, uri, part, pin, stop) for part in ranges], stop)

    def _fill_range(self, uri: str, part: _Range, pin: Pin, stop: threading.Event) -> None:
        bucket, key = parse_s3(uri)

        def attempt(client: Any, series: RetrySeries) -> None:
            start = part.offset + part.done
            arguments = {"Range": f"bytes={start}-{part.offset + len(part.buffer) - 1}"}
            if pin.etag:
                arguments["IfMatch"] = f'"{pin.etag}"'
            answer = client.get_object(Bucket=bucket, Key=key, **arguments)
            with closing(answer["Body"]) as body:
                pin.check(uri, size=_total(uri, answer, start), etag=_etag(answer))
                reported = part.done
                while part.done < len(part.buffer) and not stop.is_set():
                    count = body.readinto(part.buffer[part.done : part.done + _SLICE_BYTES])
                    if count == 0:
                        raise IncompleteReadError(actual_bytes=part.done, expected_bytes=len(part.buffer))
                    part.done += count
                    if part.done - reported >= _PROGRESS_BYTES:
                        reported = part.done
                        series.progressed()

        if not stop.is_set():
            self._run(uri, "read", attempt, stop)

    # Writing

    def write(self, uri: str, data: memoryview, *, if_absent: bool) -> ObjectInfo:
        """See Storage.write."""
        bucket, key = parse_s3(uri)
        conditional = if_absent and self.conditional_put(uri.rpartition("/")[0])
        if if_absent and (not conditional or len(data) >= self._settings.multipart_bytes):
            # All that a server without conditional writes allows; and it saves sending an object that cannot win.
            self._require_absent(uri)
        if len(data) >= self._settings.multipart_bytes:
            return self._write_parts(uri, bucket, key, data, conditional=conditional)
        return self._put(uri, bucket, key, data, conditional=conditional)

    def _require_absent(self, uri: str) -> None:
        try:
            self.stat(uri)
        except ObjectNotFoundError:
            return
        raise ObjectExistsError(f"{uri}: the object is there already, so this write was not made")

    def _put(self, uri: str, bucket: str, key: str, data: memoryview, *, conditional: bool) -> ObjectInfo:
        body = bytes(data)
        writer = secrets.token_hex(16)
        arguments: dict[str, Any] = {"ContentMD5": _md5(body), "Metadata": {_WRITER: writer}}
        if conditional:
            arguments["IfNoneMatch"] = "*"

        def attempt(client: Any, series: RetrySeries) -> ObjectInfo:
            try:
                answer = client.put_object(Bucket=bucket, Key=key, Body=body, **arguments)
            except ClientError as error:
                if code_of(error) not in PRECONDITION or not series.failures:
                    raise
                # An earlier attempt may have arrived though its answer did not.
                answer = self._written_by(client, bucket, key, writer)
                if answer is None:
                    raise
            return ObjectInfo(uri=uri, size=len(body), etag=_etag(answer))

        return self._run(uri, "write", attempt)

    def _write_parts(self, uri: str, bucket: str, key: str, data: memoryview, *, conditional: bool) -> ObjectInfo:
        writer = secrets.token_hex(16)
        where = {"Bucket": bucket, "Key": key}
        step = max(self._settings.part_bytes, -(-len(data) // _MAX_PARTS))
        upload: str = self._run(
            uri,
            "write",
            lambda client, _: client.create_multipart_upload(**where, Metadata={_WRITER: writer})["UploadId"],
        )
        try:
            stop = threading.Event()

            def send(number: int, start: int) -> dict[str, Any]:
                body = bytes(data[start : start + step])
                arguments = {**where, "UploadId": upload, "PartNumber": number, "ContentMD5": _md5(body)}
                etag = self._run(
                    uri, "write", lambda client, _: client.upload_part(**arguments, Body=body)["ETag"], stop
                )
                return {"PartNumber": number, "ETag": etag}

            starts = range(0, len(data), step)
            parts = self._all([partial(send, number, start) for number, start in enumerate(starts, 1)], stop)

            def complete(client: Any, series: RetrySeries) -> None:
                try:
                    client.complete_multipart_upload(
                        **where,
                        UploadId=upload,
                        MultipartUpload={"Parts": parts},
                        **({"IfNoneMatch": "*"} if conditional else {}),
                    )
                except ClientError as error:
                    lost_answer = series.failures and code_of(error) in PRECONDITION | {"NoSuchUpload"}
                    if not lost_answer or self._written_by(client, bucket, key, writer) is None:
                        raise

            self._run(uri, "write", complete)
        except BaseException:
            self._abort(uri, upload)
            raise
        info = self.stat(uri)
        if info.size != len(data):
            raise IntegrityError(f"{uri}: the server kept {info.size} bytes of {len(data)} written. Write it again.")
        return info

    def _abort(self, uri: str, upload: str) -> None:
        bucket, key = parse_s3(uri)
        try:
            self._run(
                uri,
                "write",
                lambda client, _: client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload),
            )
        except StorageError as error:
            # The error that led here matters more; what stays are parts that a lifecycle rule removes.
            _log.warning("storage.abort_failed", uri=uri, error=str(error))

    @staticmethod
    def _written_by(client: Any, bucket: str, key: str, writer: str) -> dict[str, Any] | None:
        answer: dict[str, Any] = client.head_object(Bucket=bucket, Key=key)
        return answer if answer.get("Metadata", {}).get(_WRITER) == writer else None

    # Names

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        """See Storage.list; in any order."""
        bucket, below = parse_s3(prefix, prefix=True)
        found: list[ObjectInfo] = []
        token: dict[str, str] = {}
        while True:
            ask = partial(self._page, {"Bucket": bucket, "Prefix": below, **token})
            page = self._run(prefix, "list", ask)
            found.extend(
                ObjectInfo(
                    uri=f"s3://{bucket}/{entry['Key']}",
                    size=entry["Size"],
                    etag=_etag(entry),
                    modified=_modified(entry),
                )
                for entry in page.get("Contents", ())
                if not entry["Key"].endswith("/")  # a console's folder marker
            )
            if not page.get("IsTruncated"):
                return found
            token = {"ContinuationToken": page["NextContinuationToken"]}

    @staticmethod
    def _page(arguments: dict[str, str], client: Any, _: RetrySeries) -> dict[str, Any]:
        page: dict[str, Any] = client.list_objects_v2(**arguments)
        return page

    def delete(self, uri: str) -> None:
        """See Storage.delete."""
        bucket, key = parse_s3(uri)
        try:
            self._run(uri, "delete", lambda client, _: client.delete_object(Bucket=bucket, Key=key))
        except ObjectNotFoundError:
            return

    def conditional_put(self, prefix: str) -> bool:
        """Asked once for each bucket, since it is the server's property: two conditional writes of one new object."""
        bucket, below = parse_s3(prefix, prefix=True)
        with self._probe:
            if bucket not in self._conditional:
                key = f"{below}.sonoforge-probe-{secrets.token_hex(8)}"
                self._conditional[bucket] = self._probe_conditional(bucket, key)
            return self._conditional[bucket]

    def _probe_conditional(self, bucket: str, key: str) -> bool:
        uri = f"s3://{bucket}/{key}"
        written = 0
        try:
            for _ in range(2):
                self._put(uri, bucket, key, memoryview(b"probe"), conditional=True)
                written += 1
        except ObjectExistsError:
            honoured = written == 1
        except CredentialsError:
            raise
        except StorageError:
            # Either the server refuses the condition, or every write; only the first is an answer.
            self._put(uri, bucket, key, memoryview(b"probe"), conditional=False)
            honoured = False
        else:
            honoured = False
        self.delete(uri)
        if not honoured:
            _log.warning("storage.no_conditional_put", bucket=bucket, effect="exclusive writes are checked, not atomic")
        return honoured

    # Running requests

    def _all(self, tasks: Sequence[Callable[[], _T]], stop: threading.Event) -> Sequence[_T]:
        """Run all in the pool. After a failure the rest stops soon, and nothing runs any more when this returns."""
        futures: Sequence[Future[_T]] = [self._pool.submit(task) for task in tasks]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            # Those that fail after this only because they were stopped are not asked.
            for error in (future.exception() for future in futures if future in finished):
                if error:
                    raise error
            return [future.result() for future in futures]
        finally:
            stop.set()
            for future in futures:
                future.cancel()
            wait(futures)

    def _run(
        self,
        uri: str,
        action: Action,
        attempt: Callable[[Any, RetrySeries], _T],
        stop: threading.Event | None = None,
    ) -> _T:
        """The one retry loop: attempt, decide, wait, again."""
        series = RetrySeries(self._settings.retry, self._clock)
        stop = stop or threading.Event()
        renewed = False
        while True:
            connection = None
            try:
                connection = self._connections.current()
                result = attempt(connection.client, series)
            except FAILURES as failure:
                server = connection.server if connection else "the credentials provider"
                fault = explain(failure, uri=uri, action=action, server=server)
            else:
                if series.failures:
                    _log.info("storage.recovered", uri=uri, action=action, failures=series.failures)
                return result
            if fault.renew and connection:
                if connection.fixed:
                    raise fault.error
                self._connections.renew(connection)
                if not renewed:
                    renewed = True
                    continue
            if not fault.retry:
                raise fault.error
            delay = series.failed()
            if delay is None:
                raise type(fault.error)(f"{fault.error}; given up after {series.spent()}", retryable=True)
            if series.failures == 1:
                _log.warning("storage.retrying", uri=uri, action=action, reason=str(fault.error))
            if self._clock.wait(stop, delay):
                raise fault.error


def _etag(answer: dict[str, Any]) -> str:
    return str(answer.get("ETag", "")).removeprefix("W/").strip('"')


def _modified(answer: dict[str, Any]) -> float:
    when = answer.get("LastModified")
    return when.timestamp() if when is not None else 0.0


def _md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _total(uri: str, answer: dict[str, Any], start: int) -> int | None:
    """Size of the whole object by the answer to a ranged GET; None where the server does not say."""
    match = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
    if match:
        if int(match[1]) != start:
            raise StorageError(f"{uri}: the server sent another range than asked for; a proxy in between is at fault")
        return None if match[3] == "*" else int(match[3])
    if start:
        raise StorageError(f"{uri}: the server ignores Range; reading needs an S3 server that has ranged GET")
    return int(answer["ContentLength"])
