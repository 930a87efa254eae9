"""Folders of classes and COCO files become evaluation sets, and every generic form is checked like a known set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import png, speckle, table

from sonoforge_trainer.contract import Evaluation
from sonoforge_trainer.datasets.cli import command
from sonoforge_trainer.datasets.registry import IMPORTERS
from sonoforge_trainer.evaluate.dataset import scan, select
from sonoforge_trainer.shards.images import decode
from sonoforge_trainer.storage import Storage

Import = Callable[..., Any]


def classes(root: Path, prefix: str = "", first: int = 0) -> Path:
    for patient in range(6):
        for image in range(2):
            png(root / prefix / "ab"[patient % 2] / f"P{patient}_{image}.png", speckle(first + 2 * patient + image))
    return root


def test_folders_of_classes_are_split_by_patient(tmp_path: Path, imported: Import) -> None:
    pattern = ("--patient-pattern", r"/(P\d)_")
    found = imported("folders", classes(tmp_path / "set"), *pattern, "--splits", "0.5,0.2,0.3")
    assert Counter(s.fields["label"] for s in found.samples) == {"a": 6, "b": 6}
    splits = {s.fields["patient"]: s.fields["split"] for s in found.samples}
    assert Counter(splits.values()) == {"train": 3, "val": 1, "test": 2}
    assert found.found == {"class-missing": 2}  # val has one patient, and so one class; so has train or test
    assert found.card["splitRule"] == "drawn by patient: 0.5 train, 0.2 val, 0.3 test; seed 0"


def test_folders_of_splits_with_classes_below_are_taken_as_they_are(
    tmp_path: Path, imported: Import, refused: Callable[..., str]
) -> None:
    for number, split in enumerate(("train", "val", "test")):
        classes(tmp_path / "set", split, 100 * number)
    found = imported("folders", tmp_path / "set")
    assert Counter(found.by("split", "label")) == {
        (split, label): 6 for split in ("train", "val", "test") for label in "ab"
    }
    assert found.found == {"no-patient": 36}
    leak = refused("folders", tmp_path / "set", "--patient-pattern", r"/(P\d)_")
    assert "warning: patient-splits: 6 patients are in more than one split" in leak


def test_folders_without_splits_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "an evaluation set has splits: give folders train, val and test" in refused(
        "folders", classes(tmp_path / "set")
    )


def test_a_picture_in_two_splits_is_kept_where_it_matters_most(
    tmp_path: Path, imported: Import, storage: Storage
) -> None:
    """An evaluation, which refuses pictures in two splits, takes what is left."""
    for number, split in enumerate(("train", "val", "test")):
        classes(tmp_path / "set", split, 100 * number)
    source = (tmp_path / "set/test/a/P0_0.png").read_bytes()
    for copy in ("train/a/P0_0.png", "train/b/P1_0.png", "val/a/P2_0.png"):
        (tmp_path / "set" / copy).write_bytes(source)
    found = imported("folders", tmp_path / "set")
    assert (found.found["duplicates"], found.found["duplicate-splits"], found.found["duplicate-labels"]) == (3, 3, 1)
    assert Counter(s.fields["split"] for s in found.samples) == {"train": 10, "val": 11, "test": 12}
    assert {name: count["samples"] for name, count in found.card["splits"].items()} == {
        "train": 10,
        "val": 11,
        "test": 12,
    }
    uri = (tmp_path / "out" / "shards.json").as_uri()
    table_of = scan(found.manifest, uri, storage, lambda _row, _record, _image: None)
    evaluation = Evaluation(name="folders", shards=uri, protocols=("knn",))
    assert select(table_of, evaluation).counts == {"train": 10, "val": 11, "test": 12}


def test_a_class_that_a_split_lacks_is_told(tmp_path: Path, imported: Import) -> None:
    for number, split in enumerate(("train", "val", "test")):
        classes(tmp_path / "set", split, 100 * number)
    png(tmp_path / "set" / "train" / "rare" / "P9_0.png", speckle(999))
    found = imported("folders", tmp_path / "set")
    assert found.found == {"no-patient": 37, "class-missing": 2}


POLYGON = [4, 4, 11, 4, 11, 9, 4, 9]
"""Columns 4 to 11, rows 4 to 9, border included: 48 pixels."""


def runs(pixels: np.ndarray) -> list[int]:
    """COCO's run lengths: down the columns, background first."""
    flat = pixels.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return np.diff(np.concatenate([[0], edges])).tolist()


