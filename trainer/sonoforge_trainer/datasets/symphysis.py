"""PSFHS and FH-PS-AOP: single pictures of pubic symphysis and fetal head in MetaImage files, without patients."""

from __future__ import annotations

from functools import partial

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.importer import About, Importer, Source, files, find
from sonoforge_trainer.datasets.record import Record, RecordList
from sonoforge_trainer.datasets.splits import impossible
from sonoforge_trainer.datasets.volumes import MhaImage, MhaMask
from sonoforge_trainer.shards.faults import SourceError

_CLASSES = ("background", "pubic symphysis", "fetal head")

PSFHS = About(
    "psfhs",
    "PSFHS: pubic symphysis and fetal head in intrapartum ultrasound images",
    "https://doi.org/10.5281/zenodo.10969427",
    "unknown; see the source",
    "Chen G. et al., PSFHS: intrapartum ultrasound image dataset for AI-based segmentation of pubic symphysis and "
    "fetal head, Scientific Data 11, 436 (2024)",
    _CLASSES,
)
AOP = About(
    "fh-ps-aop",
    "FH-PS-AOP: pubic symphysis, fetal head and angle of progression",
    "https://doi.org/10.5281/zenodo.7851339",
    "unknown; see the source",
    "Pubic Symphysis-Fetal Head Segmentation and Angle of Progression, challenge data (2023), "
    "doi 10.5281/zenodo.7851339",
    _CLASSES,
)


def read(source: Source, images: int) -> list[Record]:
    """One record a pair of files with the same name. Raises SourceError."""
    folder = find(source.root, "image_mha")
    masks = folder.parent / "label_mha"
    if not masks.is_dir():
        raise SourceError("PATH: found image_mha without label_mha beside it; give the folder of the unpacked download")
    found = RecordList()
    for image in files(folder, ".mha"):
        mask = masks / image.name
        found.add(f"image_mha/{image.name}", MhaImage(image), [image, mask], MhaMask(mask, len(_CLASSES)))
    names = {path.name for path in files(folder, ".mha")}
    source.findings.add("orphans", len({path.name for path in files(masks, ".mha")} - names))
    source.findings.add("count", abs(len(names) - images))
    return found.records


def _importer(about: About, images: int, advice: str) -> Importer:
    checks = (
        Check("orphans", "warning", "masks have no image of the same name"),
        Check("count", "warning", f"images more or fewer than the published {images:,}"),
    )
    return Importer(about, partial(read, images=images), impossible(advice), checks)


PSFHS_IMPORTER = _importer(
    PSFHS, 1358, "give published lists with --split train=FILE --split val=FILE --split test=FILE"
)
AOP_IMPORTER = _importer(
    AOP, 4000, "its images are frames of videos, so neighbours are near-duplicates; give lists by video with --split"
)
