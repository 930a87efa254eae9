"""The importers turn labelled sets into evaluation shards; real ones where the images are at hand."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from sonoforge_trainer.contract import ShardManifest
from sonoforge_trainer.datasets.cli import command
from sonoforge_trainer.shards.cli import command as shards
from sonoforge_trainer.shards.images import decode
from sonoforge_trainer.shards.reader import Sample, iterate, read_manifest
from sonoforge_trainer.storage import Storage

Call = Callable[..., Result]
Folder = Callable[..., Path]
Table = Callable[..., Path]


def _read(folder: Path, storage: Storage) -> tuple[ShardManifest, list[Sample]]:
    manifest = read_manifest((folder / "shards.json").as_uri(), storage)
    return manifest, list(iterate(manifest, folder.as_uri(), storage))


def test_a_csv_becomes_an_evaluation_set(
    folder: Folder, table: Table, tmp_path: Path, call: Call, storage: Storage
) -> None:
    root = folder([f"{n}.jpg" for n in range(12)])
    rows = [
        {"file": f"{n}.jpg", "plane": "ab"[n % 2], "who": f"w{n // 2}", "split": ("train", "test")[n > 7], "one": n % 3}
        for n in range(12)
    ]
    arguments = (
        "--path-column",
        "file",
        "--label-column",
        "plane",
        "--patient-column",
        "who",
        "--split-column",
        "split",
    )
    options = ("--column", "one", "--validation", 0.25, "--licence", "CC BY 4.0", "--citation", "Someone 2020")
    file = table(tmp_path / "list.csv", rows)
    result = call(command, "import", "csv", file, "--root", root, *arguments, *options, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    manifest, samples = _read(tmp_path / "out", storage)
    assert (manifest.licence, manifest.citation, manifest.classes) == ("CC BY 4.0", "Someone 2020", ("a", "b"))
    assert Counter(s.fields["split"] for s in samples) == {"train": 6, "val": 2, "test": 4}
    assert Counter(s.fields["one"] for s in samples) == {"0": 4, "1": 4, "2": 4}
    assert set(samples[0].fields) == {"label", "split", "clip", "patient", "one"}


def test_rows_without_a_label_are_refused(folder: Folder, table: Table, tmp_path: Path, call: Call) -> None:
    root = folder(["0.jpg", "1.jpg"])
    file = table(root / "list.csv", [{"path": "0.jpg", "plane": "a"}, {"path": "1.jpg", "plane": " "}])
    options = ("--splits", "0.5,0,0.5", "--output", tmp_path / "out")
    result = call(command, "import", "csv", file, "--label-column", "plane", *options)
    assert result.exit_code == 64
    assert "1 rows have no label; choose labelled rows with --where" in result.output
    result = call(command, "import", "csv", file, "--output", tmp_path / "out")
    assert "an evaluation set has labels or masks" in result.output
    result = call(command, "import", "csv", file, "--label-column", "plane", "--output", tmp_path / "out")
    assert "an evaluation set has splits" in result.output


def test_two_folders_become_a_set_with_masks(
    folder: Folder, tmp_path: Path, call: Call, storage: Storage, encoded: Callable[..., bytes]
) -> None:
    images = folder([f"p{n}/{n}.jpg" for n in range(6)])
    for number in range(6):
        file = tmp_path / "masks" / f"p{number}" / f"{number}_m.png"
        file.parent.mkdir(parents=True)
        pixels = np.zeros((40, 48), np.uint8)
        pixels[:number] = 255
        file.write_bytes(encoded(pixels))
    arguments = (
        "--images",
        images,
        "--masks",
        tmp_path / "masks",
        "--mask-suffix",
        "_m",
        "--patient-pattern",
        r"(p\d)/",
    )
    classes = ("--mask-class", "background", "--mask-class", "head")
    call_it = ("import", "masks", *arguments, *classes, "--output", tmp_path / "out")
    assert "draw them by patient with --splits" in call(command, *call_it).output
    refused = call(command, *call_it, "--splits", "0.5,0.2,0.3")
    assert refused.exit_code == 65
    assert "the mask has the value 255, but there are 2 mask classes" in refused.output
    assert call(command, *call_it, "--splits", "0.5,0.2,0.3", "--mask-value", "255=1").exit_code == 0
    manifest, samples = _read(tmp_path / "out", storage)
    assert manifest.mask_classes == ("background", "head")
    assert sorted(int(decode(s.mask or b"").sum()) for s in samples) == [0, 48, 96, 144, 192, 240]
    assert Counter(s.fields["split"] for s in samples) == {"train": 3, "val": 1, "test": 2}


def test_the_real_mini_set_becomes_shards(real: Path, tmp_path: Path, call: Call, storage: Storage) -> None:
    """Livers with labels and masks from one CSV of four sources; JPEG bytes are those of the files."""
    arguments = ("--path-column", "image", "--mask-column", "mask", "--label-column", "label_name")
    options = ("--split-column", "split", "--where", "source=aul_liver", "--column", "source")
    classes = ("--mask-class", "background", "--mask-class", "liver")
    command_line = ("import", "csv", real / "mini" / "mini.csv", "--root", real, *arguments, *options, *classes)
    result = call(command, *command_line, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    manifest, samples = _read(tmp_path / "out", storage)
    assert manifest.classes == ("benign", "malignant", "normal")
    assert Counter((s.fields["split"], s.fields["label"]) for s in samples) == {
        (split, label): count
        for split, count in {"train": 8, "test": 4}.items()
        for label in ("benign", "malignant", "normal")
    }
    # The only change is that metadata is dropped, and these files have none.
    assert {s.image for s in samples} == {f.read_bytes() for f in (real / "mini/images/aul_liver").iterdir()}
    assert all(s.mask and set(np.unique(decode(s.mask))) <= {0, 1} for s in samples)
    assert call(shards, "verify", tmp_path / "out", "--decode").exit_code == 0


@pytest.mark.parametrize(
    ("table", "arguments", "splits"),
    [
        (
            "classification/aul_liver.csv",
            "--path-column image --label-column label_name --patient-column subject --split-column split "
            "--column one_scanner --where one_scanner=1 --where split=test",
            {"test": 48},
        ),
        (
            "segmentation/hc18_head.csv",
            "--path-column image --mask-column mask --patient-column subject --split-column split --validation 0.1 "
            "--column head_circumference_mm --mask-class background --mask-class head --where mask_from=fill",
            {"train": 709, "val": 80, "test": 206},
        ),
    ],
)
def test_the_real_sets_become_shards(
    real: Path, tmp_path: Path, call: Call, storage: Storage, table: str, arguments: str, splits: dict[str, int]
) -> None:
    if not (real / table).is_file():
        pytest.skip(f"{table} of the real ultrasound images is not there")
    result = call(
        command, "import", "csv", real / table, "--root", real, *arguments.split(), "--output", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    _, samples = _read(tmp_path / "out", storage)
    assert Counter(s.fields["split"] for s in samples) == splits


def test_the_real_pool_becomes_pretraining_shards(real: Path, tmp_path: Path, call: Call, storage: Storage) -> None:
    """train and unlabelled rows only; near-duplicates are clips; the placeholder for unknown patients is no patient."""
    arguments = "--patient-column subject --split-column split --clip-column near_dup_group --column source"
    where = "--where split=train --where split=unlabelled --unknown-patient usgra_nerve:unknown --shard-samples 300"
    if not (real / "pool" / "manifest.csv").is_file():
        pytest.skip("the pool of the real ultrasound images is not there")
    source = ("--csv", real / "pool" / "manifest.csv", "--root", real)
    result = call(shards, "build", *source, *arguments.split(), *where.split(), "--output", tmp_path / "pool")
    assert result.exit_code == 0, result.output
    manifest, samples = _read(tmp_path / "pool", storage)
    assert Counter(s.fields["split"] for s in samples) == {"train": 1511, "unlabelled": 674}
    assert sum(patient == "" for shard in manifest.shards for patient in shard.patients) == 204
    assert len({clip for shard in manifest.shards for clip in shard.clips}) == 2176