def as_text(counts: list[int]) -> str:
    """COCO's text form of run lengths, written from its description."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            code, value = value & 31, value >> 5
            more = not (value == 0 and not code & 16) and not (value == -1 and code & 16)
            text += chr((code | 32 if more else code) + 48)
    return text


def coco(root: Path, split: str, outlines: list[list[tuple[int, Any]]], first: int = 0) -> Path:
    """`outlines`: for each image its annotations, as category id and segmentation."""
    images, annotations = [], []
    for number, mine in enumerate(outlines):
        png(root / "images" / f"{split}_{number}.png", speckle(first + number))
        images.append({"id": 10 + number, "file_name": f"{split}_{number}.png", "width": 32, "height": 24})
        annotations += [
            {
                "id": len(annotations) + n,
                "image_id": 10 + number,
                "category_id": c,
                "segmentation": s,
                "bbox": [0, 0, 1, 1],
            }
            for n, (c, s) in enumerate(mine)
        ]
    categories = [{"id": 7, "name": "head"}, {"id": 3, "name": "symphysis"}]
    file = root / f"{split}.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def test_coco_outlines_become_index_masks(tmp_path: Path, imported: Import) -> None:
    """Polygons, run lengths as numbers and as text, and two structures on top of each other."""
    shape = np.random.default_rng(1).random((24, 32)) < 0.4
    kinds = [
        [(3, [POLYGON])],
        [(7, {"size": [24, 32], "counts": runs(shape)})],
        [(7, {"size": [24, 32], "counts": as_text(runs(shape))})],
        [(3, [POLYGON]), (7, [[8, 4, 11, 4, 11, 9, 8, 9]])],
        [],
    ]
    files = [f"{s}={coco(tmp_path, s, kinds, 10 * n)}" for n, s in enumerate(("train", "val", "test"))]
    found = imported("coco", files[0], *files[1:], "--images", tmp_path / "images", "--label-from-category")
    assert found.manifest.mask_classes == ("background", "symphysis", "head")
    assert found.found == {"overlap": 3, "several-labels": 3, "mask-empty": 3, "no-patient": 15}
    assert Counter(found.by("split", "label")) == {
        (split, label): count
        for split in ("train", "val", "test")
        for label, count in {"symphysis": 1, "head": 2, "": 2}.items()
    }
    masks = [decode(s.mask) for s in found.samples if s.fields["split"] == "test"]
    heads = [mask for mask in masks if (mask == 2).sum() > 100]
    assert len(heads) == 2
    assert all(((mask == 2) == shape).all() for mask in heads)
    assert sorted((int((m == 1).sum()), int((m == 2).sum())) for m in masks if m.any())[-2:] == [(24, 24), (48, 0)]


def test_coco_with_one_file_is_drawn_and_boxes_are_told(
    tmp_path: Path, imported: Import, refused: Callable[..., str]
) -> None:
    file = coco(tmp_path, "p", [[(3, [POLYGON])], [(7, [])], [(7, [POLYGON])]])
    options = ("--images", tmp_path / "images")
    assert "an evaluation set has splits" in refused("coco", file, *options)
    found = imported("coco", file, *options, "--splits", "0.4,0.3,0.3", "--patient-pattern", r"p_(\d)")
    assert found.found == {"boxes": 1, "mask-empty": 1}
    assert {s.fields["split"] for s in found.samples} == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("outline", "said"),
    [
        ([[1, 2, 3, 4]], "fewer than three points"),
        ({"size": [24, 32], "counts": [5, 5]}, "do not fill the image"),
        ({"size": [24, 31], "counts": [744]}, "of another size than the image"),
        ({"size": [24, 32], "counts": "~~~"}, "neither polygons nor run lengths"),
        ("text", "neither polygons nor run lengths"),
    ],
)
def test_broken_outlines_are_refused(tmp_path: Path, refused: Callable[..., str], outline: Any, said: str) -> None:
    file = coco(tmp_path, "p", [[(3, outline)], [(3, [POLYGON])], [(3, [POLYGON])]])
    assert said in refused("coco", file, "--images", tmp_path / "images", "--splits", "0.4,0.3,0.3")


def test_coco_files_that_are_none_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "a.json"
    options = ("--images", tmp_path, "--splits", "0.4,0.3,0.3")
    for content, said in (
        ("{", "cannot be read as JSON"),
        ("[]", "images: needs a list of objects with id, file_name"),
        ('{"images": [], "annotations": [], "categories": []}', "categories: needs 1 to 254"),
    ):
        file.write_text(content)
        assert said in refused("coco", file, *options)


def test_a_table_is_checked_like_a_known_set(tmp_path: Path, imported: Import) -> None:
    """A CSV with drawn splits: identical pictures of two patients stay together."""
    rows = []
    for number in range(8):
        png(tmp_path / "set" / f"{number}.png", speckle(0 if number == 5 else number))
        rows.append((f"{number}.png", "ab"[number % 2], f"w{number}"))
    file = table(tmp_path / "set" / "list.csv", ("path", "plane", "who"), rows)
    options = ("--label-column", "plane", "--patient-column", "who", "--splits", "0.5,0.2,0.3")
    found = imported("csv", file, *options, "--licence", "CC0", "--citation", "Someone")
    assert found.found == {"duplicates": 1, "duplicate-patients": 1, "duplicate-labels": 1, "class-missing": 1}
    assert len(found.samples) == 8
    assert (found.card["licence"], found.card["citation"]) == ("CC0", "Someone")


def test_the_list_names_every_set_with_its_licence(call: Callable[..., Any]) -> None:
    result = call(command, "list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()[::2]] == list(IMPORTERS)
    assert list(IMPORTERS) == [
        "fetal-planes",
        "african-planes",
        "hc18",
        "jnu-ifm",
        "fass",
        "psfhs",
        "fh-ps-aop",
        "acouslic",
        "busi",
        "camus",
    ]
    assert "CC BY-NC-SA 4.0; https://doi.org/10.5281/zenodo.12697994" in result.output
    helps = call(command, "import", "camus", "--help").output
    assert "Mask values are 0 background, 1 left ventricle" in helps


def test_an_import_that_is_repeated_changes_nothing(
    tmp_path: Path, imported: Import, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    root = classes(tmp_path / "set")
    options = ("--splits", "0.5,0.2,0.3", "--patient-pattern", r"/(P\d)_")
    first = imported("folders", root, *options)
    files = contents(tmp_path / "out")
    (tmp_path / "out" / "card.json").unlink()  # as after a kill between the shards and the card
    again = imported("folders", root, *options)
    assert "Nothing to do: this data set was finished before" in again.output
    assert first.card == again.card
    assert files == contents(tmp_path / "out")
