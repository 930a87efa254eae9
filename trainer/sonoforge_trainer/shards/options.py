"""Command-line options that every builder shares, and how its errors end the process."""

from __future__ import annotations

import csv
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import click

from sonoforge_trainer.contract import ContractError, ExitCode, Shard
from sonoforge_trainer.shards.build import BuildResult, BuildRule, DataSetCard, Rejected, RejectedError, Render, build
from sonoforge_trainer.shards.faults import DataSetError, SourceError
from sonoforge_trainer.shards.hashkey import load_hash_key
from sonoforge_trainer.shards.images import ImageRule, MaskRule, Window
from sonoforge_trainer.shards.plan import PlanRule, arrange, parse_splits
from sonoforge_trainer.shards.sources import Columns, Row
from sonoforge_trainer.storage import IntegrityError, InvalidURIError, ObjectNotFoundError, Storage, StorageError

P = ParamSpec("P")
R = TypeVar("R")
_SHOWN_REJECTED = 20


@dataclass(frozen=True)
class Target:
    """Where to write what, and how: the shared options of every builder."""

    output: str
    """URI of the data set's folder."""
    name: str
    """Name of the data set and of its shards."""
    licence: str
    """Licence of the images."""
    citation: str
    """How to cite them."""
    plan: PlanRule
    """How samples are split and dealt to shards."""
    rule: BuildRule
    """How to build."""
    hash_key_file: Path | None
    """File with the key of the patient hashes; None draws one."""
    report: Path | None
    """Private file that lists what was left out, with paths."""


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """An option whose text is read by a function that raises ValueError."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Read the text."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def as_uri(text: str) -> str:
    """A URI as it is; a local path as a file:// URI."""
    return text.rstrip("/") if "://" in text else Path(text).resolve().as_uri()


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"found {text!r}; allowed: NAME=VALUE")
    return name, value


def _numbers(text: str) -> tuple[int, int]:
    name, value = _pair(text)
    return int(name), int(value)


URI = Parsed("uri", as_uri)
PAIR = Parsed("name=value", _pair)
NUMBERS = Parsed("value=class", _numbers)


def target_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add the options of Target; the command gets it as `target`."""

    @click.option("--output", type=URI, required=True, help="Where to write: s3://, file:// or a local folder.")
    @click.option("--name", default="", help="Name of the data set and of its shards. Default: the output's last part.")
    @click.option("--licence", default="", help="Licence of the images; it travels with them.")
    @click.option("--citation", default="", help="How to cite the images.")
    @click.option(
        "--shard-samples", type=click.IntRange(1), default=1000, show_default=True, help="Samples in a shard."
    )
    @click.option("--seed", type=int, default=0, show_default=True, help="Decides order, shards and drawn splits.")
    @click.option(
        "--splits", type=Parsed("fractions", parse_splits), help="Draw train,val,test by patient: 0.8,0.1,0.1."
    )
    @click.option(
        "--validation",
        type=click.FloatRange(0, 0.9),
        default=0.0,
        help="Turn this fraction of the training patients into val, where the source has none.",
    )
    @click.option(
        "--hash-key-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Secret for patient hashes. Default: SONOFORGE_HASH_KEY_FILE, else one kept in your configuration folder.",
    )
    @click.option(
        "--on-error",
        type=click.Choice(["refuse", "skip"]),
        default="refuse",
        show_default=True,
        help="Unusable images.",
    )
    @click.option(
        "--report",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write a CSV (mode 0600) that says which paths were rejected. Paths may name patients: keep it local.",
    )
    @click.option(
        "--workers", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True, help="Threads."
    )
    @functools.wraps(command)
    def wrapped(
        *,
        output: str,
        name: str,
        licence: str,
        citation: str,
        shard_samples: int,
        seed: int,
        splits: tuple[float, float, float] | None,
        validation: float,
        hash_key_file: Path | None,
        on_error: Literal["refuse", "skip"],
        report: Path | None,
        workers: int,
        **rest: Any,
    ) -> R:
        target = Target(
            output,
            _checked_name(name or output.rpartition("/")[2]),
            licence,
            citation,
            PlanRule(shard_samples, seed, splits, validation),
            BuildRule(on_error=on_error, workers=workers),
            hash_key_file,
            _outside(report, output),
        )
        return command(target=target, **rest)

    return wrapped


def column_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add the options of Columns; the command gets it as `columns`."""

    @click.option("--path-column", default="path", show_default=True, help="Column of the image's path.")
    @click.option("--mask-column", default="", help="Column of the mask's path.")
    @click.option("--label-column", default="", help="Column of the class, a text.")
    @click.option("--split-column", default="", help="Column of the split: train, val, test or unlabelled.")
    @click.option("--patient-column", default="", help="Column of the patient; the shards get a keyed hash.")
    @click.option("--clip-column", default="", help="Column of the clip inside the patient; the shards get a number.")
    @click.option("--column", "extra", multiple=True, help="Column to keep in each sample's JSON. Repeatable.")
    @click.option(
        "--where", multiple=True, type=PAIR, help="Use rows with COLUMN=VALUE. One column's values are alternatives."
    )
    @click.option("--unknown-patient", multiple=True, help="Text that stands for: patient not known. Repeatable.")
    @click.option("--split-value", multiple=True, type=PAIR, help="FOUND=train: rename a split. Repeatable.")
    @functools.wraps(command)
    def wrapped(
        *,
        path_column: str,
        mask_column: str,
        label_column: str,
        split_column: str,
        patient_column: str,
        clip_column: str,
        extra: tuple[str, ...],
        where: tuple[tuple[str, str], ...],
        unknown_patient: tuple[str, ...],
        split_value: tuple[tuple[str, str], ...],
        **rest: Any,
    ) -> R:
        def columns() -> Columns:
            return Columns(
                path_column,
                mask_column,
                label_column,
                split_column,
                patient_column,
                clip_column,
                extra,
                where,
                frozenset(unknown_patient),
                dict(split_value),
            )

        return command(columns=columns, **rest)

    return wrapped


