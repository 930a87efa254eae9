"""`sonoforge datasets`: which sets can be imported, and their import into evaluation shards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from sonoforge_trainer.datasets.coco import CocoRule, coco
from sonoforge_trainer.datasets.generic import generic, split_folders
from sonoforge_trainer.datasets.importer import Importer
from sonoforge_trainer.datasets.registry import IMPORTERS
from sonoforge_trainer.datasets.run import SplitChoice, import_set
from sonoforge_trainer.shards.faults import SourceError
from sonoforge_trainer.shards.images import ImageRule, MaskRule
from sonoforge_trainer.shards.options import (
    PAIR,
    Target,
    column_options,
    ends_with_exit_code,
    image_options,
    target_options,
)
from sonoforge_trainer.shards.sources import SPLITS, Columns, FolderRule, Row, read_csv, read_folder
from sonoforge_trainer.storage import Storage

R = TypeVar("R")
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group("datasets", short_help="List and import evaluation sets.")
def command() -> None:
    """Import evaluation sets into shards, with their licence, their citation and a report of what is odd in them."""


@command.command("list")
def _list() -> None:
    """List the public sets that can be imported by name, with their licence."""
    width = max(map(len, IMPORTERS))
    for name, importer in IMPORTERS.items():
        about = importer.about
        click.echo(f"{name.ljust(width)}  {about.title}\n{' ' * width}  {about.licence}; {about.source}")


class _Imports(click.Group):
    """One sub-command for each known set beside the generic ones."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *IMPORTERS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or (_named(IMPORTERS[cmd_name]) if cmd_name in IMPORTERS else None)


@command.group("import", cls=_Imports)
def _import() -> None:
    """Import a known set by its name, or any set as a table, two folders, folders of classes, or COCO."""


