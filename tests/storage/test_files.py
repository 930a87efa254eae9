"""Objects in plain directories."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonoforge_trainer.storage import (
    IntegrityError,
    InvalidURIError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    Storage,
    StorageError,
)
from sonoforge_trainer.storage.objects import Pin, join_file, parse_file


@pytest.fixture
def storage():
    return Storage()


def test_an_object_is_written_read_listed_and_deleted(storage, tmp_path):
    base = tmp_path.as_uri()
    info = storage.write(f"{base}/run/a.bin", b"0123456789")
    assert (info.uri, info.size) == (f"{base}/run/a.bin", 10)
    assert storage.stat(f"{base}/run/a.bin") == info
    assert storage.read(f"{base}/run/a.bin") == b"0123456789"
    assert storage.read_range(f"{base}/run/a.bin", 3, 4) == b"3456"
    buffer = bytearray(10)
    storage.read_into(f"{base}/run/a.bin", memoryview(buffer))
    assert buffer == b"0123456789"
    assert list(storage.list(base)) == [info]
    storage.delete(f"{base}/run/a.bin")
    storage.delete(f"{base}/run/a.bin")
    assert list(storage.list(base)) == []


def test_an_empty_object_is_an_object(storage, tmp_path):
    storage.write(f"{tmp_path.as_uri()}/empty", b"")
    assert storage.read(f"{tmp_path.as_uri()}/empty") == b""
    storage.read_into(f"{tmp_path.as_uri()}/empty", memoryview(bytearray()))


def test_of_sixteen_writers_of_one_file_one_wins_and_leaves_nothing_behind(storage, tmp_path):
    uri = f"{tmp_path.as_uri()}/COMMIT"
    start = threading.Barrier(16)

    def write(number):
        start.wait()
        try:
            storage.write(uri, b"writer %d" % number, if_absent=True)
        except ObjectExistsError:
            return None
        return number

    with ThreadPoolExecutor(16) as pool:
        winners = [n for n in pool.map(write, range(16)) if n is not None]
    assert len(winners) == 1
    assert storage.read(uri) == b"writer %d" % winners[0]
    assert [path.name for path in tmp_path.iterdir()] == ["COMMIT"]
    assert storage.conditional_put(tmp_path.as_uri())


def test_a_reader_sees_the_old_object_or_the_new_one_and_never_a_part(storage, tmp_path):
    uri = f"{tmp_path.as_uri()}/x"
    versions = {bytes([n]) * 100_000 for n in range(4)}
    storage.write(uri, next(iter(versions)))
    done = threading.Event()

    def rewrite():
        for _ in range(25):
            for version in versions:
                storage.write(uri, version)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(rewrite)
        while not done.is_set() and not writing.done():
            # Between the look at the size and the reading the object may be replaced: that is an error, not a mixture.
            try:
                assert storage.read(uri) in versions
            except ObjectChangedError:
                continue
        writing.result()


def test_a_failed_write_leaves_the_old_object_and_no_temporary_file(storage, tmp_path, monkeypatch):
    uri = f"{tmp_path.as_uri()}/x"
    storage.write(uri, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=f"{uri}: No space left on device") as caught:
        storage.write(uri, b"new")
    assert caught.value.retryable
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert storage.read(uri) == b"old"


def test_a_file_that_changes_while_it_is_read_is_an_error(storage, tmp_path):
    uri = f"{tmp_path.as_uri()}/x"
    info = storage.write(uri, b"old")
    storage.write(uri, b"new")
    with pytest.raises(ObjectChangedError, match=uri):
        storage._backend(uri).fill(uri, memoryview(bytearray(3)), 0, Pin(size=3, etag=info.etag))


def test_wrong_size_wrong_sha256_and_missing_are_named(storage, tmp_path):
    uri = f"{tmp_path.as_uri()}/shard.tar"
    with pytest.raises(ObjectNotFoundError, match=f"{uri}: no such object"):
        storage.read(uri)
    storage.write(uri, b"12345")
    with pytest.raises(IntegrityError, match=f"{uri}: the object has 5 bytes, expected 6"):
        storage.read_into(uri, memoryview(bytearray(6)))
    with pytest.raises(IntegrityError, match=f"{uri}: the object has 5 bytes, asked for 3 from byte 4 on"):
        storage.read_range(uri, 4, 3)
    with pytest.raises(IntegrityError, match=f"{uri}: the content is sha256:5994471a.*expected sha256:00"):
        storage.read(uri, sha256="sha256:00")
    with pytest.raises(ObjectNotFoundError):
        storage.read(tmp_path.as_uri())
    with pytest.raises(ObjectNotFoundError):
        storage.read(f"{uri}/below-a-file")


@pytest.mark.parametrize(
    "tail", ["/../x", "/a/../../x", "/%2e%2e/x", "/a%2fb", "/a//b", "/./a", "/a%00b", "/.sonoforge-tmp-1"]
)
def test_a_uri_cannot_point_out_of_itself(storage, tmp_path, tail):
    with pytest.raises(InvalidURIError):
        storage.read(f"{tmp_path.as_uri()}/base{tail}")
    with pytest.raises(InvalidURIError):
        storage.write(f"{tmp_path.as_uri()}/base{tail}", b"x")


@pytest.mark.parametrize("uri", ["file://host/x", "file://x", "file:///", "/plain/path", "file:relative"])
def test_what_is_no_absolute_file_uri_is_refused(storage, uri):
    with pytest.raises(InvalidURIError):
        storage.read(uri)


def test_percent_encoding_names_the_decoded_file(storage, tmp_path):
    storage.write(f"{tmp_path.as_uri()}/a%20b%25.bin", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a b%.bin"]
    assert [i.uri for i in storage.list(tmp_path.as_uri() + "/")] == [f"{tmp_path.as_uri()}/a%20b%25.bin"]
    assert storage.read(f"file://localhost{tmp_path}/a b%25.bin") == b"x"


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and not name.startswith(".sonoforge-tmp-")
)


@given(st.lists(names, min_size=1, max_size=4))
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_every_path_has_a_uri_that_leads_back_to_it(parts):
    assert parse_file(join_file("file:///base", PurePosixPath(*parts))) == parse_file(
        "file:///base", prefix=True
    ).joinpath(*parts)


def test_a_listing_is_sorted_complete_and_without_unfinished_files(storage, tmp_path):
    base = tmp_path.as_uri()
    for name in ("a/b", "a-b", "a.b", "aa"):
        storage.write(f"{base}/{name}", b"")
    (tmp_path / ".sonoforge-tmp-dead").write_bytes(b"left by a crash")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert [i.uri.removeprefix(base) for i in storage.list(base)] == ["/a-b", "/a.b", "/a/b", "/aa"]
    assert list(storage.list(f"{base}/none")) == []
