"""Samples a second from shuffled shards, beside webdataset, litdata and mosaicml-streaming on the same JPEGs.

    python benchmarks/loaders.py

The set is gray 512x512 speckle of about 90 KiB a JPEG, in each loader's own format, in shards of the same size. Each
loader runs in one process of its own, all on one core, and they take turns; the S3 server has the other cores. Measured
are `bytes`, every sample's JPEG from local files; `pixels`, the same decoded to gray by the same calls of Pillow; `s3`,
the JPEGs from a real S3 server (SeaweedFS) with an empty cache, each connection limited to 80 MB/s, which is what S3
gives a request; and `s3-loopback`, the same without a limit. Passes that are not timed check by checksum that each
loader gives every image exactly once. Files are on a RAM disk where there is room, so that loaders
and not disks are compared. Prints a line of JSON for each peer and kind: samples a second of both, and the median of
the ratios of the rounds.
"""

import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import structlog
from loaders_peers import LOADERS, MICRO_BATCH, Job
from PIL import Image

from sonoforge_trainer.contract import Shard, ShardManifest, dataset_digest
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.storage.server import BUCKET, S3Server

ROOT = Path(__file__).resolve().parent.parent
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
NO_PEERS = "the peers are not installed: run `make bench`, which makes .venv-bench"
RAM_DISK = Path("/dev/shm")
CONNECTION_MB_PER_SECOND = 80
"""What S3 gives one request, by AWS's guideline and by measurement."""
KINDS = {"bytes": "", "pixels": "", "s3": "slow", "s3-loopback": "fast"}
"""What is measured, and the network to the S3 server that it needs."""


def speckle_jpegs(folder: Path, samples: int) -> list[bytes]:
    """Write and return distinct fully developed speckle frames: a fan-like scene times a shifted random field."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:512, 0:512] / 512
    scene = 10 + 60 * (np.abs(columns - 0.5) < 0.1 + 0.35 * rows) * (1 - 0.5 * rows)
    field = rng.rayleigh(0.8, (256, 512)).repeat(2, axis=0)  # as wide as the beam, as deep as the pulse
    images = []
    for index in range(samples):
        rolled = np.roll(field, rng.integers(512, size=2), axis=(0, 1))
        pixels = (scene * rolled).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
        (folder / f"{index:06d}.jpg").write_bytes(images[-1])
    return images


def build_shards(folder: Path, images: list[bytes], shard_bytes: int) -> ShardManifest:
    """Tars of at most about `shard_bytes` and their manifest; each image is a clip of its own."""
    per_shard = max(1, shard_bytes * len(images) // sum(map(len, images)))
    shards = []
    for number, first in enumerate(range(0, len(images), per_shard)):
        members = range(first, min(first + per_shard, len(images)))
        buffer, offsets = io.BytesIO(), []
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index in members:
                member = tarfile.TarInfo(f"{index:06d}.jpg")
                member.size = len(images[index])
                offsets.append(buffer.tell() + tarfile.BLOCKSIZE)
                tar.addfile(member, io.BytesIO(images[index]))
        content, name = buffer.getvalue(), f"bench-{number:06d}.tar"
        (folder / name).write_bytes(content)
        shards.append(
            Shard(
                name=name,
                bytes=len(content),
                sha256=f"sha256:{hashlib.sha256(content).hexdigest()}",
                keys=tuple(f"{index:06d}" for index in members),
                offsets=tuple(offsets),
                lengths=tuple(len(images[index]) for index in members),
                clips=tuple(members),
                patients=("",) * len(members),
            )
        )
    manifest = ShardManifest(
        name="bench",
        samples=len(images),
        bytes=sum(shard.bytes for shard in shards),
        dataset_digest=dataset_digest(shards),
        shards=tuple(shards),
    )
    (folder / "shards.json").write_text(manifest.model_dump_json(by_alias=True))
    return manifest


class Process:
    """A process that holds one loader."""

    def __init__(self, job: Job, environment: dict[str, str]) -> None:
        own = job.loader == "sonoforge"
        script = ROOT / "benchmarks" / ("loaders_own.py" if own else "loaders_peers.py")
        self._log = Path(job.scratch, f"{job.loader}.log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable if own else str(PEERS_PYTHON), str(script), job.dump()],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answer()

    def take(self, samples: int, endpoint: str, *, decode: bool, check: bool = False) -> dict[str, Any]:
        """One request; see `loaders_peers.serve`."""
        assert self._process.stdin
        request = {"samples": samples, "endpoint": endpoint, "decode": decode, "check": check}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it in order, so that its semaphores go with it, or else at once."""
        with suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.communicate(timeout=10)
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise click.ClickException(f"a loader ended: {self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Set:
    """The images, where every loader finds them."""

    job: Job
    """To be completed for each loader."""
    environment: dict[str, str]
    """For the processes of loaders."""
    endpoints: dict[str, str]
    """S3 endpoint by network."""
    checksum: int
    """Sum of the images' checksums."""


@contextmanager
def prepared(samples: int, shard_bytes: int) -> Iterator[Set]:
    """Images on disk, and an S3 server behind two networks."""
    room = RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > 12 * 100_000 * samples
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        name = tempfile.TemporaryDirectory(dir=RAM_DISK if room else None, prefix="sonoforge-bench-")
        folder = Path(stack.enter_context(name))
        for part in ("images", "tars", "scratch"):
            (folder / part).mkdir()
        images = speckle_jpegs(folder / "images", samples)
        manifest = build_shards(folder / "tars", images, shard_bytes)
        os.sched_setaffinity(0, set(cores[1:]) or set(cores))  # server and proxy inherit it
        server = stack.enter_context(S3Server(folder / "s3"))
        upstream = server.endpoint.removeprefix("http://")
        command = [sys.executable, "benchmarks/slow_network.py", upstream, str(CONNECTION_MB_PER_SECOND)]
        proxy = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        stack.callback(proxy.communicate)
        stack.callback(proxy.kill)
        assert proxy.stdout
        job = Job(
            loader="",
            images=str(folder / "images"),
            local=str(folder / "tars"),
            remote=f"s3://{BUCKET}/tars",
            scratch=str(folder / "scratch"),
            samples=samples,
            shards=len(manifest.shards),
            shard_bytes=shard_bytes,
            core=cores[0],
        )
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "SONOFORGE_"))},
            **server.environment(),
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        endpoints = {"": "", "fast": server.endpoint, "slow": f"http://{proxy.stdout.readline().strip()}"}
        yield Set(job, environment, endpoints, sum(map(zlib.crc32, images)))


