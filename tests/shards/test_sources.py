"""Folders, CSV files and WebDatasets become rows; what does not fit is refused with the row's number."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sonoforge_trainer.shards.faults import SourceError
from sonoforge_trainer.shards.sources import Columns, FolderRule, read_csv, read_folder, read_webdataset
from sonoforge_trainer.storage import Storage

Folder = Callable[..., Path]
Table = Callable[..., Path]


def test_a_folder_is_read_recursively_in_the_order_of_its_paths(folder: Folder) -> None:
    root = folder(["b/2.jpg", "a/1.JPG", "c.jpeg", ".hidden/3.jpg", "a/.4.jpg"])
    (root / "notes.txt").write_text("not an image")
    rows = read_folder(root, FolderRule())
    assert [(row.number, row.reference) for row in rows] == [(1, "a/1.JPG"), (2, "b/2.jpg"), (3, "c.jpeg")]


def test_the_paths_of_a_folder_can_tell_label_patient_and_clip(folder: Folder) -> None:
    root = folder(["head/P7_c2_001.jpg"])
    rule = FolderRule(True, r"(P\d+)_", r"_c(\d+)_")
    row = read_folder(root, rule)[0]
    assert (row.label, row.patient, row.clip) == ("head", "P7", "2")


def test_a_path_without_a_patient_is_named_by_its_number_only(folder: Folder) -> None:
    with pytest.raises(SourceError, match=r"^--patient-pattern does not fit the path of file 1$"):
        read_folder(folder(["doe_jane.jpg"]), FolderRule(patient_pattern=r"(P\d+)_"))


@pytest.mark.parametrize("pattern", ["(", "P\\d+"])
def test_a_pattern_must_be_an_expression_with_a_group(pattern: str) -> None:
    with pytest.raises(SourceError, match=r"--patient-pattern"):
        FolderRule(patient_pattern=pattern)


def test_masks_are_found_by_name_whatever_their_suffix(folder: Folder, tmp_path: Path) -> None:
    images, masks = folder(["a/1.jpg"]), folder(["a/1_seg.png"], "masks")
    row = read_folder(images, FolderRule(masks=masks, mask_suffix="_seg"))[0]
    assert row.mask is not None
    assert row.mask.where == str(tmp_path / "masks/a/1_seg.png")
    with pytest.raises(SourceError, match=r"1 of 1 images have no mask of the same name; check --mask-suffix"):
        read_folder(images, FolderRule(masks=masks))


def test_a_csv_gives_the_named_columns_and_nothing_else(table: Table, tmp_path: Path) -> None:
    row = {"file": "a/1.jpg", "Plane ": " Head ", "mrn": "77", "Train ": "1", "kind": "x", "other": "secret"}
    file = table(tmp_path / "t.csv", [row], delimiter=";")
    columns = Columns(
        path="file", label="Plane", split="Train", patient="mrn", extra=("kind",), split_names={"1": "train"}
    )
    found = read_csv(file, tmp_path, columns, ";")[0]
    assert (found.label, found.split, found.patient, found.fields) == ("Head", "train", "77", (("kind", "x"),))
    assert "secret" not in repr(found)


def test_filters_are_alternatives_in_a_column_and_all_columns_must_agree(table: Table, tmp_path: Path) -> None:
    rows = [{"path": f"{s}{k}.jpg", "s": s, "k": k} for s in ("train", "unlabelled", "test") for k in (1, 2)]
    columns = Columns(where=(("s", "train"), ("s", "unlabelled"), ("k", "1")))
    found = read_csv(table(tmp_path / "t.csv", rows), tmp_path, columns)
    assert [(row.number, row.reference) for row in found] == [(1, "train1.jpg"), (3, "unlabelled1.jpg")]


def test_a_placeholder_is_no_patient(table: Table, tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", [{"path": "1.jpg", "p": "unknown"}])
    assert read_csv(file, tmp_path, Columns(patient="p", unknown_patients=frozenset({"unknown"})))[0].patient == ""


@pytest.mark.parametrize("path", ["/etc/passwd", "../up.jpg", "a/../../up.jpg", ""])
def test_a_path_that_leaves_the_root_is_refused(table: Table, tmp_path: Path, path: str) -> None:
    with pytest.raises(SourceError, match=r"row 1: the path must be relative to the root folder and stay inside it"):
        read_csv(table(tmp_path / "t.csv", [{"path": path}]), tmp_path, Columns())


def test_a_missing_column_is_named_with_the_number_of_cells_of_the_first_line(table: Table, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^there is no column 'plane'; the first line has 2 cells; is it a header"):
        read_csv(table(tmp_path / "t.csv", [{"path": "1.jpg", "label": "x"}]), tmp_path, Columns(label="plane"))


def test_a_file_named_twice_is_refused(table: Table, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^rows 1 and 2 name the same file; keep one of them$"):
        read_csv(table(tmp_path / "t.csv", [{"path": "a//1.jpg"}, {"path": "a/1.jpg"}]), tmp_path, Columns())


def test_a_wrong_delimiter_or_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("path,a\n1.jpg,2,3\n")
    with pytest.raises(SourceError, match=r"row 1: not as many cells as the header has"):
        read_csv(file, tmp_path, Columns())
    file.write_bytes(b"path\n\xff\xfe.jpg\n")
    with pytest.raises(SourceError, match=r"cannot be read as UTF-8"):
        read_csv(file, tmp_path, Columns())


def test_an_unknown_split_is_refused_without_quoting_it(table: Table, tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", [{"path": "1.jpg", "s": "DOE^JANE"}])
    with pytest.raises(SourceError, match=r"row 1: the split is none of train, val, test, unlabelled") as caught:
        read_csv(file, tmp_path, Columns(split="s"))
    assert "DOE" not in str(caught.value)


@pytest.mark.parametrize("name", ["mrn", "path", "clip", "label", "bad name"])
def test_a_column_that_identifies_or_is_taken_cannot_be_kept(name: str) -> None:
    with pytest.raises(SourceError, match=r"--column"):
        Columns(patient="mrn", clip="c", extra=(name,))


def _write_tar(file: Path, parts: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))


def test_a_webdataset_gives_images_masks_and_fields_and_unpickles_nothing(
    tmp_path: Path, storage: Storage, encoded: Callable[..., bytes], speckle: Callable[..., np.ndarray]
) -> None:
    """The extension headers of fractional times, as webdataset writes them, are understood."""
    image, mask = encoded(speckle(1)), encoded(np.zeros((40, 48), np.uint8))
    fields = {"label": "head", "patient": 7, "note": None, "gain": 0.5}
    _write_tar(
        tmp_path / "part-0.tar",
        {
            "x/doe.1.png": image,
            "x/doe.1.pkl": pickle.dumps(_Explosive()),
            "x/doe.jpg": image,
            "x/doe.mask.png": mask,
            "x/doe.json": json.dumps(fields).encode(),
            "x/doe.pyd": pickle.dumps(_Explosive()),
            "y.txt": b"no image",
        },
    )
    columns = Columns(label="label", patient="patient", extra=("gain",), where=(("label", "head"),))
    (row,) = read_webdataset(tmp_path.as_uri(), columns, storage)
    assert (row.number, row.label, row.patient, row.fields) == (1, "head", "7", (("gain", "0.5"),))
    assert row.image is not None
    assert row.mask is not None
    assert (row.image.read(storage), row.mask.read(storage)) == (image, mask)
    with pytest.raises(SourceError, match=r"^there is no column 'note'; the JSON of sample 1 has 3 fields$"):
        read_webdataset(tmp_path.as_uri(), Columns(label="note"), storage)


def test_two_members_of_one_name_are_refused(tmp_path: Path, storage: Storage) -> None:
    _write_tar(tmp_path / "0.tar", {"a.png": b"1", "a.PNG": b"2"})
    with pytest.raises(SourceError, match=r"have the same name; nothing says which counts"):
        read_webdataset(tmp_path.as_uri(), Columns(), storage)


class _Explosive:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a member was unpickled",))


def test_rows_of_a_webdataset_point_into_its_tars(
    tmp_path: Path, storage: Storage, encoded: Callable[..., bytes], speckle: Callable[..., np.ndarray]
) -> None:
    for number in range(2):
        fields = json.dumps({"label": f"class-{number}"}).encode()
        _write_tar(tmp_path / f"{number}.tar", {"doe.jpg": encoded(speckle(number), "JPEG"), "doe.json": fields})
    rows = read_webdataset(tmp_path.as_uri(), Columns(label="label"), storage)
    assert [(row.number, row.label, row.mask) for row in rows] == [(1, "class-0", None), (2, "class-1", None)]
    assert rows[1].image is not None
    assert rows[1].image.read(storage) == encoded(speckle(1), "JPEG")


@pytest.mark.parametrize("fields", [b"{", b"[]", b'{"a": 1}' + b" " * 2**20])
def test_broken_json_is_named_by_its_sample(
    tmp_path: Path, storage: Storage, encoded: Callable[..., bytes], speckle: Callable[..., np.ndarray], fields: bytes
) -> None:
    _write_tar(tmp_path / "0.tar", {"doe.jpg": encoded(speckle()), "doe.json": fields})
    with pytest.raises(SourceError, match=r"^sample 1: its JSON "):
        read_webdataset(tmp_path.as_uri(), Columns(), storage)


def test_a_cut_tar_is_refused(
    tmp_path: Path, storage: Storage, encoded: Callable[..., bytes], speckle: Callable[..., np.ndarray]
) -> None:
    _write_tar(tmp_path / "0.tar", {f"{n}.jpg": encoded(speckle(n)) for n in range(4)})
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[:4096])
    with pytest.raises(SourceError, match=r"0\.tar: "):
        read_webdataset(tmp_path.as_uri(), Columns(), storage)


def test_an_empty_source_is_refused(tmp_path: Path, storage: Storage) -> None:
    for read in (
        lambda: read_folder(tmp_path, FolderRule()),
        lambda: read_webdataset(tmp_path.as_uri(), Columns(), storage),
    ):
        with pytest.raises(SourceError, match=r"no images, or the filters leave none"):
            read()
