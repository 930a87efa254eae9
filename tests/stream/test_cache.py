import fcntl
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sonoforge_trainer.cache import DataError, ShardCache, ShardFile, private_folder
from sonoforge_trainer.storage import Storage


class CountingStorage(Storage):
    """Storage that counts the objects it reads; everything else is real."""

    reads = 0

    def read_into(self, uri, buffer, *, sha256=None):
        self.reads += 1
        super().read_into(uri, buffer, sha256=sha256)


@pytest.fixture(scope="module")
def shards(data_set):
    folder, manifest = data_set
    return folder, [ShardFile(s.name, s.bytes, s.sha256) for s in manifest.shards]


@pytest.fixture
def open_cache(shards, tmp_path):
    """A function that opens a cache on one folder, with a storage of its own."""
    opened = []

    def open_(limit=10**9):
        opened.append(ShardCache(tmp_path / "cache", limit, CountingStorage(), shards[0].as_uri()))
        return opened[-1]

    yield open_
    for cache in opened:
        cache.close()


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith("lock"))


def test_a_member_is_read_from_a_verified_copy_named_by_its_digest(shards, open_cache, tmp_path):
    folder, (first, *_) = shards
    cache = open_cache()
    assert cache.read(first, 512, 100) == (folder / first.name).read_bytes()[512:612]
    assert files(tmp_path) == [first.sha256.removeprefix("sha256:") + ".tar"]


def test_a_shard_is_fetched_once_by_all_caches_of_a_folder(shards, open_cache):
    caches = [open_cache() for _ in range(3)]
    threads = [threading.Thread(target=cache.read, args=(shards[1][0], 0, 10)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(cache._storage.reads for cache in caches) == 1


def test_shards_of_one_name_in_two_data_sets_are_two_files(shards, open_cache, tmp_path):
    folder, (first, second, *_) = shards
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / first.name).write_bytes((folder / second.name).read_bytes())
    other = ShardCache(tmp_path / "cache", 10**9, Storage(), elsewhere.as_uri())
    same_name = ShardFile(first.name, second.bytes, second.sha256)
    assert open_cache().read(first, 512, 200) != other.read(same_name, 512, 200)
    other.close()


def test_a_full_cache_drops_what_was_opened_longest_ago_and_is_not_open(shards, open_cache, tmp_path):
    _, (first, second, third, _) = shards
    cache = open_cache(limit=2 * max(s.bytes for s in shards[1]))
    for shard in (first, second, first):
        cache.read(shard, 0, 10)
    cache.close()
    cache.read(third, 0, 10)
    assert third.sha256.removeprefix("sha256:") + ".tar" in files(tmp_path)
    assert len(files(tmp_path)) == 2
    assert cache._storage.reads == 3


def test_a_file_that_another_process_reads_is_not_dropped(shards, open_cache, tmp_path):
    _, (first, second, *_) = shards
    reader, writer = open_cache(), open_cache(limit=second.bytes)
    reader.read(first, 0, 10)
    writer.read(second, 0, 10)
    assert len(files(tmp_path)) == 2
    reader.read(first, 0, 10)
    assert reader._storage.reads == 1


def test_a_cached_file_that_was_changed_on_disk_is_fetched_again(shards, open_cache, tmp_path):
    folder, (first, *_) = shards
    open_cache().read(first, 0, 10)
    path = tmp_path / "cache" / files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    fresh = open_cache()
    assert fresh.read(first, 512, 200) == (folder / first.name).read_bytes()[512:712]
    assert fresh._storage.reads == 1


def test_a_cached_file_that_was_copied_is_verified_and_kept(shards, open_cache, tmp_path):
    """Copying a cache by hand changes times, but no content."""
    _, (first, *_) = shards
    open_cache().read(first, 0, 10)
    os.utime(tmp_path / "cache" / files(tmp_path)[0])
    fresh = open_cache()
    fresh.read(first, 0, 10)
    assert fresh._storage.reads == 0


def test_leftovers_of_dead_processes_are_removed_and_downloads_of_living_ones_are_not(shards, open_cache, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "dead.part").write_bytes(bytes(100))
    with (tmp_path / "cache" / "alive.part").open("wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        open_cache().read(shards[1][0], 0, 10)
        assert [name for name in files(tmp_path) if name.endswith(".part")] == ["alive.part"]


def test_a_failed_fetch_leaves_nothing_behind(shards, open_cache, tmp_path):
    _, (first, *_) = shards
    with pytest.raises(DataError, match=rf"^shard file://.*/{first.name} is not the one that the manifest lists"):
        open_cache().read(ShardFile(first.name, first.bytes, f"sha256:{'0' * 64}"), 0, 10)
    with pytest.raises(DataError, match=r"^shard file://.*/absent.tar is missing"):
        open_cache().read(ShardFile("absent.tar", 100, f"sha256:{'1' * 64}"), 0, 10)
    assert files(tmp_path) == []


def test_a_data_error_says_its_cause_to_the_agent():
    assert DataError.termination_cause == "data"
    assert str(pickle.loads(pickle.dumps(DataError("shard x")))) == "shard x"


HOLD = """
import sys
from sonoforge_trainer.cache import private_folder
with private_folder() as folder:
    (folder / "shard.tar").write_bytes(bytes(10))
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_private_folder_outlives_its_killed_process_only_until_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    left = Path(process.stdout.readline().strip())
    with private_folder() as mine:
        assert left.exists(), "its owner lives"
        process.kill()
        process.communicate()
        assert mine.is_dir()
    with private_folder():
        assert not left.exists()
    assert not mine.exists()
