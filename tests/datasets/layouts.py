"""Writes miniature copies of public sets, in the layout and the formats that their users download."""

from __future__ import annotations

import csv
import gzip
import io
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def speckle(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A gray picture that is different for each seed."""
    return np.clip(np.random.default_rng(seed).rayleigh(60, (height, width)), 0, 255).astype(np.uint8)


def png(path: Path, pixels: np.ndarray | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, "PNG")
    return path


def rgba(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, pixels, pixels, np.full_like(pixels, 255)])


def table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def box(value: int, top: int, left: int, bottom: int, right: int, height: int = 24, width: int = 32) -> np.ndarray:
    pixels = np.zeros((height, width), np.uint8)
    pixels[top:bottom, left:right] = value
    return pixels


def outline(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """The line of an ellipse, as HC18 draws it: 0 and 255, not filled."""
    image = Image.new("L", size)
    ImageDraw.Draw(image).ellipse(box, outline=255, width=2)
    return np.asarray(image)


def mha(path: Path, values: np.ndarray, spacing: Sequence[float], *, compressed: bool = False) -> Path:
    """A MetaImage file as ITK writes it. `values` has its slowest dimension first."""
    kinds = {"uint8": "MET_UCHAR", "int16": "MET_SHORT", "uint16": "MET_USHORT", "float32": "MET_FLOAT"}
    raw = values.astype(values.dtype.newbyteorder("<")).tobytes()
    content = zlib.compress(raw) if compressed else raw
    dims = values.ndim
    lines = [
        "ObjectType = Image",
        f"NDims = {dims}",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        f"CompressedData = {compressed}",
        *([f"CompressedDataSize = {len(content)}"] if compressed else []),
        "TransformMatrix = " + " ".join(str(int(i == j)) for i in range(dims) for j in range(dims)),
        "Offset = " + " ".join("0" for _ in range(dims)),
        "CenterOfRotation = " + " ".join("0" for _ in range(dims)),
        "AnatomicalOrientation = RAI",
        "ElementSpacing = " + " ".join(map(str, spacing)),
        "DimSize = " + " ".join(map(str, values.shape[::-1])),
        f"ElementType = {kinds[str(values.dtype)]}",
        "ElementDataFile = LOCAL",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode() + b"\n" + content)
    return path


def nifti(path: Path, values: np.ndarray, *, order: str = "<", scale: tuple[float, float] = (0.0, 0.0)) -> Path:
    """A NIfTI-1 file of `values` in the order (width, height, ...) that its libraries show."""
    codes = {"uint8": 2, "int16": 4, "float32": 16, "uint16": 512}
    header = bytearray(348)
    struct.pack_into(f"{order}i", header, 0, 348)
    dims = [values.ndim, *values.shape] + [1] * (7 - values.ndim)
    struct.pack_into(f"{order}8h", header, 40, *dims)
    struct.pack_into(f"{order}2h", header, 70, codes[str(values.dtype)], values.dtype.itemsize * 8)
    struct.pack_into(f"{order}8f", header, 76, 1.0, 0.154, 0.308, 1.0, 0, 0, 0, 0)
    struct.pack_into(f"{order}3f", header, 108, 352.0, *scale)
    header[344:348] = b"n+1\0"
    content = bytes(header) + b"\0\0\0\0" + values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def npy(path: Path, value: object) -> Path:
    """What `np.save` writes of a dictionary."""
    file = io.BytesIO()
    np.save(file, value)  # type: ignore[arg-type]  # an object array, with a pickle inside
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())
    return path


FETAL_HEADER = ("Image_name", "Patient_num", "Plane", "Brain_plane", "Operator", "US_Machine", "Train ")
"""With the space that the published table has after its last column."""
_DIGITS = {
    "Other": 1,
    "Fetal abdomen": 2,
    "Fetal brain": 3,
    "Maternal cervix": 4,
    "Fetal femur": 5,
    "Fetal thorax": 6,
}


def fetal_row(patient: int, number: int, plane: str, train: int) -> tuple[object, ...]:
    name = f"Patient{patient:05d}_Plane{_DIGITS[plane]}_{number}_of_99"
    brain = "Trans-ventricular" if plane == "Fetal brain" else "Not A Brain"
    return (name, patient, plane, brain, "Op. 1", "Voluson E6", train)


def fetal_planes(root: Path, patients: Mapping[int, tuple[int, Sequence[str]]]) -> Path:
    """`patients`: number to (Train, planes of the images). Images are RGBA."""
    rows = [
        fetal_row(patient, number, plane, train)
        for patient, (train, planes) in patients.items()
        for number, plane in enumerate(planes, 1)
    ]
    table(root / "FETAL_PLANES_DB_data.csv", FETAL_HEADER, rows, ";")
    for seed, row in enumerate(rows):
        png(root / "Images" / f"{row[0]}.png", rgba(speckle(seed)))
    return root
