"""Identifiers planted in paths, columns and metadata appear nowhere: not on the terminal, not in any byte written."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PLANTED = (b"DOE^JANE", b"Doe_Jane", b"MRN-4711", b"1970-02-31", b"cine-DOE", b"ACC-0815")
"""In folder names, file names, patient, clip and mask columns, unchosen columns, and inside the image files."""


@pytest.fixture
def hospital(tmp_path: Path, encoded: Callable[..., bytes], speckle: Callable[..., np.ndarray]) -> Path:
    """A CSV with good, odd and broken files, all named and tagged with the planted identifiers."""
    folder = tmp_path / "DOE^JANE"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x010E] = "DOE^JANE MRN-4711"
    text = PngInfo()
    text.add_text("Patient", "DOE^JANE born 1970-02-31")
    image = speckle(0)
    files = {
        "plain.jpg": encoded(image, "JPEG", exif=exif, comment=b"MRN-4711"),
        "turned.jpg": encoded(image, "JPEG", progressive=True, exif=exif, comment=b"MRN-4711"),
        "tagged.png": encoded(image, "PNG", pnginfo=text),
        "deep.tif": encoded(image.astype(np.uint16) * 257, "TIFF", tiffinfo={270: "DOE^JANE"}),
        "trailing.jpg": encoded(image, "JPEG") + b"DOE^JANE",
        "colours.gif": encoded(Image.fromarray(image).convert("P"), "GIF", comment=b"DOE^JANE"),
        "broken.jpg": b"\xff\xd8DOE^JANE",
        "cut.png": encoded(image, "PNG", pnginfo=text)[:300],
    }
    rows = []
    for number, (name, data) in enumerate(files.items()):
        (folder / f"Doe_Jane-{name}").write_bytes(data)
        (folder / f"Doe_Jane-{name}.mask.png").write_bytes(
            encoded(np.zeros(image.shape, np.uint8), "PNG", pnginfo=text)
        )
        rows.append(
            {
                "path": f"DOE^JANE/Doe_Jane-{name}",
                "mask": f"DOE^JANE/Doe_Jane-{name}.mask.png",
                "mrn": f"MRN-4711-{number}",
                "cine": f"cine-DOE-{number}",
                "born": "1970-02-31",
                "accession": "ACC-0815",
                "plane": "head",
            }
        )
    rows.append({**rows[0], "path": "DOE^JANE/Doe_Jane-missing.jpg"})
    with (tmp_path / "list.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def _run(hospital: Path, *arguments: str) -> tuple[int, bytes]:
    result = subprocess.run(
        [sys.executable, "-m", "sonoforge_trainer", "shards", *arguments],
        cwd=hospital,
        capture_output=True,
        timeout=180,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_no_identifier_leaves_the_source(hospital: Path) -> None:
    columns = ("--mask-column", "mask", "--patient-column", "mrn", "--clip-column", "cine", "--label-column", "plane")
    build = ("build", "--csv", "list.csv", *columns, "--mask-class", "background", "--splits", "0.6,0.2,0.2")
    output = ("--output", "out", "--shard-samples", "2")
    refused, said = _run(hospital, *build, *output)
    assert refused == 65
    spoken = said
    for arguments in (
        (*build, *output, "--on-error", "skip", "--report", "rejected.csv"),
        ("verify", "out", "--decode"),
        ("inspect", "out"),
        ("inspect", "out", "--json"),
    ):
        code, said = _run(hospital, *arguments)
        assert code == 0, said
        spoken += said
    assert b"Left out 3 samples" in spoken
    written = b"".join(file.read_bytes() for file in (hospital / "out").rglob("*") if file.is_file())
    assert len(written) > 10_000
    for name in PLANTED:
        assert name not in spoken
        assert name not in written
        assert name in b"".join(file.read_bytes() for file in hospital.rglob("*") if file.is_file())
    report = (hospital / "rejected.csv").read_text()
    assert report.count("Doe_Jane") == 3, "the local report is where paths may be"


def test_faults_of_the_source_quote_no_identifier(hospital: Path) -> None:
    """A leak between splits, a wrong split, masks without classes, and another column that identifies."""
    for arguments, message in (
        (("--patient-column", "mrn", "--split-column", "accession"), b"the split is none of"),
        (("--mask-column", "mask"), b"there are masks, but no --mask-class"),
        (("--patient-column", "mrn", "--column", "mrn"), b"--column mrn: this column identifies"),
        (("--path-column", "accession"), b"rows 1 and 2 name the same file"),
    ):
        code, said = _run(hospital, "build", "--csv", "list.csv", "--output", "other", *arguments)
        assert code == 64
        assert message in said
        assert b"Traceback" not in said
        for name in PLANTED:
            assert name not in said


def test_the_first_line_of_a_csv_without_a_header_is_not_quoted(hospital: Path) -> None:
    file = hospital / "list.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    for columns in ((), ("--path-column", "file", "--patient-column", "mrn")):
        code, said = _run(hospital, "build", "--csv", "list.csv", "--output", "other", *columns)
        assert code == 64
        assert b"the first line has 7 cells; is it a header" in said
        for name in PLANTED:
            assert name not in said
