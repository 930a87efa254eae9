"""`sonoforge shards`: build, verify and inspect data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sonoforge_trainer.contract import ExitCode
from sonoforge_trainer.shards.build import MANIFEST, DataSetCard
from sonoforge_trainer.shards.faults import SourceError
from sonoforge_trainer.shards.files import FileRenderer
from sonoforge_trainer.shards.images import ImageRule, MaskRule
from sonoforge_trainer.shards.options import (
    URI,
    Target,
    build_rows,
    column_options,
    ends_with_exit_code,
    fail,
    image_options,
    target_options,
)
from sonoforge_trainer.shards.reader import base_of, read_manifest
from sonoforge_trainer.shards.sources import Columns, FolderRule, read_csv, read_folder, read_webdataset
from sonoforge_trainer.shards.summary import summarise, tabulate
from sonoforge_trainer.shards.verify import verify
from sonoforge_trainer.storage import Storage


@click.group("shards", short_help="Build, verify and inspect data sets.")
def command() -> None:
    """Build, verify and inspect data sets: WebDataset tars with a manifest, shards.json."""


@command.command("build")
@click.option(
    "--images", "folder", type=click.Path(path_type=Path, file_okay=False), help="Source: a folder of images."
)
@click.option("--csv", "table", type=click.Path(path_type=Path, dir_okay=False), help="Source: a CSV with paths.")
@click.option("--webdataset", type=URI, help="Source: a folder or prefix of WebDataset tars.")
@click.option(
    "--root", type=click.Path(path_type=Path, file_okay=False), help="CSV: folder of its paths. Default: its own."
)
@click.option("--delimiter", default=",", show_default=True, help="CSV: what separates cells.")
@click.option("--label-from-folder", is_flag=True, help="Folder: the first folder below it is the label.")
@click.option("--patient-pattern", default="", help="Folder: regular expression in the path; group 1 is the patient.")
@click.option("--clip-pattern", default="", help="Folder: the same for the clip.")
@column_options
@image_options
@target_options
@ends_with_exit_code
def _build(
    folder: Path | None,
    table: Path | None,
    webdataset: str | None,
    root: Path | None,
    delimiter: str,
    label_from_folder: bool,
    patient_pattern: str,
    clip_pattern: str,
    columns: Callable[[], Columns],
    images: ImageRule,
    masks: MaskRule,
    target: Target,
) -> None:
    """Write a data set from a folder, a CSV or a WebDataset.

    Killed and started again, it goes on and ends with the same bytes. Patients become keyed hashes; paths and original
    names are not written.
    """
    if sum(source is not None for source in (folder, table, webdataset)) != 1:
        raise SourceError("give one source: --images FOLDER, --csv FILE or --webdataset URI")
    storage = Storage.from_env()
    rule = FolderRule(label_from_folder, patient_pattern, clip_pattern)
    if folder is not None and columns() != Columns():
        raise SourceError("a folder has no columns; use --label-from-folder and --patient-pattern, or --csv")
    if folder is None and rule != FolderRule():
        raise SourceError("--label-from-folder and patterns are for --images; use --label-column and the like")
    if folder is not None:
        rows = read_folder(folder, rule)
    elif table is not None:
        rows = read_csv(table, root or table.parent, columns(), delimiter)
    else:
        assert webdataset is not None
        rows = read_webdataset(webdataset, columns(), storage)
    render = FileRenderer(storage, images, masks)
    card = DataSetCard(target.name, licence=target.licence, citation=target.citation, mask_classes=masks.classes)
    build_rows(rows, target, render, render.options, card)


def _manifest_uri(text: str) -> str:
    return text if text.endswith(".json") else f"{text}/{MANIFEST}"


@command.command("verify")
@click.argument("uri", type=URI)
@click.option("--decode", is_flag=True, help="Decode every image and mask, too.")
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Shards read at the same time.")
@ends_with_exit_code
def _verify(uri: str, decode: bool, workers: int) -> None:
    """Read every shard of the data set at URI (its shards.json or the folder) and name each object that is not right.

    Ends with exit code 65 where something is wrong.
    """
    storage = Storage.from_env()
    uri = _manifest_uri(uri)
    manifest = read_manifest(uri, storage)
    faults = verify(manifest, base_of(uri), storage, decode_images=decode, workers=workers)
    for fault in faults:
        click.echo(f"{fault.uri}: {fault.message}")
    if faults:
        objects = len({fault.uri for fault in faults})
        fail(f"{len(faults)} faults in {objects} objects; copy or build them again", ExitCode.DATA)
    click.echo(f"{manifest.samples} samples in {len(manifest.shards)} shards are as the manifest says")


@command.command("inspect")
@click.argument("uri", type=URI)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--manifest-only", is_flag=True, help="Do not read the shards: no counts by split and label.")
@ends_with_exit_code
def _inspect(uri: str, as_json: bool, manifest_only: bool) -> None:
    """Print what the data set at URI (its shards.json or the folder) holds, without any identifier."""
    storage = Storage.from_env()
    uri = _manifest_uri(uri)
    manifest = read_manifest(uri, storage)
    found = summarise(manifest) | ({} if manifest_only else tabulate(manifest, base_of(uri), storage))
    click.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{name or '(none)'}: {text}")
    return lines
