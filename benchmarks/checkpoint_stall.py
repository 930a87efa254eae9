"""How long a checkpoint holds up training, as a part of the time between two checkpoints.

    python benchmarks/checkpoint_stall.py --arch vit_small

Saves the real training state of a preset (student, teacher, both Adam moments) from one process to a local folder, and
prints ratios of times measured in the same run: the stall against a 5-minute interval, against one plain copy of the
same bytes, and against waiting for the commit, which is what a synchronous checkpoint costs.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import get_args

import click
import structlog
import torch

from sonoforge_trainer.checkpoint import CheckpointWriter, RunIdentity, Snapshot, fresh_attempt
from sonoforge_trainer.contract import PRESETS, ModelCard, TrainConfig
from sonoforge_trainer.contract.config import Arch
from sonoforge_trainer.state import TrainState
from sonoforge_trainer.storage import Storage

INTERVAL_SECONDS = 300.0
DIGEST = "sha256:" + "0" * 64


def measure(training: TrainConfig, saves: int, folder: Path) -> dict[str, float]:
    """Seconds and bytes of `saves` checkpoints; the first, which allocates the buffers, is counted by itself."""
    state = TrainState(training)
    model = state.student.backbone
    card = ModelCard(
        arch=training.model.arch,
        embed_dim=model.embed_dim,
        depth=model.depth,
        heads=1,
        patch_size=training.model.patch_size,
        registers=training.model.registers,
        in_channels=training.model.in_channels,
        ffn=training.model.ffn,
        pos_embed=training.model.pos_embed,
        mean=training.data.mean,
        std=training.data.std,
        resolution=training.recipe.crops.global_size,
        data_digest=DIGEST,
        config_digest=training.digest(),
        samples=0,
    )
    identity = RunIdentity("benchmark", "benchmark", 0, 1, training.digest(), DIGEST)
    writer = CheckpointWriter(Storage(), f"file://{folder}", identity, fresh_attempt())
    tensors, teacher = state.tensors(), state.teacher.backbone.state_dict()
    results, synchronous = [], []
    for step in range(saves + 1):
        started = time.perf_counter()
        writer.save(Snapshot(step=step, samples=step, tensors=tensors, teacher=teacher, card=card))
        result = writer.wait(600)
        synchronous.append(time.perf_counter() - started)
        assert result is not None
        assert result.ref is not None, result.error
        results.append(result)
        shutil.rmtree(folder / f"step-{step:010d}")
    source_u8 = torch.zeros(results[0].bytes, dtype=torch.uint8)
    target_u8 = torch.ones_like(source_u8)
    copies = []
    for _ in range(saves):
        started = time.perf_counter()
        target_u8.copy_(source_u8)
        copies.append(time.perf_counter() - started)
    return {
        "bytes": results[0].bytes,
        "first_stall_seconds": results[0].stall_seconds,
        "stall_seconds": statistics.median(result.stall_seconds for result in results[1:]),
        "copy_seconds": statistics.median(copies),
        "synchronous_seconds": statistics.median(synchronous[1:]),
    }


@click.command()
@click.option("--arch", type=click.Choice(get_args(Arch)), default="vit_small", show_default=True)
@click.option("--preset", type=click.Choice(PRESETS), default="ultradino", show_default=True)
@click.option("--saves", default=3, show_default=True, help="Checkpoints to measure, after one that allocates memory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(arch: str, preset: str, saves: int, as_json: bool) -> None:
    """Measure the stall of a checkpoint."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    torch.set_num_threads(1)
    training = TrainConfig.resolve(
        {"model": {"arch": arch}, "data": {"shards": "file:///none/shards.json"}, "recipe": {"preset": preset}}
    )
    with tempfile.TemporaryDirectory() as folder:
        found = measure(training, saves, Path(folder))
    ratios = {
        "stall_of_interval": found["stall_seconds"] / INTERVAL_SECONDS,
        "first_stall_of_interval": found["first_stall_seconds"] / INTERVAL_SECONDS,
        "stall_per_copy": found["stall_seconds"] / found["copy_seconds"],
        "stall_per_synchronous": found["stall_seconds"] / found["synchronous_seconds"],
    }
    if as_json:
        click.echo(json.dumps({"arch": arch, "preset": preset, **found, **ratios}))
        return
    click.echo(f"{arch}, {preset}: {found['bytes'] / 2**20:,.0f} MiB written by one process")
    click.echo(f"stall                {found['stall_seconds'] * 1000:9.1f} ms")
    click.echo(f"  of 5 minutes       {ratios['stall_of_interval']:9.3%}   (goal: below 1 %)")
    click.echo(f"  first, allocating  {ratios['first_stall_of_interval']:9.3%}")
    click.echo(f"  per plain copy     {ratios['stall_per_copy']:9.2f}x")
    click.echo(f"  per synchronous    {ratios['stall_per_synchronous']:9.2f}x")


if __name__ == "__main__":
    main()
