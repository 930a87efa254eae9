"""`sonoforge weights`: say what a file of weights is, make it a checkpoint to evaluate, write ours for others."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, get_args

import click

from sonoforge_trainer.contract import COMMIT, ContractError, TrainConfig, load_yaml_documents
from sonoforge_trainer.shards.options import as_uri
from sonoforge_trainer.storage import Storage, StorageError
from sonoforge_trainer.weights.checkpoint import write_imported
from sonoforge_trainer.weights.errors import WeightsError
from sonoforge_trainer.weights.export import ExportLayout
from sonoforge_trainer.weights.export import export as write_export
from sonoforge_trainer.weights.fit import adaptations, misfits
from sonoforge_trainer.weights.loading import Weights, load_weights

P = ParamSpec("P")
_SHOWN = 12
"""Names of keys that a report lists."""


def _numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"found {text!r}; allowed: numbers with commas, one for each channel") from None


def _reads_weights(function: Callable[P, None]) -> Callable[P, None]:
    """The options of reading, and errors of users without a traceback."""

    @click.option("--sha256", help="sha256:HEX that the file must have.")
    @click.option(
        "--mean", default="", callback=_numbers, help="Mean of each channel in its training, if not ImageNet's."
    )
    @click.option("--std", default="", callback=_numbers, help="Standard deviation of each channel, likewise.")
    @wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (WeightsError, StorageError) as error:
            raise ContractError(str(error)) from None

    return command


@click.group("weights", short_help="Weights of others: inspect, convert, export.")
def command() -> None:
    """Files of published weights: what they are, and how they become checkpoints to evaluate or to start from."""


@command.command()
@click.argument("file")
@click.option(
    "--against", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="PretrainJob to compare with."
)
@_reads_weights
def inspect(file: str, against: Path | None, sha256: str | None, mean: Any, std: Any) -> None:
    """Say what FILE is: layout, architecture, and what became of each of its keys. Loading is strict.

    With --against, also whether a job could start from it (`training.init`). Exits with 78 where it does not fit.

    Example: sonoforge weights inspect dinov2_vits14_reg4_pretrain.pth --against job.yaml
    """
    weights = load_weights(as_uri(file), Storage.from_env(), sha256=sha256, mean=mean, std=std)
    for line in description(weights):
        click.echo(line)
    if against is not None:
        _compare(weights, training_of(against.read_text(), where=str(against)))


@command.command()
@click.argument("file")
@click.argument("out")
@click.option("--gray", is_flag=True, help="For gray images: 3 channels become 1, with the same features.")
@click.option("--resolution", type=click.IntRange(1), help="Side of the input in pixels. Default: the file's.")
@_reads_weights
def convert(file: str, out: str, gray: bool, resolution: int | None, sha256: str | None, mean: Any, std: Any) -> None:
    """Make FILE a checkpoint at OUT (a folder or a URI) that `sonoforge eval OUT` takes like one of a run.

    Example: sonoforge weights convert dinov2_vits14_pretrain.pth runs/dinov2 --gray --resolution 224
    """
    storage = Storage.from_env()
    weights = load_weights(as_uri(file), storage, sha256=sha256, mean=mean, std=std)
    card = weights.card
    gray_input = {"mean": (_mean(card.mean),), "std": (_mean(card.std),)} if gray and card.in_channels == 3 else {}
    weights = weights.fitted(**gray_input, resolution=resolution)
    ref = write_imported(weights.backbone, weights.card, as_uri(out), storage)
    for line in description(weights):
        click.echo(line)
    click.echo(f"written    {ref.uri} ({ref.manifest_digest})")


@command.command()
@click.argument("checkpoint")
@click.argument("out")
@click.option("--layout", required=True, type=click.Choice(get_args(ExportLayout)), help="Whose layout.")
def export(checkpoint: str, out: str, layout: ExportLayout) -> None:
    """Write the teacher of CHECKPOINT (its prefix) to the folder OUT in another project's layout."""
    from sonoforge_trainer.checkpoint import CheckpointStore, DamagedCheckpointError

    storage, uri = Storage.from_env(), as_uri(checkpoint)
    try:
        digest = storage.read(f"{uri}/{COMMIT}").decode("ascii", "replace").strip()
        teacher = CheckpointStore(storage, uri).load_teacher(uri, digest)
        files = write_export(teacher.card, teacher.tensors, layout, as_uri(out), storage)
    except (DamagedCheckpointError, StorageError, WeightsError) as error:
        raise ContractError(str(error)) from None
    click.echo(f"written    {as_uri(out)}: {', '.join(files)}")


def description(weights: Weights) -> list[str]:
    """What a file is, line by line."""
    card, translated = weights.card, weights.translated
    parameters = sum(tensor.numel() for tensor in weights.tensors.values())
    lines = [
        f"layout     {translated.layout}",
        f"model      {card.arch}, {card.depth} blocks of width {card.embed_dim}, {card.ffn}, {parameters:,} parameters",
        f"input      {card.in_channels} x {card.resolution} x {card.resolution}, patches of {card.patch_size}, "
        f"{card.registers} registers",
        f"normalise  mean {_listed(card.mean)}, std {_listed(card.std)}",
        f"file       {weights.sha256}",
        f"keys       {len(translated.tensors)} used, {translated.renamed} of them renamed; none missing or unexpected",
    ]
    for what, names in (("left out", translated.left_out), ("filled in", translated.filled)):
        if names:
            rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{what:<10} {len(names)}: {', '.join(names[:_SHOWN])}{rest}")
    return lines


def training_of(text: str, *, where: str) -> TrainConfig:
    """The training section of the PretrainJob in a YAML file. Raises ContractError."""
    for document in load_yaml_documents(text, where=where):
        if isinstance(document, dict) and document.get("kind") == "PretrainJob":
            spec = document.get("spec")
            training = spec.get("training") if isinstance(spec, dict) else None
            return TrainConfig.resolve(training, where=f"{where}: PretrainJob.spec.training")
    raise ContractError(f"{where}: found no PretrainJob. Allowed: a job file")


def _compare(weights: Weights, training: TrainConfig) -> None:
    for path, job, theirs in adaptations(weights.card, training):
        click.echo(f"adapts     training.{path}: {_listed(theirs)} becomes {_listed(job)}")
    found = misfits(weights.card, training)
    if found:
        lines = [
            f"training.{path}: found {job!r}. Allowed: {theirs!r}, which the file has" for path, job, theirs in found
        ]
        raise ContractError("\n".join(["the job cannot start from this file", *lines]))
    click.echo("fits       the job can start from it: training.init.uri")


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _listed(value: object) -> str:
    return ", ".join(f"{part:.4g}" for part in value) if isinstance(value, tuple) else str(value)