def split_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add --split, --split-images and --findings; the command gets `choice` and `private`."""

    @click.option(
        "--split",
        "lists",
        multiple=True,
        type=PAIR,
        help="train=FILE: a published list, of image names or patients, as text or CSV. Repeatable.",
    )
    @click.option(
        "--split-images",
        is_flag=True,
        help="Draw images where the set names no patients. Scores are then too good; the data card says so.",
    )
    @click.option(
        "--findings",
        "private",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write a CSV (mode 0600) of the samples behind each finding. Names may name patients: keep it local.",
    )
    @functools.wraps(command)
    def wrapped(*, lists: tuple[tuple[str, str], ...], split_images: bool, private: Path | None, **rest: Any) -> R:
        files: dict[str, list[Path]] = {}
        for split, file in lists:
            files.setdefault(split, []).append(Path(file))
        return command(choice=SplitChoice(files, split_images), private=private, **rest)

    return wrapped


def _named(importer: Importer) -> click.Command:
    about = importer.about
    masks = f" Mask values are {', '.join(f'{n} {c}' for n, c in enumerate(about.mask_classes))}."

    @click.command(
        about.name,
        short_help=about.title,
        help=f"{about.title}, from PATH: the folder of the unpacked download.{masks * bool(about.mask_classes)}\n\n"
        f"Get it from {about.source}. Licence: {about.licence}. Split: {importer.split.sentence}.",
    )
    @click.argument("path", type=_FOLDER)
    @split_options
    @target_options
    @ends_with_exit_code
    def run(path: Path, choice: SplitChoice, private: Path | None, target: Target) -> None:
        import_set(importer, path, choice, target, ImageRule(), private=private)

    return run


@_import.command("csv")
@click.argument("table", metavar="CSV", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--root", type=_FOLDER, help="Folder of the paths. Default: the CSV's.")
@click.option("--delimiter", default=",", show_default=True, help="What separates cells.")
@column_options
@image_options
@split_options
@target_options
@ends_with_exit_code
def _csv(
    table: Path,
    root: Path | None,
    delimiter: str,
    columns: Callable[[], Columns],
    **rest: Any,
) -> None:
    """Import a CSV whose rows name an image and its label, or its mask.

    Example: sonoforge datasets import csv planes.csv --path-column image --label-column plane --patient-column patient
    --split-column split --licence "CC BY 4.0" --output planes
    """
    chosen = columns()
    if not chosen.label and not chosen.mask:
        raise SourceError("an evaluation set has labels or masks: give --label-column, --mask-column or both")
    if chosen.split and rest["target"].plan.splits is not None:
        raise SourceError("the source has splits and --splits draws new ones; give one of the two")
    _need_splits(rest["target"], rest["choice"], bool(chosen.split), "--split-column, or ")

    def rows(folder: Path) -> Sequence[Row]:
        found = read_csv(table, folder, chosen, delimiter)
        unlabelled = sum(not row.label for row in found) if chosen.label else 0
        if unlabelled:
            raise SourceError(f"{unlabelled} rows have no label; choose labelled rows with --where COLUMN=VALUE")
        return found

    _write("csv", rows, root or table.parent, **rest)


@_import.command("masks")
@click.option("--images", "folder", type=_FOLDER, required=True, help="Folder of images.")
@click.option("--masks", "mask_folder", type=_FOLDER, required=True, help="Folder of masks.")
@click.option("--mask-suffix", default="", help="What a mask's name has after the image's name, for example _mask.")
@click.option("--label-from-folder", is_flag=True, help="The first folder below the images' folder is the label.")
@click.option("--patient-pattern", default="", help="Regular expression in the path; its group 1 is the patient.")
@click.option("--clip-pattern", default="", help="The same for the clip.")
@image_options
@split_options
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
    **rest: Any,
) -> None:
    """Import a folder of images and a folder of masks with the same names. Draw splits with --splits 0.7,0.1,0.2."""
    rule = FolderRule(label_from_folder, patient_pattern, clip_pattern, mask_folder, mask_suffix)
    _need_splits(rest["target"], rest["choice"], False, "")
    _write("masks", lambda root: read_folder(root, rule), folder, images=images, masks=masks, **rest)


@_import.command("folders")
@click.argument("path", type=_FOLDER)
@click.option("--patient-pattern", default="", help="Regular expression in the path; its group 1 is the patient.")
@click.option("--clip-pattern", default="", help="The same for the clip.")
@image_options
@split_options
@target_options
@ends_with_exit_code
def _folders(path: Path, patient_pattern: str, clip_pattern: str, **rest: Any) -> None:
    """Import PATH with a folder for each class, or with train, val and test, and classes below each.

    Example: sonoforge datasets import folders breast --patient-pattern '(P[0-9]+)_' --splits 0.7,0.1,0.2 --output out
    """
    rule = FolderRule(True, patient_pattern, clip_pattern)
    rows = split_folders(read_folder(path, rule))
    _need_splits(rest["target"], rest["choice"], all(row.split for row in rows), "folders train, val and test, or ")
    _write("folders", lambda _root: rows, path, **rest)


@_import.command("coco")
@click.argument("files", metavar="[SPLIT=]JSON...", nargs=-1, required=True)
@click.option("--images", "folder", type=_FOLDER, required=True, help="Folder that file_name is relative to.")
@click.option("--label-from-category", is_flag=True, help="An image's label is its category, where it shows only one.")
@click.option("--patient-pattern", default="", help="Regular expression in file_name; its group 1 is the patient.")
@click.option("--clip-pattern", default="", help="The same for the clip.")
@split_options
@target_options
@ends_with_exit_code
def _coco(
    files: tuple[str, ...],
    folder: Path,
    label_from_category: bool,
    patient_pattern: str,
    clip_pattern: str,
    choice: SplitChoice,
    private: Path | None,
    target: Target,
) -> None:
    """Import COCO instance files: train=train.json val=val.json test=test.json, or one file and --splits.

    Categories become mask values in the order of their ids, from 1; annotations are painted in the order of the file.
    """
    FolderRule(patient_pattern=patient_pattern, clip_pattern=clip_pattern)  # refuses what is no pattern
    named = dict(_split_file(text) for text in files)
    if len(named) < len(files):
        raise SourceError("two COCO files are for the same split; join them, or name each one's split")
    _need_splits(target, choice, "" not in named, "SPLIT=JSON for each file, ")
    importer = coco(CocoRule(named, label_from_category, patient_pattern, clip_pattern), target.name)
    import_set(importer, folder, choice, target, ImageRule(), private=private)


def _split_file(text: str) -> tuple[str, Path]:
    split, equals, file = text.partition("=")
    return (split, Path(file)) if equals and split in SPLITS else ("", Path(text))


def _need_splits(target: Target, choice: SplitChoice, has_splits: bool, other: str) -> None:
    if not has_splits and target.plan.splits is None and not choice.lists:
        raise SourceError(
            f"an evaluation set has splits: give {other}lists with --split, or draw them by patient with "
            "--splits 0.7,0.1,0.2"
        )


def _write(
    name: str,
    rows: Callable[[Path], Sequence[Row]],
    root: Path,
    *,
    images: ImageRule,
    masks: MaskRule,
    choice: SplitChoice,
    private: Path | None,
    target: Target,
) -> None:
    importer = generic(name, rows, masks, target.name, Storage.from_env())
    import_set(importer, root, choice, target, images, options=repr(_sorted(masks)), private=private)


def _sorted(masks: MaskRule) -> tuple[Sequence[str], Mapping[int, int]]:
    return masks.classes, dict(sorted(masks.values.items()))
