"""Data sets on a real S3 server are those of a folder, to the byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result

from sonoforge_trainer.shards.cli import command
from sonoforge_trainer.shards.reader import iterate, read_manifest

Call = Callable[..., Result]


def _key(folder: Path) -> Path:
    file = folder / "hash.key"
    file.write_text("0123456789abcdef\n")
    return file


def test_a_build_on_s3_goes_on_and_ends_with_the_bytes_of_one_in_a_folder(
    s3: Any, folder: Callable[..., Path], tmp_path: Path, call: Call, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    """The first try stops at a broken image; the second keeps the finished shards. Then verify finds nothing wrong."""
    root = folder([f"{n}.jpg" for n in range(12)])
    good = (root / "7.jpg").read_bytes()
    (root / "7.jpg").write_bytes(good[:200])
    arguments = ("build", "--images", root, "--shard-samples", 3, "--hash-key-file", _key(tmp_path), "--name", "set")
    assert call(command, *arguments, "--output", f"{s3.uri}/out").exit_code == 65
    (root / "7.jpg").write_bytes(good)
    finished = call(command, *arguments, "--output", f"{s3.uri}/out")
    assert finished.exit_code == 0, finished.output
    assert finished.output.count(", kept") == 3
    assert call(command, *arguments, "--output", tmp_path / "out").exit_code == 0
    remote = {
        info.uri.removeprefix(f"{s3.uri}/out/"): s3.storage.read(info.uri) for info in s3.storage.list(f"{s3.uri}/out/")
    }
    assert remote == contents(tmp_path / "out")
    assert call(command, "verify", f"{s3.uri}/out", "--decode").exit_code == 0


def test_a_webdataset_on_s3_is_a_source(s3: Any, folder: Callable[..., Path], tmp_path: Path, call: Call) -> None:
    root = folder([f"{label}/{n}.jpg" for label in ("head", "femur") for n in range(4)])
    options = ("--hash-key-file", _key(tmp_path))
    first = ("build", "--images", root, "--label-from-folder", *options, "--output", f"{s3.uri}/first")
    assert call(command, *first).exit_code == 0
    second = ("build", "--webdataset", f"{s3.uri}/first", "--label-column", "label", "--where", "label=head")
    assert call(command, *second, *options, "--output", f"{s3.uri}/second").exit_code == 0
    manifest = read_manifest(f"{s3.uri}/second/shards.json", s3.storage)
    images = {sample.image for sample in iterate(manifest, f"{s3.uri}/second", s3.storage)}
    assert images == {file.read_bytes() for file in (root / "head").iterdir()}


def test_a_shard_changed_on_s3_is_named(s3: Any, folder: Callable[..., Path], tmp_path: Path, call: Call) -> None:
    build = ("build", "--images", folder(["1.jpg"]), "--hash-key-file", _key(tmp_path), "--name", "set")
    assert call(command, *build, "--output", f"{s3.uri}/out").exit_code == 0
    data = bytearray(s3.storage.read(f"{s3.uri}/out/set-00000.tar"))
    data[700] ^= 1
    s3.storage.write(f"{s3.uri}/out/set-00000.tar", bytes(data))
    result = call(command, "verify", f"{s3.uri}/out")
    assert result.exit_code == 65
    assert f"{s3.uri}/out/set-00000.tar: has another SHA-256 than the manifest says: it was altered" in result.output
