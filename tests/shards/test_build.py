"""Builds give the same bytes however often they are killed, and touch nothing that is not theirs."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from click.testing import Result

from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.shards.build import BuildRule, DataSetCard, RejectedError, Rendered, build
from sonoforge_trainer.shards.cli import command
from sonoforge_trainer.shards.faults import ImageError, SourceError
from sonoforge_trainer.shards.plan import PlanRule, arrange
from sonoforge_trainer.shards.reader import iterate, read_manifest
from sonoforge_trainer.shards.sources import Row
from sonoforge_trainer.storage import Storage

Call = Callable[..., Result]
Folder = Callable[..., Path]
Contents = Callable[[Path], dict[str, bytes]]


def _key(folder: Path) -> Path:
    file = folder / "hash.key"
    file.write_text("0123456789abcdef\n")
    return file


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return _key(tmp_path)


def test_a_folder_becomes_shards_that_webdataset_reads(
    folder: Folder, tmp_path: Path, key: Path, call: Call, storage: Storage
) -> None:
    """webdataset itself gives the same keys, images and fields as the manifest and our reader."""
    root = folder([f"{label}/p{n}.jpg" for label in ("head", "femur") for n in range(5)])
    arguments = ("--images", root, "--label-from-folder", "--patient-pattern", r"/(p\d)", "--splits", "0.6,0.2,0.2")
    result = call(
        command, "build", *arguments, "--shard-samples", 4, "--hash-key-file", key, "--output", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    uri = (tmp_path / "out").as_uri()
    manifest = read_manifest(f"{uri}/shards.json", storage)
    assert (manifest.name, manifest.samples, manifest.classes) == ("out", 10, ("femur", "head"))
    assert [shard.samples for shard in manifest.shards] == [4, 3, 3]
    paths = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        theirs = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
        gc.collect()
    ours = list(iterate(manifest, uri, storage))
    assert [s["__key__"] for s in theirs] == [s.key for s in ours] == [k for s in manifest.shards for k in s.keys]
    assert [s["jpg"] for s in theirs] == [s.image for s in ours]
    assert [json.loads(s["json"]) for s in theirs] == [s.fields for s in ours]
    # The members are the source files, to the bit.
    assert {s.image for s in ours} == {file.read_bytes() for file in root.rglob("*.jpg")}
    hashes = {KeyHasher(b"0123456789abcdef").hash(f"patient\0p{n}") for n in range(5)}
    assert {s.fields["patient"] for s in ours} == hashes == {p for shard in manifest.shards for p in shard.patients}
    for shard in manifest.shards:
        data = (tmp_path / "out" / shard.name).read_bytes()
        for key_, offset, length in zip(shard.keys, shard.offsets, shard.lengths, strict=True):
            assert data[offset : offset + length] == next(s.image for s in ours if s.key == key_)


def test_two_builds_of_equal_files_are_equal(
    folder: Folder, tmp_path: Path, key: Path, call: Call, contents: Contents
) -> None:
    """Other folder, other times, other number of threads: the same shards and manifest."""
    names = [f"{n}.jpg" for n in range(9)]
    found = []
    for number, source in enumerate((folder(names, "one"), folder(names, "two"))):
        os.utime(source / "3.jpg", (number, number))
        arguments = ("--shard-samples", 2, "--workers", 1 + number * 3, "--hash-key-file", key, "--name", "same")
        output = tmp_path / f"out-{number}"
        assert call(command, "build", "--images", source, *arguments, "--output", output).exit_code == 0
        found.append({name: data for name, data in contents(output).items() if not name.startswith(".build")})
    assert found[0] == found[1]
    assert sorted(found[0]) == [*(f"same-{n:05d}.tar" for n in range(5)), "shards.json"]


def test_a_finished_data_set_is_left_as_it_is(
    folder: Folder, tmp_path: Path, key: Path, call: Call, contents: Contents
) -> None:
    arguments = ("build", "--images", folder(["1.jpg", "2.jpg"]), "--hash-key-file", key, "--output", tmp_path / "out")
    assert call(command, *arguments).exit_code == 0
    before = contents(tmp_path / "out")
    again = call(command, *arguments)
    assert again.exit_code == 0
    assert "Nothing to do: this data set was finished before." in again.output
    other = call(command, *arguments, "--encode", "jpeg")
    assert other.exit_code == 64
    assert "holds a finished data set from other images, options or another hash key" in other.output
    assert contents(tmp_path / "out") == before


def test_a_folder_with_anything_else_in_it_is_not_written_to(
    folder: Folder, tmp_path: Path, call: Call, contents: Contents
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out-00000.tar").write_bytes(b"precious")
    result = call(command, "build", "--images", folder(["1.jpg"]), "--output", tmp_path / "out")
    assert result.exit_code == 64
    assert "is not empty and holds no unfinished build; choose an empty place" in result.output
    assert contents(tmp_path / "out") == {"out-00000.tar": b"precious"}


def test_broken_images_are_all_named_by_number_and_hash_and_nothing_is_committed(
    folder: Folder, tmp_path: Path, key: Path, call: Call, contents: Contents
) -> None:
    root = folder([f"DOE^JANE-{n}.jpg" for n in range(8)])
    (root / "DOE^JANE-2.jpg").write_bytes(b"no image")
    (root / "DOE^JANE-5.jpg").write_bytes(b"")
    arguments = ("build", "--images", root, "--shard-samples", 2, "--hash-key-file", key, "--output", tmp_path / "out")
    refused = call(command, *arguments)
    assert refused.exit_code == 65
    third = KeyHasher(b"0123456789abcdef").hash("DOE^JANE-2.jpg")
    assert "2 samples cannot be used" in refused.output
    assert f"row 3 ({third}): not an image of a known kind" in refused.output
    assert "row 6 (" in refused.output
    assert "DOE" not in refused.output
    assert "shards.json" not in contents(tmp_path / "out")

    report = tmp_path / "rejected.csv"
    skipped = call(command, *arguments, "--on-error", "skip", "--report", report)
    assert skipped.exit_code == 0, skipped.output
    assert "Left out 2 samples" in skipped.output
    assert "6 samples in" in skipped.output
    assert ", kept" in skipped.output
    assert "finished before" not in skipped.output
    assert report.stat().st_mode & 0o777 == 0o600
    assert report.read_text().splitlines()[1] == (
        f'3,{third},DOE^JANE-2.jpg,"not an image of a known kind (JPEG, PNG, TIFF, BMP, GIF, WEBP, PPM), or broken"'
    )


def test_a_repaired_image_makes_its_shard_anew_and_keeps_the_others(
    folder: Folder, tmp_path: Path, key: Path, call: Call
) -> None:
    root = folder([f"{n}.jpg" for n in range(8)])
    good = (root / "2.jpg").read_bytes()
    (root / "2.jpg").write_bytes(good[:100])
    arguments = ("build", "--images", root, "--shard-samples", 2, "--hash-key-file", key, "--output", tmp_path / "out")
    assert call(command, *arguments).exit_code == 65
    (root / "2.jpg").write_bytes(good)
    repaired = call(command, *arguments)
    assert repaired.exit_code == 0
    assert repaired.output.count(", kept") == 3


def test_names_that_are_not_utf8_are_read_and_hashed(folder: Folder, tmp_path: Path, call: Call) -> None:
    root = folder(["1.jpg", "2.jpg"])
    try:
        (root / "1.jpg").rename(root / os.fsdecode(b"m\xfcller.jpg"))
    except OSError:
        pytest.skip("this file system has no names that are not UTF-8")
    (root / "2.jpg").write_bytes(b"no image")
    report = tmp_path / "rejected.csv"
    result = call(
        command, "build", "--images", root, "--on-error", "skip", "--report", report, "--output", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert "1 samples in 1 shards" in result.output


def test_a_build_that_lost_its_place_to_another_does_not_finish(
    tmp_path: Path, storage: Storage, hasher: KeyHasher
) -> None:
    """The other build here starts while the only shard is made."""
    output = (tmp_path / "out").as_uri()
    plan = arrange([Row(1, "1", None)], PlanRule())

    def render(row: Row) -> Rendered:
        storage.write(f"{output}/.build/plan.json", b'{"fingerprint":"other"}')
        return Rendered(b"image", "jpg")

    with pytest.raises(SourceError, match="another build writes to"):
        build(plan, DataSetCard("set"), render, output, storage, hasher, BuildRule())
    assert not (tmp_path / "out" / "shards.json").exists()


def test_no_record_speaks_for_a_shard_that_is_being_made(tmp_path: Path, storage: Storage, hasher: KeyHasher) -> None:
    """Else a kill between shard and record, and a return to the first plan, would commit a wrong digest."""
    output = tmp_path / "out"
    records = []

    def render(row: Row) -> Rendered:
        if row.number == 2:
            raise ImageError("broken")
        records.append(sorted(file.name for file in (output / ".build").iterdir()))
        return Rendered(b"image", "jpg")

    for label in ("a", "b"):
        plan = arrange([Row(1, "1", None, label=label), Row(2, "2", None)], PlanRule())
        with pytest.raises(RejectedError):
            build(plan, DataSetCard("set"), render, output.as_uri(), storage, hasher, BuildRule())
        assert (output / ".build" / "set-00000.tar.json").exists()
    assert records == [["plan.json"], ["plan.json"]]


def test_a_report_may_not_lie_in_the_data_set(folder: Folder, tmp_path: Path, call: Call) -> None:
    arguments = ("--output", tmp_path / "out", "--report", tmp_path / "out" / "rejected.csv")
    result = call(command, "build", "--images", folder(["1.jpg"]), *arguments)
    assert result.exit_code == 2
    assert "must lie outside the output" in result.output


def test_what_an_unfinished_build_of_another_plan_left_is_removed(
    folder: Folder, tmp_path: Path, key: Path, call: Call
) -> None:
    root = folder([f"{n}.jpg" for n in range(8)])
    (root / "0.jpg").write_bytes(b"no image")
    arguments = ("build", "--images", root, "--hash-key-file", key, "--output", tmp_path / "out")
    assert call(command, *arguments, "--shard-samples", 1).exit_code == 65
    assert len(list((tmp_path / "out").glob("*.tar"))) == 7
    assert call(command, *arguments, "--shard-samples", 4, "--on-error", "skip").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".build",
        "out-00000.tar",
        "out-00001.tar",
        "shards.json",
    ]
    assert [p.name for p in (tmp_path / "out" / ".build").iterdir()] == ["plan.json"]


def test_frames_are_spread_and_clips_numbered_in_the_manifest(
    folder: Folder, tmp_path: Path, key: Path, call: Call, storage: Storage
) -> None:
    root = folder([f"clip{c}_{f}.jpg" for c in range(3) for f in range(4)])
    arguments = ("--clip-pattern", r"(clip\d)_", "--shard-samples", 3, "--hash-key-file", key)
    assert call(command, "build", "--images", root, *arguments, "--output", tmp_path / "out").exit_code == 0
    manifest = read_manifest((tmp_path / "out" / "shards.json").as_uri(), storage)
    assert [sorted(shard.clips) for shard in manifest.shards] == [[0, 1, 2]] * 4


def test_a_key_is_made_once_outside_the_data_set_for_this_user_only(folder: Folder, tmp_path: Path, call: Call) -> None:
    root = folder(["1.jpg"])
    first = call(command, "build", "--images", root, "--output", tmp_path / "a")
    key = Path(os.environ["XDG_CONFIG_HOME"]) / "sonoforge" / "hash.key"
    assert f"Made a key for patient hashes: {key}" in first.output
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_text().strip()) == 64
    second = call(command, "build", "--images", root, "--output", tmp_path / "b")
    assert "Made a key" not in second.output


def test_the_key_of_the_environment_is_used_and_a_missing_one_is_an_error(
    folder: Folder, tmp_path: Path, key: Path, call: Call, monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    arguments = ("build", "--images", folder(["p1.jpg"]), "--patient-pattern", r"(p\d)", "--output", tmp_path / "out")
    missing = call(command, *arguments, "--hash-key-file", tmp_path / "none")
    assert missing.exit_code == 64
    assert "cannot be read" in missing.output
    monkeypatch.setenv("SONOFORGE_HASH_KEY_FILE", str(key))
    assert call(command, *arguments).exit_code == 0
    manifest = read_manifest((tmp_path / "out" / "shards.json").as_uri(), storage)
    assert manifest.shards[0].patients == (KeyHasher(b"0123456789abcdef").hash("patient\0p1"),)


def test_options_of_another_source_are_refused(folder: Folder, tmp_path: Path, call: Call) -> None:
    root = folder(["1.jpg"])
    result = call(command, "build", "--images", root, "--label-column", "x", "--output", tmp_path / "out")
    assert result.exit_code == 64
    assert "a folder has no columns" in result.output
    result = call(command, "build", "--csv", root / "x.csv", "--label-from-folder", "--output", tmp_path / "out")
    assert result.exit_code == 64
    assert "are for --images" in result.output


@pytest.mark.parametrize(
    ("uri", "code", "message"),
    [("gs://x", 64, "begins with s3:// or file://"), ("file:///none/shards.json", 65, "no such object")],
)
def test_a_data_set_that_is_not_there_ends_with_its_exit_code(call: Call, uri: str, code: int, message: str) -> None:
    result = call(command, "verify", uri)
    assert result.exit_code == code
    assert message in result.output


def test_one_source_must_be_given(tmp_path: Path, call: Call) -> None:
    result = call(command, "build", "--output", tmp_path / "out")
    assert result.exit_code == 64
    assert "give one source: --images FOLDER, --csv FILE or --webdataset URI" in result.output


def test_a_data_set_is_a_source_for_another(
    folder: Folder, tmp_path: Path, key: Path, call: Call, storage: Storage
) -> None:
    """Shards, filtered and cut anew, keep their images to the bit."""
    root = folder([f"{label}/{n}.jpg" for label in ("head", "femur") for n in range(4)])
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ("--label-from-folder", "--hash-key-file", key)
    assert call(command, "build", "--images", root, *arguments, "--output", first).exit_code == 0
    arguments = ("--label-column", "label", "--where", "label=head", "--hash-key-file", key)
    assert call(command, "build", "--webdataset", first, *arguments, "--output", second).exit_code == 0
    manifest = read_manifest((second / "shards.json").as_uri(), storage)
    assert (manifest.classes, manifest.samples) == (("head",), 4)
    images = {sample.image for sample in iterate(manifest, second.as_uri(), storage)}
    assert images == {file.read_bytes() for file in (root / "head").iterdir()}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `sonoforge` in a process of its own; it is killed when the test ends."""
    with contextlib.ExitStack() as stack:

        def run(*arguments: object) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "sonoforge_trainer", *map(str, arguments)],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield run