def image_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add the options of ImageRule and MaskRule; the command gets them as `images` and `masks`."""

    @click.option(
        "--window",
        type=Parsed("window", Window.parse),
        default="depth",
        show_default=True,
        help="16 bit to 8 bit: depth (full range of the file), percentile (0.5 to 99.5 % of each image) or LOW,HIGH.",
    )
    @click.option(
        "--encode",
        type=click.Choice(["keep", "jpeg"]),
        default="keep",
        show_default=True,
        help="keep: lossless stays lossless (PNG). jpeg: quality 95, decodes 2.6 times as fast.",
    )
    @click.option(
        "--mask-class", multiple=True, help="Name of mask value 0 (the background), then 1, 2 ... Repeatable."
    )
    @click.option(
        "--mask-value", multiple=True, type=NUMBERS, help="255=1: a value in the files to a class. Repeatable."
    )
    @functools.wraps(command)
    def wrapped(
        *,
        window: Window,
        encode: Literal["keep", "jpeg"],
        mask_class: tuple[str, ...],
        mask_value: tuple[tuple[int, int], ...],
        **rest: Any,
    ) -> R:
        return command(images=ImageRule(window, encode), masks=MaskRule(mask_class, dict(mask_value)), **rest)

    return wrapped


def ends_with_exit_code(command: Callable[P, R]) -> Callable[P, R]:
    """Errors of sources, data sets and storage end with a sentence and the exit code of their kind."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RejectedError as error:
            fail(f"{error}.\n{_listed(error.rejected)}", ExitCode.DATA)
        except DataSetError as error:
            fail(str(error), ExitCode.DATA)
        except (SourceError, ContractError, InvalidURIError) as error:
            fail(str(error), ExitCode.CONFIG)
        except (ObjectNotFoundError, IntegrityError) as error:
            fail(str(error), ExitCode.DATA)
        except StorageError as error:
            fail(str(error), ExitCode.STORAGE)

    return wrapped


def fail(message: str, code: ExitCode) -> NoReturn:
    """Say what is wrong on the standard error and end the process."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def build_rows(rows: Sequence[Row], target: Target, render: Render, options: str, card: DataSetCard) -> BuildResult:
    """Plan, build, and say what was built."""
    storage = Storage.from_env()
    try:
        hasher, note = load_hash_key(target.hash_key_file)
    except ValueError as error:
        raise SourceError(str(error)) from None
    if note:
        click.echo(note, err=True)
    if any(row.mask for row in rows) and not card.mask_classes:
        raise SourceError("there are masks, but no --mask-class; name the values 0 (the background), 1 ...")
    plan = arrange(rows, target.plan)
    rule = BuildRule(options, target.rule.on_error, target.rule.workers)

    def progress(shard: Shard, reused: bool) -> None:
        click.echo(f"{shard.name}: {shard.samples} samples, {shard.bytes} bytes{', kept' * reused}", err=True)

    try:
        result = build(plan, card, render, target.output, storage, hasher, rule, progress)
    except RejectedError as error:
        _write_report(target.report, error.rejected, rows)
        raise
    _write_report(target.report, result.rejected, rows)
    _say(result, target)
    return result


def _say(result: BuildResult, target: Target) -> None:
    manifest = result.manifest
    if result.rejected:
        click.echo(f"Left out {len(result.rejected)} samples:\n{_listed(result.rejected)}", err=True)
    if not result.completed:
        click.echo("Nothing to do: this data set was finished before.", err=True)
    click.echo(f"{manifest.samples} samples in {len(manifest.shards)} shards, {manifest.bytes} bytes")
    click.echo(f"{manifest.dataset_digest}")
    click.echo(f"{target.output}/shards.json")


def _listed(rejected: Sequence[Rejected]) -> str:
    lines = [f"  row {fault.number} ({fault.hash}): {fault.reason}" for fault in rejected[:_SHOWN_REJECTED]]
    if len(rejected) > _SHOWN_REJECTED:
        lines.append(f"  and {len(rejected) - _SHOWN_REJECTED} more; --report FILE lists all")
    return "\n".join(lines)


def _write_report(file: Path | None, rejected: Sequence[Rejected], rows: Sequence[Row]) -> None:
    if file is None:
        return
    references = {row.number: row.reference for row in rows}
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.fchmod(descriptor, 0o600)
    with open(descriptor, "w", newline="", encoding="utf-8") as stream:  # noqa: PTH123 - a descriptor
        writer = csv.writer(stream)
        writer.writerow(("row", "hash", "path", "reason"))
        writer.writerows((f.number, f.hash, references[f.number], f.reason) for f in rejected)


def _outside(report: Path | None, output: str) -> Path | None:
    """The report holds paths, so it must not lie in what is handed on."""
    if report is not None and output.startswith("file://"):
        folder = Path(url2pathname(urlsplit(output).path))
        if report.resolve().is_relative_to(folder):
            raise click.BadParameter("the report names paths and must lie outside the output", param_hint="--report")
    return report


def _checked_name(name: str) -> str:
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or not name[0].isalnum():
        raise click.BadParameter(
            f"{name!r} cannot begin a shard's name; use letters, digits, dots, dashes and underscores",
            param_hint="--name",
        )
    return name
