"""FETAL_PLANES_DB and its African companion: tables with their quirks, patients, and the published split counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import FETAL_HEADER, fetal_planes, fetal_row, png, rgba, speckle, table

from sonoforge_trainer.datasets.fetal_planes import IMPORTER
from sonoforge_trainer.datasets.findings import Findings
from sonoforge_trainer.datasets.importer import Source
from sonoforge_trainer.datasets.record import Record
from sonoforge_trainer.datasets.splits import draw_exactly, groups_of
from sonoforge_trainer.shards.faults import SourceError
from sonoforge_trainer.shards.images import mode_of

PLANES = {
    "Other": 4213,
    "Fetal brain": 3092,
    "Fetal thorax": 1718,
    "Maternal cervix": 1626,
    "Fetal femur": 1040,
    "Fetal abdomen": 711,
}
"""Images by class of the published table."""


def published_marginals(folder: Path, seed: int) -> Path:
    """A table with the published numbers of rows, halves, patients and classes; who has how many images is made up."""
    draw = random.Random(seed)
    planes = [plane for plane, count in PLANES.items() for _ in range(count)]
    draw.shuffle(planes)
    rows: list[tuple[object, ...]] = []
    for train, images, first in ((1, 7129, 1), (0, 5271, 897)):
        owners = list(range(first, first + 896))
        # One image for everybody; the rest by weights as uneven as those of real examinations.
        weights = [draw.gammavariate(2.0, 1.0) for _ in owners]
        owners += draw.choices(owners, weights, k=images - 896)
        rows += [fetal_row(owner, number, planes.pop(), train) for number, owner in enumerate(owners, 1)]
    draw.shuffle(rows)
    return table(folder / "FETAL_PLANES_DB_data.csv", FETAL_HEADER, rows, ";").parent


def split_of(root: Path, seed: int = 0) -> tuple[list[Record], Findings]:
    findings = Findings(IMPORTER.checks)
    records = IMPORTER.read(Source(root, root, findings))
    assert IMPORTER.split.apply is not None
    return IMPORTER.split.apply(records, groups_of(records, {}), seed), findings


@pytest.mark.parametrize("seed", [0, 1])
def test_a_table_with_the_published_marginals_gets_the_published_split_counts(tmp_path: Path, seed: int) -> None:
    records, findings = split_of(published_marginals(tmp_path, seed))
    assert Counter(r.row.split for r in records) == {"train": 5804, "val": 1325, "test": 5271}
    patients = {split: {r.row.patient for r in records if r.row.split == split} for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in patients.items()} == {"train": 716, "val": 180, "test": 896}
    assert not patients["train"] & patients["val"] | patients["test"] & (patients["train"] | patients["val"])
    assert Counter(r.row.label for r in records) == PLANES
    assert {f.check.code: f.count for f in findings.all() if f.count} == {"header-space": 1}


def test_the_split_is_the_same_for_ever_and_another_seed_draws_other_patients(tmp_path: Path) -> None:
    root = published_marginals(tmp_path, 0)
    chosen = [
        sorted({int(r.row.patient) for r in split_of(root, seed)[0] if r.row.split == "val"})[:8] for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] == FIRST_OF_SEED_0
    assert chosen[0] != chosen[2]


FIRST_OF_SEED_0 = [1, 3, 6, 18, 29, 32, 35, 39]
"""The first val patients of the made-up table of seed 0."""


def test_an_exact_draw_is_exact_or_refused() -> None:
    sizes = {f"p{n}": 1 + n % 7 for n in range(60)}
    chosen = draw_exactly(sizes, 12, 40, seed=3)
    assert (len(chosen), sum(sizes[name] for name in chosen)) == (12, 40)
    with pytest.raises(SourceError, match="no draw of 12 of 60 patients has 500 images"):
        draw_exactly(sizes, 12, 500, seed=3)
    with pytest.raises(SourceError, match="no draw"):
        draw_exactly(dict.fromkeys("abcdef", 2), 3, 7, seed=0, tries=20)


MINI = {
    1: (1, ["Other", "Fetal brain", "Fetal brain"]),
    2: (1, ["Fetal femur"]),
    3: (1, ["Fetal abdomen", "Maternal cervix"]),
    4: (1, ["Fetal thorax"]),
    5: (1, ["Other"]),
    6: (0, ["Other", "Fetal femur"]),
    7: (0, ["Fetal brain"]),
}


def test_a_copy_of_the_download_becomes_an_evaluation_set(tmp_path: Path, imported: Callable[..., Any]) -> None:
    found = imported("fetal-planes", fetal_planes(tmp_path / "FETAL_PLANES_ZENODO", MINI))
    assert Counter(s.fields["label"] for s in found.samples) == Counter(
        p for _, planes in MINI.values() for p in planes
    )
    assert {s.fields["split"] for s in found.samples} == {"train", "val", "test"}
    assert sum(s.fields["split"] == "test" for s in found.samples) == 3
    assert {s.fields["machine"] for s in found.samples} == {"Voluson E6"}
    assert {mode_of(s.image) for s in found.samples} == {"L"}
    assert len({s.fields["patient"] for s in found.samples}) == 7
    assert found.manifest.licence == "CC BY 4.0"
    assert "Burgos-Artizzu" in found.manifest.citation
    assert found.found == {"header-space": 1, "rows": 12400 - 11, "alpha": 11, "class-missing": 9}
    assert found.card["splits"]["test"] == {
        "samples": 3,
        "patients": 2,
        "clips": 0,
        "masks": 0,
        "labels": {"Fetal brain": 1, "Fetal femur": 1, "Other": 1},
    }
    assert "note: alpha: 11 images have an alpha channel; they were laid over black" in found.output
    assert "nothing found: rows-twice, patient-name" in found.output
    assert "Patient000" not in found.output


def test_published_lists_decide_and_what_they_leave_out_is_said(tmp_path: Path, imported: Callable[..., Any]) -> None:
    root = fetal_planes(tmp_path / "set", MINI)
    name = "Patient{:05d}_Plane{}_{}_of_99".format
    lists = []
    for split, names in {
        "train": [name(1, 1, 1), name(1, 3, 2), name(2, 5, 1)],
        "val": [name(3, 2, 1), name(3, 4, 2)],
        "test": [name(7, 3, 1)],
    }.items():
        file = table(
            tmp_path / f"{split}_split.csv", ("Image_name", "Patient_num", "label"), [(n, 0, 1) for n in names]
        )
        lists += ["--split", f"{split}={file}"]
    found = imported("fetal-planes", root, *lists)
    assert Counter(s.fields["split"] for s in found.samples) == {"train": 3, "val": 2, "test": 1}
    assert found.found["unlisted"] == 5
    assert found.card["splitRule"] == "published lists, given with --split"


def test_lists_that_do_not_fit_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    root = fetal_planes(tmp_path / "set", MINI)
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("Patient00001_Plane1_1_of_99\nPatient00099_Plane1_1_of_99\n")
    assert "--split train: 1 names of the list are not in the set" in refused(
        "fetal-planes", root, "--split", f"train={one}"
    )
    one.write_text("Patient00001_Plane1_1_of_99.png\n")
    two.write_text("1\n")  # the patient
    both = ("--split", f"train={one}", "--split", f"test={two}")
    assert "in the lists of both train and test" in refused("fetal-planes", root, *both)
    assert "--split other: allowed: train, val, test" in refused("fetal-planes", root, "--split", f"other={one}")
    two.write_text("Patient00001_Plane3_2_of_99\n")
    leak = refused("fetal-planes", root, *both)
    assert "warning: patient-splits: 1 patients are in more than one split" in leak
    assert "1 patient is in more than one split" in leak


def test_identical_pictures_are_found_and_do_not_reach_two_splits(tmp_path: Path, imported: Callable[..., Any]) -> None:
    """Patient 2's picture is also patient 6's, who is in test; patient 1 has one picture under two planes."""
    root = fetal_planes(tmp_path / "set", MINI)
    images = root / "Images"
    png(images / "Patient00002_Plane5_1_of_99.png", speckle(100))
    png(images / "Patient00006_Plane5_2_of_99.png", rgba(speckle(100)))  # other bytes, same pixels
    (images / "Patient00001_Plane3_2_of_99.png").write_bytes((images / "Patient00001_Plane1_1_of_99.png").read_bytes())
    private = tmp_path / "findings.csv"
    found = imported("fetal-planes", root, "--findings", private)
    expected = {"duplicates": 2, "duplicate-splits": 1, "duplicate-labels": 1, "duplicate-patients": 1}
    assert {code: count for code, count in found.found.items() if code.startswith("duplicate")} == expected
    assert len(found.samples) == 10
    assert sum(s.fields["split"] == "test" for s in found.samples) == 3
    assert "duplicate-splits,Images/Patient00002_Plane5_1_of_99.png" in private.read_text().splitlines()
    assert private.stat().st_mode & 0o777 == 0o600


def test_a_wrong_table_is_refused_with_the_column_and_the_row(tmp_path: Path, refused: Callable[..., str]) -> None:
    root = tmp_path / "set"
    file = table(root / "FETAL_PLANES_DB_data.csv", FETAL_HEADER, [fetal_row(1, 1, "Other", 1)], ",")
    assert "there is no column Image_name or Patient_num" in refused("fetal-planes", root)
    table(file, FETAL_HEADER, [fetal_row(1, 1, "Other", 1), fetal_row(2, 1, "Other", 2)], ";")
    assert "row 2: Train: found something that is neither 0 nor 1" in refused("fetal-planes", root)
    file.write_text(file.read_text().replace("Other;Not", "Elbow;Not"))
    assert "row 1: Plane: not one of Fetal abdomen" in refused("fetal-planes", root)
    file.unlink()
    assert "found no file FETAL_PLANES_DB_data.csv" in refused("fetal-planes", root)
    table(file, FETAL_HEADER, [("../x", 1, "Other", "", "", "", 1)], ";")
    assert "row 1: Image_name: found something that is no plain file name" in refused("fetal-planes", root)


def test_a_table_without_its_header_is_refused_without_quoting_its_first_line(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    table(tmp_path / "set" / "FETAL_PLANES_DB_data.csv", ("DOE^JANE", "MRN-4711"), [("DOE^JOHN", "MRN-4712")], ";")
    said = refused("fetal-planes", tmp_path / "set")
    assert "the first line has 2 cells; is it the header?" in said
    assert "DOE" not in said
    assert "MRN" not in said


def test_a_missing_picture_is_refused_or_left_out(
    tmp_path: Path, imported: Callable[..., Any], refused: Callable[..., str]
) -> None:
    root = fetal_planes(tmp_path / "set", MINI)
    (root / "Images" / "Patient00001_Plane1_1_of_99.png").unlink()
    png(root / "Images" / "Patient00001_Plane1_9_of_99.png", speckle(9))
    said = refused("fetal-planes", root)
    assert "1 samples cannot be used" in said
    assert "Patient00001" not in said
    found = imported("fetal-planes", root, "--on-error", "skip")
    assert (found.found["unreadable"], found.found["not-in-table"], len(found.samples)) == (1, 1, 10)
    assert sum(split["samples"] for split in found.card["splits"].values()) == 10


CODES = {"Algeria": "DZA", "Egypt": "EGY", "Ghana": "GHA", "Malawi": "MWI", "Uganda": "UGA"}


def african_planes(root: Path) -> Path:
    """Two patients a centre, with the same numbers in every centre."""
    folder = root / "Zenodo_dataset"
    rows = []
    for centre, code in CODES.items():
        for patient in (1, 2):
            for plane, name in enumerate(("Fetal abdomen", "Fetal brain", "Fetal femur")):
                stem = f"patient{patient:03d}_{code}_plane{plane}"
                rows.append((patient, name, int(patient == 1), centre, stem))
                png(folder / centre / f"{stem}.png", speckle(len(rows)))
    table(folder / "African_planes_database.csv", ("Patient_num", "Plane", "Train", "Center", "Filename"), rows)
    return root


def test_african_patients_are_keyed_by_centre(tmp_path: Path, imported: Callable[..., Any]) -> None:
    found = imported("african-planes", african_planes(tmp_path / "download"))
    assert found.found == {"rows": 420, "patient-numbers": 2}
    assert {
        centre: len({s.fields["patient"] for s in found.samples if s.fields["centre"] == centre}) for centre in CODES
    }
    assert len({s.fields["patient"] for s in found.samples}) == 10
    splits = {s.fields["patient"]: s.fields["split"] for s in found.samples}
    assert Counter(splits.values()) == {"train": 7, "val": 1, "test": 2}
    assert all(s.fields["split"] == splits[s.fields["patient"]] for s in found.samples)
    assert Counter(s.fields["published_split"] for s in found.samples) == {"train": 15, "test": 15}


def test_pictures_that_two_african_patients_share_stay_in_one_split(
    tmp_path: Path, imported: Callable[..., Any]
) -> None:
    """Byte-identical pictures join their patients for the draw, so that nothing has to be left out."""
    root = african_planes(tmp_path / "download")
    folder = root / "Zenodo_dataset"
    pictures = sorted(folder.glob("*/patient00?_*_plane0.png"))
    for path in pictures[1:4]:
        path.write_bytes(pictures[0].read_bytes())
    found = imported("african-planes", root)
    assert (found.found["duplicates"], found.found["duplicate-patients"]) == (3, 1)
    assert "duplicate-splits" not in found.found
    assert len(found.samples) == 30