def test_a_build_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(
    tmp_path: Path,
    key: Path,
    encoded: Callable[..., bytes],
    start: Callable[..., subprocess.Popen[str]],
    contents: Contents,
) -> None:
    """SIGKILL before the first shard, and after 1, 2 and 3 more finished shards while others are being made."""
    root = tmp_path / "source"
    root.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        pixels = rng.integers(0, 65536, (400, 400)).astype(np.uint16)
        (root / f"{number}.tif").write_bytes(encoded(pixels, "TIFF"))
    options = ("--shard-samples", 3, "--hash-key-file", key, "--workers", 2, "--name", "set", "--splits", "0.5,0.2,0.3")

    def run(output: str) -> subprocess.Popen[str]:
        return start("shards", "build", "--images", root, *options, "--output", tmp_path / output)

    undisturbed = run("undisturbed")
    assert undisturbed.wait(180) == 0
    for shards in (0, 1, 2, 3):
        process = run("killed")
        assert process.stderr is not None
        finished = 0
        while finished < shards:
            line = process.stderr.readline()
            assert line, "the build ended before it could be killed"
            finished += line.startswith("set-") and "kept" not in line
        process.kill()
        assert process.wait(180) == -9
        assert "shards.json" not in contents(tmp_path / "killed")
    last = run("killed")
    assert last.stderr is not None
    output = last.stderr.read()
    assert last.wait(180) == 0
    assert output.count(", kept") >= 6
    # A file that a killed process was writing has a name that storage takes for no object.
    left = {name: data for name, data in contents(tmp_path / "killed").items() if ".sonoforge-tmp-" not in name}
    assert left == contents(tmp_path / "undisturbed")
