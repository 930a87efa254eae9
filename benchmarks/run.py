"""`make bench`: every benchmark, one after the other, as one table of ratios.

    python benchmarks/run.py [--write]

Each row is made in one run on one machine, with the peer beside it, in turns. `--write` keeps the table in
docs/measurements.md. `--quick` only shows that everything runs: at its sizes, ratios mean nothing.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "measurements.md"

HEADER = """# Measurements

<!-- Written by `python benchmarks/run.py --write`; do not edit. `make bench` prints the same table. -->

A ratio above 1 is in favour of Sonoforge. Each was measured in one run on one machine, in turns with its peer: the
median over rounds, where there are brackets with the quartiles. Machine: {cores} cores, {machine}, no GPU. The commands
run from the checkout after `make bench` has made both environments; the head of each script says what it measures and
how the peer is set up. Times to recover from kills come from `make chaos`.

"""

NOTES = """
Of the loaders, webdataset cannot resume inside an epoch; the others can, exactly. Sonoforge's first epoch from S3
also writes each shard to disk and verifies its sha256; litdata and mosaicml-streaming write without verifying,
webdataset keeps nothing and fetches all again in the next epoch. On loopback, where the server costs no waiting, that
work is what the ratio shows. Decoding is the same calls for all and takes nearly all the time of its rows, so they
say that a loader costs nothing beside it.

Sinkhorn in the log domain exponentiates in each pass, so that it cannot overflow, and is slower on a CPU; it moves
less memory, shares 4 sums of 2K numbers a step between processes, and holds one chunk of exponentials instead of all.

Not compared: whole training steps.
"""


class Row(NamedTuple):
    """One line of the table."""

    what: str
    own: str
    peer: str
    ratio: str
    goal: str
    command: str


def loaders(record: dict[str, Any]) -> Iterator[Row]:
    """Streaming beside webdataset, litdata and mosaicml-streaming."""
    kind = {
        "bytes": "JPEG bytes, local files",
        "pixels": "the same, decoded to gray",
        "s3": "JPEG bytes from S3 at 80 MB/s a connection, no cache yet",
        "s3-loopback": "JPEG bytes from S3 on loopback, no cache yet",
    }[record["kind"]]
    low, high = record["quartiles"]
    yield Row(
        f"{record['peer']}: {kind}",
        f"{record['samples_per_second']:,} samples/s",
        f"{record['peer_samples_per_second']:,} samples/s",
        f"{record['ratio']:.2f} ({low:.2f} to {high:.2f})",
        "1",
        f"loaders.py --kind {record['kind']} --peer {record['peer']}",
    )


def input_pipeline(record: dict[str, Any]) -> Iterator[Row]:
    """Decoding and crops of one core beside the official recipe."""
    stored = {"RGB": "colour", "L": "gray"}[record["jpeg"]]
    own = 1000 / record["stream_images_per_second"]
    peer = f"{record['reference_images_per_second']:.0f} images/s a core"
    for what, images_per_second, ratio, goal in (
        ("all that the CPU does", 1000 / own, record["ratio"], "6"),
        (
            "the device's photometrics on the CPU, too",
            1000 / (own + record["photometrics_on_cpu_ms"]),
            record["ratio_with_photometrics_on_cpu"],
            "",
        ),
    ):
        yield Row(
            f"official PIL recipe, JPEGs stored as {stored}: {what}",
            f"{images_per_second:.0f} images/s a core",
            peer,
            f"{ratio:.1f}",
            goal,
            "input_pipeline.py",
        )


def sinkhorn(record: dict[str, Any]) -> Iterator[Row]:
    """Sinkhorn-Knopp beside the exponential form."""
    own, peer = record["collectives"], record["official_collectives"]
    size = f"{record['rows']} x {record['prototypes']:,}"
    for what, ours, theirs, ratio in (
        ("collectives a step", f"{own}", f"{peer}", peer / own),
        (
            "elements read and written, in units of the logits",
            f"{record['traffic']}",
            f"{record['official_traffic']}",
            record["traffic_ratio"],
        ),
        (
            f"time for {size} logits, one CPU thread",
            f"{record['milliseconds']:.0f} ms",
            f"{record['official_milliseconds']:.0f} ms",
            record["speed_ratio"],
        ),
    ):
        yield Row(f"official Sinkhorn: {what}", ours, theirs, f"{ratio:.2f}", "", "sinkhorn.py")


def checkpoint_stall(record: dict[str, Any]) -> Iterator[Row]:
    """How long a checkpoint holds up training."""
    yield Row(
        f"synchronous checkpoint of {record['arch']}, {record['bytes'] / 2**20:,.0f} MiB, every 5 minutes: time lost",
        f"{record['stall_of_interval']:.3%} (the first: {record['first_stall_of_interval']:.3%})",
        f"{record['stall_of_interval'] / record['stall_per_synchronous']:.3%}",
        f"{1 / record['stall_per_synchronous']:.1f}",
        "lost below 1 %",
        f"checkpoint_stall.py --arch {record['arch']}",
    )


class Benchmark(NamedTuple):
    """A script that prints lines of JSON."""

    arguments: list[str]
    quick: list[str]
    describe: Callable[[dict[str, Any]], Iterator[Row]]


BENCHMARKS = {
    "loaders.py": Benchmark([], ["--samples=128", "--shard-mib=1", "--rounds=1"], loaders),
    "input_pipeline.py": Benchmark([], ["--images=4", "--rounds=1"], input_pipeline),
    "sinkhorn.py": Benchmark([], ["--prototypes=256", "--images=2", "--masked=8", "--rounds=1"], sinkhorn),
    "checkpoint_stall.py": Benchmark(["--json"], ["--arch=vit_tiny", "--preset=tiny", "--saves=1"], checkpoint_stall),
}


def rows(script: str, quick: bool) -> Iterator[Row]:
    """Run a benchmark and turn its lines of JSON into rows. Raises ClickException where it fails."""
    benchmark = BENCHMARKS[script]
    command = [sys.executable, str(ROOT / "benchmarks" / script), *benchmark.arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if quick:
        command += benchmark.quick
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            for row in benchmark.describe(json.loads(line)):
                click.echo(f"{row.what}: {row.ratio}", err=True)
                yield row
    if process.returncode:
        raise click.ClickException(f"{script} failed with exit code {process.returncode}")


def table(found: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| beside | Sonoforge | peer | ratio | goal | `.venv/bin/python benchmarks/` |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row[:-1])} | `{row.command}` |" for row in found]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--write", is_flag=True, help="Keep the table in docs/measurements.md.")
@click.option("--quick", is_flag=True, help="Tiny sizes, to see that everything runs.")
@click.option("--only", multiple=True, type=click.Choice(list(BENCHMARKS)), help="Default: all of them.")
def main(write: bool, quick: bool, only: tuple[str, ...]) -> None:
    """Run the benchmarks and print the table."""
    if write and (quick or only):
        raise click.UsageError("--write takes the whole table; leave out --quick and --only")
    text = table([row for script in only or BENCHMARKS for row in rows(script, quick)])
    click.echo(text)
    if write:
        header = HEADER.format(cores=os.cpu_count(), machine=platform.machine())
        DOCUMENT.write_text(header + text + NOTES)


if __name__ == "__main__":
    main()
