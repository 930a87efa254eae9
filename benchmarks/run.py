"""`make bench`: every benchmark, one after the other, as one table of ratios.

    python benchmarks/run.py [--write]

Each row is made in one run on one machine, with the peer beside it. `--write` keeps the table in docs/measurements.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "measurements.md"

HEADER = """# Measurements

Written by `benchmarks/run.py --write`; `make bench` prints the same table. Ratios above 1 are for Sonoforge. Each
row was measured in one run beside its peer, on {cores} cores ({machine}), without a GPU; the top of each script in
`benchmarks/` says what it does. Recovery times come from `make chaos`.

"""

Row = tuple[str, str, str, str]
"""What was measured, ours, the peer, the ratio."""


def loaders(record: dict[str, Any]) -> Iterator[Row]:
    """Streaming beside webdataset, litdata and mosaicml-streaming."""
    kind = {
        "bytes": "sample bytes, local files",
        "pixels": "decoded to gray, local files",
        "s3": "sample bytes from S3, cold, 80 MB/s a connection",
        "s3-loopback": "sample bytes from S3, cold, loopback",
    }[record["kind"]]
    low, high = record["quartiles"]
    yield (
        f"Loader against {record['peer']}: {kind}",
        f"{record['samples_per_second']} samples/s",
        f"{record['peer_samples_per_second']} samples/s",
        f"{record['ratio']:.2f} ({low:.2f} to {high:.2f})",
    )


def input_pipeline(record: dict[str, Any]) -> Iterator[Row]:
    """Decode and crops of one core beside the official recipe."""
    stored = {"RGB": "colour", "L": "gray"}[record["jpeg"]]
    peer = f"{record['reference_images_per_second']} images/s"
    yield (
        f"Input pipeline of a core against the official PIL recipe, 640x480 JPEG stored as {stored}",
        f"{record['stream_images_per_second']} images/s",
        peer,
        f"{record['ratio']:.1f}",
    )
    yield (
        "The same, with the device's photometrics on the CPU as well",
        f"+ {record['photometrics_on_cpu_ms']} ms an image",
        peer,
        f"{record['ratio_with_photometrics_on_cpu']:.1f}",
    )


def sinkhorn(record: dict[str, Any]) -> Iterator[Row]:
    """Sinkhorn-Knopp beside the exponential form."""
    yield (
        "Sinkhorn against the official form: traffic, in units of the logits",
        f"{record['traffic']}",
        f"{record['official_traffic']}",
        f"{record['traffic_ratio']:.2f}",
    )
    yield (
        "Sinkhorn against the official form: collectives of a step",
        f"{record['collectives']}",
        f"{record['official_collectives']}",
        f"{record['official_collectives'] / record['collectives']:.2f}",
    )
    yield (
        "Sinkhorn against the official form: speed on one CPU thread",
        "",
        "",
        f"{record['speed_ratio']:.2f}",
    )


def checkpoint_stall(record: dict[str, Any]) -> Iterator[Row]:
    """How long a checkpoint holds up training."""
    yield (
        f"Checkpoint of {record['arch']}, {record['bytes'] / 2**20:,.0f} MiB: stall, as a part of 5 minutes",
        f"{record['stall_of_interval']:.3%}",
        f"first of a process group {record['first_stall_of_interval']:.3%}",
        f"{1 / record['stall_per_synchronous']:.1f} (synchronous / ours)",
    )


BENCHMARKS: dict[str, tuple[list[str], Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "loaders.py": ([], loaders),
    "input_pipeline.py": ([], input_pipeline),
    "sinkhorn.py": ([], sinkhorn),
    "checkpoint_stall.py": (["--arch=vit_small", "--json"], checkpoint_stall),
}


def rows(script: str, quick: list[str]) -> Iterator[Row]:
    """Run a benchmark and turn its lines of JSON into rows. Raises ClickException where it fails."""
    arguments, describe = BENCHMARKS[script]
    click.echo(f"running {script}", err=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *arguments, *quick]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{script} failed with exit code {done.returncode}")
    for line in done.stdout.splitlines():
        yield from describe(json.loads(line))


def table(found: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| what | Sonoforge | peer | ratio |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in found)])


@click.command()
@click.option("--write", is_flag=True, help="Keep the table in docs/measurements.md.")
@click.option("--only", multiple=True, type=click.Choice(list(BENCHMARKS)), help="Default: all of them.")
def main(write: bool, only: tuple[str, ...]) -> None:
    """Run the benchmarks and print the table."""
    found = [row for script in only or BENCHMARKS for row in rows(script, [])]
    text = table(found)
    click.echo(text)
    if write:
        header = HEADER.format(cores=os.cpu_count(), machine=platform.machine())
        DOCUMENT.write_text(header + text + "\n")


if __name__ == "__main__":
    main()