def start(data: Set, loader: str) -> Process:
    """A process with a loader, its data set prepared and uploaded."""
    tars = loader in ("sonoforge", "webdataset")
    local = data.job.local if tars else str(Path(data.job.images).parent / loader)
    remote = data.job.remote if tars else f"s3://{BUCKET}/{loader}"
    process = Process(replace(data.job, loader=loader, local=local, remote=remote), data.environment)
    if loader != "webdataset":  # it shares Sonoforge's
        os.environ.update({key: value for key, value in data.environment.items() if key.startswith("AWS_")})
        storage = Storage()
        for path in sorted(Path(local).rglob("*")):
            if path.is_file():
                storage.write(f"{remote}/{path.relative_to(local)}", path.read_bytes())
    return process


def compare(processes: dict[str, Process], kind: str, data: Set, rounds: int) -> Iterator[dict[str, Any]]:
    """A record for each peer. In each round, every loader has its turn."""
    everything = data.job.samples
    # Bytes of an epoch take 0.02 to 0.2 s, its pixels 2 s; turns of some tenths of a second share what disturbs them.
    samples, turns = {"bytes": (4 * everything, 1), "pixels": (everything // 8, 4)}.get(kind, (everything, 1))
    endpoint, decode = data.endpoints[KINDS[kind]], kind == "pixels"
    for loader, process in processes.items():
        found = process.take(everything, endpoint, decode=decode, check=True)
        if (found["samples"], found["checksum"]) != (everything, data.checksum):
            raise click.ClickException(
                f"{loader} gave {found['samples']} samples, or not each of the {everything} once"
            )
    rates: dict[str, list[float]] = {loader: [] for loader in processes}
    order = list(processes)
    for _ in range(rounds * turns):
        for loader in order:
            found = processes[loader].take(samples, endpoint, decode=decode)
            rates[loader].append(found["samples"] / found["seconds"])
        order.append(order.pop(0))
    own = rates.pop("sonoforge")
    for loader, peer in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(own, peer, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        yield {
            "benchmark": "loaders",
            "kind": kind,
            "peer": loader,
            "samples_per_second": round(statistics.median(own)),
            "peer_samples_per_second": round(statistics.median(peer)),
            "ratio": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }


@click.command()
@click.option("--samples", default=2048, show_default=True, help=f"Images in the set, a multiple of {MICRO_BATCH}.")
@click.option("--rounds", default=5, show_default=True, help="Rounds; loaders take turns in each.")
@click.option("--shard-mib", default=16, show_default=True, help="Size of shards in MiB.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Default: all of them.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(LOADERS)), help="Default: all of them.")
def main(samples: int, rounds: int, shard_mib: int, kinds: tuple[str, ...], peers: tuple[str, ...]) -> None:
    """Compare loaders; see the top of this file."""
    if not PEERS_PYTHON.exists():
        raise click.ClickException(NO_PEERS)
    if samples % MICRO_BATCH:
        raise click.UsageError(f"--samples must be a multiple of {MICRO_BATCH}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    with prepared(samples, shard_mib * 2**20) as data, ExitStack() as stack:
        processes = {}
        for loader in ("sonoforge", *(peers or LOADERS)):
            processes[loader] = start(data, loader)
            stack.callback(processes[loader].close)
        for kind in kinds or KINDS:
            for record in compare(processes, kind, data, rounds):
                click.echo(json.dumps(record))


if __name__ == "__main__":
    main()
