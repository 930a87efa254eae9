"""ACOUSLIC-AI: blind sweeps over the fetal abdomen; the few annotated frames of each volume are taken out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.formats.metaimage import frames, read_header
from sonoforge_trainer.datasets.importer import About, Importer, Source, find
from sonoforge_trainer.datasets.masks import ValueMask
from sonoforge_trainer.datasets.record import ImageFile, Record, RecordList
from sonoforge_trainer.datasets.splits import by_group
from sonoforge_trainer.datasets.tables import plain_name, read_table
from sonoforge_trainer.datasets.volumes import bytes_of
from sonoforge_trainer.shards.faults import ImageError, SourceError

TABLE = "fetal_abdominal_circumferences_per_sweep.csv"
OPTIMAL, SUBOPTIMAL = "optimal plane", "sub-optimal plane"
_VALUES = {0: 0, 1: 1, 2: 1}

ABOUT = About(
    "acouslic",
    "ACOUSLIC-AI: fetal abdomen in blind ultrasound sweeps",
    "https://doi.org/10.5281/zenodo.12697994",
    "CC BY-NC-SA 4.0",
    "Sappia M.S. et al., ACOUSLIC-AI: abdominal circumference operator-agnostic ultrasound measurement in low-income "
    "countries, challenge data (2024), doi 10.5281/zenodo.12697994",
    ("background", "fetal abdomen"),
)


@dataclass(frozen=True)
class Annotated:
    """One frame that was taken out."""

    number: int
    """Its place in the volume, from 0."""
    values: tuple[int, ...]
    """Mask values that it has beside 0: 1 is the optimal plane, 2 a sub-optimal one."""
    image: Path
    mask: Path


def read(source: Source) -> list[Record]:
    """One record an annotated frame. Every volume is read once, a frame in memory at a time. Raises SourceError."""
    images = find(source.root, "stacked_fetal_ultrasound")
    masks = find(source.root, "stacked_fetal_abdomen")
    table = read_table(find(source.root, TABLE, "file"), ("uuid", "subject_id"))
    volumes = []
    for number, row in enumerate(table.rows, 1):
        name = plain_name(row["uuid"], f"{TABLE}: row {number}: uuid") + ".mha"
        if (images / name).is_file() and (masks / name).is_file():
            volumes.append((row, images / name, masks / name))
        else:
            source.findings.add("no-volume")
    if not volumes:
        raise SourceError(f"PATH: none of the volumes of {TABLE} is there; give the folder of the unpacked download")
    with ThreadPoolExecutor(source.workers) as pool:
        taken = list(pool.map(lambda volume: _annotated(volume[1], volume[2], source.scratch), volumes))
    broken = sum(frames is None for frames in taken)
    if broken:
        raise SourceError(
            f"{broken} of {len(volumes)} volumes are broken, or image and mask differ; download them again"
        )
    found = RecordList()
    for (row, image, mask), frame_list in zip(volumes, taken, strict=True):
        assert frame_list is not None
        source.findings.add("no-annotation", int(not frame_list))
        for frame in frame_list:
            source.findings.add("both-values", int(len(frame.values) > 1))
            found.add(
                f"{image.stem}/{frame.number:04d}",
                ImageFile(frame.image),
                [image, mask],
                ValueMask(frame.mask, _VALUES),
                label=OPTIMAL if 1 in frame.values else SUBOPTIMAL,
                patient=row["subject_id"],
                clip=row["uuid"],
                fields={"frame": str(frame.number), "pixel_size_mm": f"{read_header(image).spacing[-1]:g}"},
            )
    return found.records


def _annotated(image: Path, mask: Path, scratch: Path) -> list[Annotated] | None:
    """Frames with a mask, written to `scratch`; None where a volume is broken.

    The mask is read first, as it is small, and the image only as far as its last annotated frame.
    """
    try:
        if read_header(image).shape != read_header(mask).shape or len(read_header(image).shape) != 3:
            return None
        marked = {number: bytes_of(values) for number, values in enumerate(frames(mask)) if values.any()}
        if any(not set(np.unique(values).tolist()) <= set(_VALUES) for values in marked.values()):
            return None
        found = []
        for number, pixels in zip(range(max(marked, default=-1) + 1), frames(image), strict=False):
            if number in marked:
                place = scratch / f"{image.stem}-{number:04d}"
                files = place.with_suffix(".png"), place.with_suffix(".mask.png")
                for file, content in zip(files, (bytes_of(pixels), marked[number]), strict=True):
                    Image.fromarray(content).save(file, compress_level=1)
                shown = tuple(int(value) for value in np.unique(marked[number]) if value)
                found.append(Annotated(number, shown, *files))
    except ImageError:
        return None
    return found


IMPORTER = Importer(
    ABOUT,
    read,
    by_group("drawn by subject: 0.7 train, 0.1 val, 0.2 test"),
    (
        Check("no-volume", "warning", "volumes of the table are not there; they were left out"),
        Check("no-annotation", "note", "volumes have no annotated frame"),
        Check("both-values", "warning", "frames are marked both optimal and sub-optimal; they count as optimal"),
    ),
)
