"""`sonoforge datasets import`: labelled sets, as their users have them, into evaluation shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from sonoforge_trainer.shards.build import DataSetCard
from sonoforge_trainer.shards.faults import SourceError
from sonoforge_trainer.shards.files import FileRenderer
from sonoforge_trainer.shards.images import ImageRule, MaskRule
from sonoforge_trainer.shards.options import (
    Target,
    build_rows,
    column_options,
    ends_with_exit_code,
    image_options,
    target_options,
)
from sonoforge_trainer.shards.sources import Columns, FolderRule, Row, read_csv, read_folder
from sonoforge_trainer.storage import Storage


@click.group("datasets", short_help="Import evaluation sets.")
def command() -> None:
    """Import evaluation sets into shards, with their licence and citation."""


@command.group("import")
def _import() -> None:
    """Import a set: images and a CSV, or images and masks in two folders."""


@_import.command("csv")
@click.argument("table", metavar="CSV", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--root", type=click.Path(path_type=Path, file_okay=False), help="Folder of the paths. Default: the CSV's."
)
@click.option("--delimiter", default=",", show_default=True, help="What separates cells.")
@column_options
@image_options
@target_options
@ends_with_exit_code
def _csv(
    table: Path,
    root: Path | None,
    delimiter: str,
    columns: Callable[[], Columns],
    images: ImageRule,
    masks: MaskRule,
    target: Target,
) -> None:
    """Import a CSV whose rows name an image and its label, or its mask.

    Example: sonoforge datasets import csv planes.csv --path-column image --label-column plane --patient-column patient
    --split-column split --licence "CC BY 4.0" --output planes
    """
    chosen = columns()
    if not chosen.label and not chosen.mask:
        raise SourceError("an evaluation set has labels or masks: give --label-column, --mask-column or both")
    if not chosen.split and target.plan.splits is None:
        raise SourceError("an evaluation set has splits: give --split-column, or draw them with --splits 0.7,0.1,0.2")
    rows = read_csv(table, root or table.parent, chosen, delimiter)
    unlabelled = sum(not row.label for row in rows) if chosen.label else 0
    if unlabelled:
        raise SourceError(f"{unlabelled} rows have no label; choose labelled rows with --where COLUMN=VALUE")
    _write(rows, images, masks, target)


@_import.command("masks")
@click.option(
    "--images", "folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of images."
)
@click.option(
    "--masks", "mask_folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of masks."
)
@click.option("--mask-suffix", default="", help="What a mask's name has after the image's name, for example _mask.")
@click.option("--label-from-folder", is_flag=True, help="The first folder below the images' folder is the label.")
@click.option("--patient-pattern", default="", help="Regular expression in the path; its group 1 is the patient.")
@click.option("--clip-pattern", default="", help="The same for the clip.")
@image_options
@target_options
@ends_with_exit_code
def _masks(
    folder: Path,
    mask_folder: Path,
    mask_suffix: str,
    label_from_folder: bool,
    patient_pattern: str,
    clip_pattern: str,
    images: ImageRule,
    masks: MaskRule,
    target: Target,
) -> None:
    """Import a folder of images and a folder of masks with the same names. Draw splits with --splits 0.7,0.1,0.2."""
    rule = FolderRule(label_from_folder, patient_pattern, clip_pattern, mask_folder, mask_suffix)
    rows = read_folder(folder, rule)
    if target.plan.splits is None:
        raise SourceError("folders name no splits: draw them by patient with --splits 0.7,0.1,0.2")
    _write(rows, images, masks, target)


def _write(rows: list[Row], images: ImageRule, masks: MaskRule, target: Target) -> None:
    render = FileRenderer(Storage.from_env(), images, masks)
    card = DataSetCard(target.name, licence=target.licence, citation=target.citation, mask_classes=masks.classes)
    build_rows(rows, target, render, render.options, card)
