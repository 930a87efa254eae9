"""`sonoforge synth`: a labelled data set of speckle phantoms, marked as synthetic, for demos and tests."""

from __future__ import annotations

import hashlib
import io

import click
from PIL import Image

from sonoforge_trainer.contract import Shard
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.shards.anatomy import MASK_CLASSES
from sonoforge_trainer.shards.build import BuildResult, BuildRule, DataSetCard, Rendered, build
from sonoforge_trainer.shards.images import encode_mask
from sonoforge_trainer.shards.options import URI, Parsed, ends_with_exit_code
from sonoforge_trainer.shards.phantoms import PhantomRule, Phantoms
from sonoforge_trainer.shards.plan import PlanRule, arrange, parse_splits
from sonoforge_trainer.shards.sources import Row
from sonoforge_trainer.storage import Storage

_JPEG_QUALITY = 92


class PhantomRenderer:
    """A `Render` for phantoms: row N is image N - 1."""

    def __init__(self, rule: PhantomRule) -> None:
        self._phantoms = Phantoms(rule)
        self.options = repr((rule, _JPEG_QUALITY))

    def __call__(self, row: Row) -> Rendered:
        """Draw and encode one image."""
        phantom = self._phantoms.draw(row.number - 1)
        encoded = io.BytesIO()
        Image.fromarray(phantom.image_hw).save(encoded, "JPEG", quality=_JPEG_QUALITY)
        return Rendered(encoded.getvalue(), "jpg", encode_mask(phantom.mask_hw))


def phantom_rows(rule: PhantomRule) -> list[Row]:
    """A row for each phantom."""
    phantoms = Phantoms(rule)
    rows = []
    for index in range(rule.count):
        who = phantoms.identity(index)
        rows.append(
            Row(
                index + 1,
                str(index),
                None,
                label=who.label,
                patient=str(who.patient),
                clip=str(who.clip),
                fields=(("scanner", phantoms.scanner(index)),),
            )
        )
    return rows


def build_phantoms(
    output: str, rule: PhantomRule, plan: PlanRule, storage: Storage, *, name: str = "phantoms", workers: int = 1
) -> BuildResult:
    """Write the data set of a rule; the same rule and plan give the same bytes. Killed, it goes on like every build."""
    # Nobody is behind these patients, so their hashes need no secret, and data sets of one seed are equal everywhere.
    hasher = KeyHasher(hashlib.sha256(f"phantoms of seed {rule.seed}".encode()).digest())
    card = DataSetCard(name, synthetic=True, licence="Apache-2.0", mask_classes=MASK_CLASSES)
    render = PhantomRenderer(rule)
    placed = arrange(phantom_rows(rule), plan)

    def progress(shard: Shard, reused: bool) -> None:
        click.echo(f"{shard.name}: {shard.samples} samples, {shard.bytes} bytes{', kept' * reused}", err=True)

    return build(placed, card, render, output, storage, hasher, BuildRule(render.options, workers=workers), progress)


@click.command("synth", short_help="Make a labelled data set of phantoms.")
@click.option("--output", type=URI, required=True, help="Where to write: s3://, file:// or a local folder.")
@click.option("--name", default="phantoms", show_default=True, help="Name of the data set and of its shards.")
@click.option("--count", type=click.IntRange(1), default=2000, show_default=True, help="Images.")
@click.option("--size", type=click.IntRange(32), default=96, show_default=True, help="Short side in pixels.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Decides everything.")
@click.option("--frames", type=click.IntRange(1), default=4, show_default=True, help="Near-duplicate frames in a clip.")
@click.option("--clips", type=click.IntRange(1), default=6, show_default=True, help="Clips of a patient.")
@click.option(
    "--splits",
    type=Parsed("fractions", parse_splits),
    default="0.7,0.15,0.15",
    show_default=True,
    help="train,val,test, drawn by patient. 1,0,0 is a training set.",
)
@click.option("--shard-samples", type=click.IntRange(1), default=500, show_default=True, help="Samples in a shard.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
@ends_with_exit_code
def command(
    output: str,
    name: str,
    count: int,
    size: int,
    seed: int,
    frames: int,
    clips: int,
    splits: tuple[float, float, float],
    shard_samples: int,
    workers: int,
) -> None:
    """Make ultrasound-like images with class labels and masks, from speckle statistics and simple anatomy.

    They show that a pipeline works. They are no data to draw medical conclusions from; the manifest says synthetic.
    """
    rule = PhantomRule(count, size, seed, frames, clips)
    plan = PlanRule(shard_samples, seed, splits)
    result = build_phantoms(output, rule, plan, Storage.from_env(), name=name, workers=workers)
    if not result.completed:
        click.echo("Nothing to do: this data set was finished before.", err=True)
    click.echo(f"{result.manifest.samples} phantoms in {len(result.manifest.shards)} shards")
    click.echo(f"{output}/shards.json")
