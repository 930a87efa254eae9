"""Faults between us and a real S3 server: nothing lost, nothing silently changed, every error names the object."""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
import subprocess
import threading

import pytest

from sonoforge_trainer.storage import (
    Clock,
    CredentialsError,
    IntegrityError,
    ObjectExistsError,
    Storage,
    StorageError,
    StorageSettings,
)
from sonoforge_trainer.storage.retry import RetryPolicy, RetrySeries
from sonoforge_trainer.storage.server import S3Server

KIB = 1024


def fast(endpoint, **changes):
    """Ranges of 256 KiB and waits of milliseconds; attempts and logic are a real run's."""
    defaults = {
        "range_bytes": 256 * KIB,
        "multipart_bytes": 6 * 2**20,
        "part_bytes": 5 * 2**20,
        "stall_seconds": 0.5,
        "retry_first_delay_seconds": 0.01,
        "retry_max_delay_seconds": 0.05,
    }
    return Storage(StorageSettings(endpoint=endpoint, **(defaults | changes)))


def sha256(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def stored(s3):
    """An object of ten ranges and a bit."""
    data = os.urandom(2560 * KIB + 321)
    s3.storage.write(f"{s3.uri}/shard-00000.tar", data)
    return f"{s3.uri}/shard-00000.tar", data


def read(storage, uri, data, **arguments):
    buffer = bytearray(len(data))
    storage.read_into(uri, memoryview(buffer), **arguments)
    return bytes(buffer)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_body_is_resumed_where_it_ended(s3, proxy, reset, fault):
    data = os.urandom(200 * KIB)
    s3.storage.write(f"{s3.uri}/x", data)
    proxy.once(fault(cut=100 * KIB, reset=reset), fault(cut=50 * KIB))
    assert read(fast(proxy.endpoint), f"{s3.uri}/x", data) == data
    starts = [r.range[0] for r in proxy.requests if r.method == "GET"]
    assert starts[0] == 0
    assert starts == sorted(starts)
    if not reset:  # a reset may take with it what the client had not read yet
        assert starts == [0, 100 * KIB, 150 * KIB]
    assert [bool(r.headers.get("if-match")) for r in proxy.requests if r.method == "GET"] == [False, True, True]


def test_every_answer_cut_after_80_kib_still_gives_the_object(stored, proxy, fault):
    """More failures than the budget has attempts, but each made progress."""
    uri, data = stored
    proxy.rule = lambda request: fault(cut=80 * KIB) if request.method == "GET" else None
    assert read(fast(proxy.endpoint, retry_attempts=3), uri, data, sha256=sha256(data)) == data
    assert proxy.faults > 30


def test_answers_without_progress_end_within_the_budget_and_name_the_object(stored, proxy, fault):
    uri, data = stored
    proxy.rule = lambda request: fault(cut=0) if request.method == "GET" else None
    with pytest.raises(StorageError, match=rf"{uri}: read failed at 127.*given up after 4 failures in a row") as caught:
        read(fast(proxy.endpoint, retry_attempts=4, threads=1), uri, data)
    assert caught.value.retryable


@pytest.mark.parametrize("status", [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")])
def test_a_busy_server_is_asked_again(stored, s3, proxy, status, fault):
    uri, data = stored
    seen = {}

    def rule(request):
        # Every request of every kind is refused twice.
        key = (request.method, request.target, request.headers.get("range"))
        seen[key] = seen.get(key, 0) + 1
        return fault(status=status) if seen[key] <= 2 else None

    proxy.rule = rule
    storage = fast(proxy.endpoint)
    assert read(storage, uri, data, sha256=sha256(data)) == data
    storage.write(f"{s3.uri}/y", b"written", if_absent=True)
    assert [i.uri for i in storage.list(s3.uri)] == [uri, f"{s3.uri}/y"]
    storage.delete(f"{s3.uri}/y")
    assert [i.uri for i in s3.storage.list(s3.uri)] == [uri]


def test_a_stalled_body_is_resumed_on_another_connection(stored, proxy, fault):
    uri, data = stored
    proxy.once(*[fault(stall=70 * KIB)] * 3)
    assert read(fast(proxy.endpoint), uri, data, sha256=sha256(data)) == data
    assert proxy.faults == 3


def test_a_flipped_byte_is_found_by_its_sha256_and_read_again(stored, proxy, fault):
    uri, data = stored
    proxy.once(fault(flip=1234))
    assert read(fast(proxy.endpoint), uri, data, sha256=sha256(data)) == data


def test_a_byte_that_is_always_flipped_is_an_integrity_error_after_one_reading_more(stored, proxy, fault):
    uri, data = stored
    proxy.rule = lambda request: fault(flip=0) if request.method == "GET" and request.range[0] == 0 else None
    with pytest.raises(IntegrityError, match=f"{uri}: the content is .*expected {sha256(data)}"):
        read(fast(proxy.endpoint), uri, data, sha256=sha256(data))
    assert proxy.faults == 2


def test_a_hundred_mixed_faults_lose_nothing(stored, proxy, fault):
    uri, data = stored
    kinds = [fault(cut=70_000), fault(status=(503, "SlowDown")), fault(cut=66_000, reset=True), fault(lose_answer=True)]
    count = iter(range(10**6))
    proxy.rule = lambda request: kinds[n % 4] if (n := next(count)) % 3 else None
    storage = fast(proxy.endpoint)
    while proxy.faults < 100:
        assert read(storage, uri, data, sha256=sha256(data)) == data


@pytest.mark.parametrize("size", [1000, 7 * 2**20], ids=["one put", "in parts"])
def test_a_write_whose_answer_is_lost_counts_as_written(s3, proxy, size, fault):
    """The second attempt meets the object of the first: it is our own, not a lost race."""
    data = os.urandom(size)
    storage = fast(proxy.endpoint)
    assert storage.conditional_put(s3.uri)
    proxy.once(fault(lose_answer=True), method="PUT" if size == 1000 else "POST")
    if size > 1000:  # lose the answer that completes the upload, not the one that begins it
        proxy.rule = completes_once(fault(lose_answer=True))
    assert storage.write(f"{s3.uri}/COMMIT", data, if_absent=True).size == size
    assert proxy.faults == 1
    assert s3.storage.read(f"{s3.uri}/COMMIT") == data
    with pytest.raises(ObjectExistsError, match="COMMIT"):
        storage.write(f"{s3.uri}/COMMIT", data, if_absent=True)


def completes_once(fault):
    left = [fault]
    return lambda request: left.pop() if left and request.method == "POST" and "uploadId=" in request.target else None


def test_a_write_that_lost_the_race_while_its_request_was_lost_is_told_so(s3, proxy, fault):
    uri = f"{s3.uri}/COMMIT"
    storage = fast(proxy.endpoint)
    assert storage.conditional_put(s3.uri)

    def other_first(request):
        proxy.rule = lambda _: None
        s3.storage.write(uri, b"same bytes")
        return fault(status=(503, "SlowDown"))

    proxy.rule = other_first
    with pytest.raises(ObjectExistsError, match=uri):
        storage.write(uri, b"same bytes", if_absent=True)


def test_a_server_that_ignores_conditions_is_found_out_and_written_to_with_a_look_first(s3, proxy, fault):
    def ignore(request):
        if "if-none-match" not in request.headers:
            return None
        s3.storage.write(f"s3:/{request.target}", request.body)
        return fault(status=(200, "Ignored"))

    proxy.rule = ignore
    storage = fast(proxy.endpoint)
    storage.write(f"{s3.uri}/x", b"first", if_absent=True)
    with pytest.raises(ObjectExistsError):
        storage.write(f"{s3.uri}/x", b"second", if_absent=True)
    assert not storage.conditional_put(s3.uri)
    assert s3.storage.read(f"{s3.uri}/x") == b"first"


def test_a_failed_upload_is_aborted_and_leaves_no_object(s3, proxy, fault):
    proxy.rule = lambda request: fault(status=(403, "AccessDenied")) if "partNumber=2" in request.target else None
    with pytest.raises(StorageError, match=f"{s3.uri}/big: write was refused .* 403 AccessDenied") as caught:
        fast(proxy.endpoint).write(f"{s3.uri}/big", bytes(11 * 2**20))
    assert not caught.value.retryable
    assert [r.method for r in proxy.requests if "uploadId=" in r.target][-1] == "DELETE"
    assert list(s3.storage.list(s3.uri)) == []


def test_expired_credentials_are_read_again_until_the_file_is_rotated(stored, s3, proxy, fault, tmp_path, monkeypatch):
    uri, data = stored
    good = s3.server.credentials_file.read_text()
    rotating = tmp_path / "rotating"
    rotating.write_text("[default]\naws_access_key_id = AKOLD\naws_secret_access_key = old\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(rotating))
    refused = []

    def rule(request):
        if "AKOLD" not in request.headers["authorization"]:
            return None
        refused.append(request)
        if len(refused) == 4:
            rotating.write_text(good)
        return fault(status=(403, "ExpiredToken"))

    proxy.rule = rule
    assert read(fast(proxy.endpoint), uri, data, sha256=sha256(data)) == data


def test_expired_credentials_that_cannot_change_are_an_error_at_once(stored, proxy, fault, monkeypatch):
    uri, _ = stored
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRETPLANTED")
    proxy.rule = lambda _: fault(status=(403, "ExpiredToken"))
    with pytest.raises(CredentialsError, match=f"{uri}: stat was refused .*expired") as caught:
        fast(proxy.endpoint).stat(uri)
    assert "PLANTED" not in str(caught.value)


def test_a_rotated_credentials_file_is_used_from_the_next_request_on(stored, s3, proxy, tmp_path, monkeypatch):
    uri, _ = stored
    rotating = tmp_path / "rotating"
    rotating.write_text("[default]\naws_access_key_id = AKOLD\naws_secret_access_key = old\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(rotating))
    storage = fast(proxy.endpoint)
    with pytest.raises(CredentialsError):
        storage.stat(uri)
    before = len(proxy.requests)
    rotating.write_text(s3.server.credentials_file.read_text())
    storage.stat(uri)
    assert len(proxy.requests) == before + 1


def test_an_object_stays_readable_when_the_server_is_killed_and_started_again(tmp_path, s3, start_proxy, monkeypatch):
    """Killed with SIGKILL while its answers are on the way, and started again with what it stored."""
    data = os.urandom(4 * 2**20)
    with S3Server(tmp_path / "server") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        uri = "s3://sonoforge/shard.tar"
        fast(server.endpoint).write(uri, data)
        proxy = start_proxy(server.endpoint)
        killed = threading.Event()

        def kill_at_the_fifth(_):
            if len(proxy.requests) == 5 and not killed.is_set():
                server.kill()
                killed.set()

        proxy.rule = kill_at_the_fifth
        starter = threading.Thread(target=lambda: (killed.wait(30), server.start()))
        starter.start()
        storage = fast(proxy.endpoint, retry_attempts=1000, retry_max_delay_seconds=0.5, retry_seconds=60)
        assert read(storage, uri, data, sha256=sha256(data)) == data
        starter.join()
        assert killed.is_set()


def test_a_private_ca_is_trusted_by_either_variable_and_refused_without(stored, s3, start_proxy, tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed: no certificate can be made")
    uri, data = stored
    monkeypatch.chdir(tmp_path)
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
    for line in (
        f"{make} -keyout ca.key -out ca.pem -subj /CN=ca -addext keyUsage=critical,keyCertSign,cRLSign",
        f"{make} -keyout leaf.key -out leaf.pem -subj /CN=leaf -CA ca.pem -CAkey ca.key "
        "-addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE",
    ):
        subprocess.run(line.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("leaf.pem", "leaf.key")
    proxy = start_proxy(s3.server.endpoint, context)
    for name, other in (("AWS_CA_BUNDLE", "SSL_CERT_FILE"), ("SSL_CERT_FILE", "AWS_CA_BUNDLE")):
        monkeypatch.setenv(name, str(tmp_path / "ca.pem"))
        monkeypatch.delenv(other, raising=False)
        assert read(fast(proxy.endpoint), uri, data) == data
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match=f"{uri}: the certificate of 127.0.0.1:.* AWS_CA_BUNDLE") as caught:
        fast(proxy.endpoint).stat(uri)
    assert not caught.value.retryable


def test_back_off_doubles_with_jitter_up_to_a_cap_and_ends_by_attempts_or_seconds():
    now = [0.0]
    clock = Clock(monotonic=lambda: now[0], uniform=lambda low, high: high)
    policy = RetryPolicy(attempts=7, seconds=100.0, first_delay_seconds=1.0, max_delay_seconds=8.0)
    series = RetrySeries(policy, clock)
    assert [series.failed() for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, None]
    series = RetrySeries(policy, clock)
    assert series.failed() == 1.0
    now[0] = 99.0
    assert series.failed() is None
    series.progressed()
    assert series.failed() == 1.0
    assert RetrySeries(policy, Clock(uniform=lambda low, high: low)).failed() == 0.5


def test_waiting_goes_through_the_clock(stored, proxy, fault):
    uri, _ = stored
    waits = []
    clock = Clock(wait=lambda event, seconds: bool(waits.append(seconds)), uniform=lambda low, high: high)
    proxy.once(*[fault(status=(503, "SlowDown"))] * 3, method="HEAD")
    Storage(StorageSettings(endpoint=proxy.endpoint), clock).stat(uri)
    assert waits == [0.1, 0.2, 0.4]
