"""CAMUS: apical two- and four-chamber views at end-diastole and end-systole, in NIfTI files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.formats.nifti import read_nifti
from sonoforge_trainer.datasets.importer import About, Importer, Source, find
from sonoforge_trainer.datasets.masks import as_png, renamed
from sonoforge_trainer.datasets.record import MaskPixels, Record, RecordList
from sonoforge_trainer.datasets.splits import by_group
from sonoforge_trainer.datasets.volumes import bytes_of
from sonoforge_trainer.shards.faults import ImageError

VIEWS = {"2CH": "two-chamber", "4CH": "four-chamber"}
PHASES = {"ED": "end-diastole", "ES": "end-systole"}
_PATIENTS = 500

ABOUT = About(
    "camus",
    "CAMUS: cardiac structures in 2D echocardiography",
    "https://humanheart-project.creatis.insa-lyon.fr/database/",
    "unknown; see the source",
    "Leclerc S. et al., Deep learning for segmentation using an open large-scale dataset in 2D echocardiography, IEEE "
    "Transactions on Medical Imaging 38(9), 2198-2210 (2019)",
    ("background", "left ventricle", "myocardium", "left atrium"),
)


def _upright(path: Path) -> NDArray[np.uint8]:
    """One picture, [height, width]: the file's first dimension runs across the picture, the second down."""
    values = read_nifti(path).values
    if values.ndim != 2:
        raise ImageError("holds several frames; only the files of ED and ES are read")
    return bytes_of(values)


@dataclass(frozen=True)
class NiftiImage:
    """One picture."""

    path: Path

    def read(self) -> bytes:
        """A PNG. Raises ImageError."""
        return as_png(_upright(self.path))


@dataclass(frozen=True)
class NiftiMask:
    """One picture of class indices."""

    path: Path
    classes: int
    """Values are below this."""

    def read(self) -> MaskPixels:
        """The class indices. Raises ImageError."""
        return MaskPixels(renamed(_upright(self.path), {value: value for value in range(self.classes)}))


def read(source: Source) -> list[Record]:
    """The ED and ES frame of both views of each patient; half sequences are not read. Raises SourceError."""
    root = _root(source.root)
    found = RecordList()
    patients = sorted(path for path in root.glob("patient*") if path.is_dir())
    for patient in patients:
        for view, view_name in VIEWS.items():
            quality = _quality(patient / f"Info_{view}.cfg")
            for phase, phase_name in PHASES.items():
                stem = f"{patient.name}_{view}_{phase}"
                image, mask = _nifti(patient, stem), _nifti(patient, f"{stem}_gt")
                if image is None or mask is None:
                    source.findings.add("incomplete")
                    continue
                found.add(
                    f"{patient.name}/{stem}",
                    NiftiImage(image),
                    [image, mask],
                    NiftiMask(mask, len(ABOUT.mask_classes)),
                    label=view_name,
                    patient=patient.name,
                    clip=view,
                    fields={"phase": phase_name, "image_quality": quality},
                )
    source.findings.add("count", abs(len(patients) - _PATIENTS))
    return found.records


def _root(given: Path) -> Path:
    return given if any(given.glob("patient*/Info_2CH.cfg")) else find(given, "database_nifti")


def _nifti(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / f"{stem}.nii.gz", folder / f"{stem}.nii") if p.is_file()), None)


def _quality(file: Path) -> str:
    """Good, Medium or Poor, of the lines `Key: value`; `unknown` where the file does not say."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    values = dict(line.replace(" ", "").split(":", 1) for line in lines if ":" in line)
    found = values.get("ImageQuality", "")
    return found if found in ("Good", "Medium", "Poor") else "unknown"


def apex_up(_record: Record, pixels: NDArray[np.uint8]) -> tuple[str, ...]:
    """A sector with its tip at the top has its middle below the middle of the picture, and left and right alike."""
    rows, columns = np.nonzero(pixels if pixels.ndim == 2 else pixels[..., 0])
    if not len(rows):
        return ("lying",)
    down = rows.mean() / pixels.shape[0] - 0.5
    aside = abs(columns.mean() / pixels.shape[1] - 0.5)
    return () if down > aside else ("lying",)


IMPORTER = Importer(
    ABOUT,
    read,
    by_group(
        "drawn by patient: 0.7 train, 0.1 val, 0.2 test; --split takes the published subgroups, which list patients"
    ),
    (
        Check("lying", "warning", "pictures do not have the tip of the sector at the top; were they turned?"),
        Check("incomplete", "warning", "frames lack their image or their mask; they were left out"),
        Check("count", "warning", "patients more or fewer than the published 500"),
    ),
    apex_up,
)
