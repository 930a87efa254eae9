"""Objects on a real S3 server, without faults."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sonoforge_trainer.contract import ContractError
from sonoforge_trainer.storage import (
    CredentialsError,
    IntegrityError,
    InvalidURIError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    Storage,
    StorageError,
    StorageSettings,
)
from sonoforge_trainer.storage.connections import is_aws
from sonoforge_trainer.storage.s3 import S3Backend

MIB = 2**20


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("size", [0, 1, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 3 * MIB + 17])
def test_what_is_written_is_read_back_at_every_border_of_a_range(s3, size):
    data = os.urandom(size)
    uri = f"{s3.uri}/a/b.bin"
    assert s3.storage.write(uri, data).size == size
    assert s3.storage.stat(uri).size == size
    assert s3.storage.read(uri, sha256=sha256(data)) == data
    buffer = bytearray(size)
    s3.storage.read_into(uri, memoryview(buffer), sha256=sha256(data))
    assert buffer == data


def test_ranges_are_read_in_parallel_and_exactly_once(s3, proxy):
    data = os.urandom(2 * MIB)
    s3.storage.write(f"{s3.uri}/x", data)
    storage = Storage(StorageSettings(endpoint=proxy.endpoint, range_bytes=256 * 1024))
    together = threading.Barrier(8)  # passes only when eight ranges are in flight at once

    buffer = bytearray(2 * MIB)
    real = S3Backend._fill_range

    def meet(self, *arguments):
        together.wait(10)
        real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Backend, "_fill_range", meet)
        storage.read_into(f"{s3.uri}/x", memoryview(buffer))
    assert buffer == data
    assert sorted(r.range for r in proxy.requests if r.method == "GET") == [
        (start, start + 256 * 1024 - 1) for start in range(0, 2 * MIB, 256 * 1024)
    ]
    assert all(r.headers["if-match"] for r in proxy.requests if r.method == "GET")


def test_a_range_is_exact_or_an_error(s3):
    uri = f"{s3.uri}/x"
    s3.storage.write(uri, bytes(range(100)))
    assert s3.storage.read_range(uri, 10, 5) == b"\x0a\x0b\x0c\x0d\x0e"
    assert s3.storage.read_range(uri, 10, 0) == b""
    for offset, length in ((98, 3), (100, 1), (1000, 10)):
        with pytest.raises(IntegrityError, match=uri):
            s3.storage.read_range(uri, offset, length)


@pytest.mark.parametrize("found", [99, 101, 600_000, 0])
def test_a_wrong_size_is_an_integrity_error_that_names_the_object(s3, found):
    uri = f"{s3.uri}/shard.tar"
    s3.storage.write(uri, b"x" * found)
    with pytest.raises(IntegrityError, match=f"{uri}: the object "):
        s3.storage.read_into(uri, memoryview(bytearray(100)))


def test_a_missing_object_and_a_missing_bucket_are_told_apart(s3):
    with pytest.raises(ObjectNotFoundError, match=f"{s3.uri}/none: no such object") as caught:
        s3.storage.stat(f"{s3.uri}/none")
    assert not caught.value.retryable
    for call in (s3.storage.read, s3.storage.stat, lambda uri: list(s3.storage.list(uri))):
        with pytest.raises(StorageError, match="no such bucket") as missing:
            call("s3://never-made/x")
        assert not isinstance(missing.value, ObjectNotFoundError)


def test_a_listing_has_every_object_below_the_prefix_in_the_order_of_uris(s3):
    """The server itself lists a/b before a-b, and run2 is not below run."""
    for key in ("run/a/b", "run/a-b", "run/a.b", "run/aa", "run/é x%20", "run2/x", "run"):
        s3.storage.write(f"{s3.uri}/{key}", b"1")
    assert [info.uri.removeprefix(s3.uri) for info in s3.storage.list(f"{s3.uri}/run")] == [
        "/run/a-b",
        "/run/a.b",
        "/run/a/b",
        "/run/aa",
        "/run/é x%20",
    ]
    assert s3.storage.read(f"{s3.uri}/run/é x%20") == b"1"
    assert list(s3.storage.list(f"{s3.uri}/nothing")) == []


def test_a_listing_of_more_than_one_page_is_complete(s3):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: s3.storage.write(f"{s3.uri}/{n:04}", b""), range(1005)))
    assert [i.uri for i in s3.storage.list(s3.uri)] == [f"{s3.uri}/{n:04}" for n in range(1005)]


def test_a_listing_says_when_an_object_was_written(s3):
    before = time.time()
    s3.storage.write(f"{s3.uri}/x", b"1")
    (listed,) = s3.storage.list(s3.uri)
    assert before - 1 <= listed.modified <= time.time() + 1, "S3 tells whole seconds"
    assert s3.storage.stat(f"{s3.uri}/x").modified == pytest.approx(listed.modified, abs=1)


def test_deleting_is_final_and_deleting_nothing_is_no_error(s3):
    s3.storage.write(f"{s3.uri}/x", b"1")
    s3.storage.delete(f"{s3.uri}/x")
    s3.storage.delete(f"{s3.uri}/x")
    with pytest.raises(ObjectNotFoundError):
        s3.storage.read(f"{s3.uri}/x")


def test_of_sixteen_writers_of_one_object_one_wins(s3):
    assert s3.storage.conditional_put(s3.uri)
    for attempt in range(2):
        uri = f"{s3.uri}/COMMIT-{attempt}"
        start = threading.Barrier(16)

        def write(number, uri=uri, start=start):
            start.wait()
            try:
                s3.storage.write(uri, b"writer %d" % number, if_absent=True)
            except ObjectExistsError:
                return None
            return number

        with ThreadPoolExecutor(16) as pool:
            winners = [n for n in pool.map(write, range(16)) if n is not None]
        assert len(winners) == 1
        assert s3.storage.read(uri) == b"writer %d" % winners[0]
    assert [i.uri for i in s3.storage.list(s3.uri) if "probe" in i.uri] == []


def test_a_large_object_is_written_in_parts_and_only_where_absent(s3, proxy):
    data = os.urandom(11 * MIB)
    storage = Storage(StorageSettings(endpoint=proxy.endpoint, multipart_bytes=6 * MIB, part_bytes=5 * MIB))
    uri = f"{s3.uri}/state.safetensors"
    assert storage.write(uri, memoryview(data), if_absent=True).size == 11 * MIB
    assert sum("partNumber=" in r.target for r in proxy.requests) == 3
    assert s3.storage.read(uri, sha256=sha256(data)) == data
    with pytest.raises(ObjectExistsError, match=uri):
        storage.write(uri, bytes(11 * MIB), if_absent=True)
    assert s3.storage.read(uri) == data


def _read_in_child(storage, uri, answers):
    answers.put(hashlib.sha256(storage.read(uri)).hexdigest())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_storage_in_use_works_in_a_child_process(s3, method):
    data = os.urandom(600_000)
    s3.storage.write(f"{s3.uri}/x", data)
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(s3.storage, f"{s3.uri}/x", answers))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answers.get() == hashlib.sha256(data).hexdigest()
    assert pickle.loads(pickle.dumps(s3.storage)).read(f"{s3.uri}/x") == data


def test_an_object_replaced_between_two_ranges_is_an_error_not_a_mixture(s3, proxy):
    uri = f"{s3.uri}/x"
    s3.storage.write(uri, b"a" * 512 * 1024)

    def replace(request):
        if request.method == "GET":
            proxy.rule = lambda _: None
            s3.storage.write(uri, b"b" * 512 * 1024)

    proxy.rule = replace
    storage = Storage(StorageSettings(endpoint=proxy.endpoint, range_bytes=256 * 1024))
    with pytest.raises(ObjectChangedError, match=f"{uri}: the object was replaced while it was read") as caught:
        storage.read_into(uri, memoryview(bytearray(512 * 1024)))
    assert not caught.value.retryable


def test_wrong_bytes_are_read_twice_and_then_named(s3, proxy):
    uri = f"{s3.uri}/shard-00003.tar"
    s3.storage.write(uri, b"right size, wrong bytes")
    storage = Storage(StorageSettings(endpoint=proxy.endpoint))
    with pytest.raises(IntegrityError, match=f"{uri}: the content is sha256:[0-9a-f]{{64}}, expected sha256:0000"):
        storage.read_into(uri, memoryview(bytearray(23)), sha256="sha256:" + "0" * 64)
    assert sum(r.method == "GET" for r in proxy.requests) == 2


def test_no_error_holds_a_key(s3, tmp_path, monkeypatch):
    wrong = tmp_path / "credentials"
    wrong.write_text("[default]\naws_access_key_id = AKPLANTED\naws_secret_access_key = SECRETPLANTED\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(wrong))
    for call in (s3.storage.read, s3.storage.stat, lambda uri: s3.storage.write(uri, b"x")):
        with pytest.raises(CredentialsError) as caught:
            call(f"{s3.uri}/x")
        assert "PLANTED" not in repr(caught.value)
        assert not caught.value.retryable
        assert caught.value.__cause__ is None
        assert f"{s3.uri}/x" in str(caught.value)


def test_without_credentials_the_error_comes_at_once_and_says_how_to_give_them(s3, tmp_path, monkeypatch):
    """Off AWS the metadata service, which would take seconds, is not asked."""
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    with pytest.raises(CredentialsError, match="AWS_SHARED_CREDENTIALS_FILE"):
        s3.storage.stat(f"{s3.uri}/x")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:secret@bucket/x",
        "s3:///x",
        "s3://bucket",
        "s3://bucket/dir/",
        "s3://bucket/a/../b",
        "http://u:secret@h/x",
    ],
)
def test_a_uri_that_names_no_object_is_refused_without_quoting_a_password(uri):
    with pytest.raises(InvalidURIError) as caught:
        Storage().read(uri)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_clients_off_aws_use_path_style_and_no_default_checksums(s3):
    connection = s3.storage._backend(s3.uri).__dict__["_connections"].current()
    config = connection.client.meta.config
    assert config.s3["addressing_style"] == "path"
    assert config.request_checksum_calculation == "when_required"
    assert config.response_checksum_validation == "when_required"
    assert config.max_pool_connections == 8
    assert is_aws("https://s3.eu-central-1.amazonaws.com")
    assert not is_aws("https://s3.hospital.example")


def test_settings_come_from_the_environment_and_wrong_ones_are_named():
    settings = StorageSettings.from_env({"SONOFORGE_S3_ADDRESSING": "virtual", "SONOFORGE_S3_STALL_SECONDS": "2.5"})
    assert (settings.addressing, settings.stall_seconds, settings.range_bytes) == ("virtual", 2.5, 8 * MIB)
    for name, value in (("ADDRESSING", "dns"), ("THREADS", "many"), ("THREADS", "0"), ("PART_BYTES", "1024")):
        with pytest.raises(ContractError, match=f"SONOFORGE_S3_.*found '?{value}"):
            StorageSettings.from_env({f"SONOFORGE_S3_{name}": value})


def test_a_bucket_is_reached_as_a_virtual_host(s3, start_proxy, monkeypatch):
    """Names below localhost are this machine (RFC 6761), but not every resolver knows; the server gets the name."""
    real = socket.getaddrinfo
    monkeypatch.setattr(
        "socket.getaddrinfo",
        lambda host, *rest, **named: real("127.0.0.1" if str(host).endswith(".localhost") else host, *rest, **named),
    )
    proxy = start_proxy(s3.server.endpoint)
    endpoint = proxy.endpoint.replace("127.0.0.1", "localhost")
    storage = Storage(StorageSettings(endpoint=endpoint, addressing="virtual"))
    uri = f"{s3.uri}/virtual"
    storage.write(uri, b"data")
    assert storage.read(uri) == b"data"
    assert [info.uri for info in storage.list(s3.uri + "/")] == [uri]
    assert s3.storage.read(uri) == b"data"
    assert {request.headers["host"].partition(":")[0] for request in proxy.requests} == {"sonoforge.localhost"}
    assert not any(request.target.startswith("/sonoforge/") for request in proxy.requests)
