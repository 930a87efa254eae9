"""Images a second that one CPU core makes ready for DINOv2, beside the reference's pipeline on Pillow.

    python benchmarks/input_pipeline.py --images 48

Both read the same 640x480 JPEGs, on the same core, in turns, in one process. The reference pipeline is rebuilt from its
description: decode to RGB, then for each of 2 global and 8 local crops a bicubic random resized crop, flip, colour
jitter, gray-scale, Gaussian blur, solarisation, and normalisation to floats. Ours is everything that `Stream` does on
the CPU for the `ultradino` preset: sample order, reading from the shard cache, gray decoding, geometry, the parameters
of the photometrics and the iBOT masks. What the device does with them is timed too, on the same core, and counted in
`ratio_with_photometrics_on_cpu`.
"""

import hashlib
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import structlog
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from sonoforge_trainer import photometric
from sonoforge_trainer.cache import ShardCache
from sonoforge_trainer.contract import Shard, ShardManifest, TrainConfig, dataset_digest
from sonoforge_trainer.micro_batch import MicroBatchMaker
from sonoforge_trainer.storage import Storage

Pipeline = Callable[[list[bytes]], object]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def speckle_jpeg(seed: int, mode: str) -> bytes:
    """A smooth random scene under multiplicative speckle, 640x480, quality 90."""
    rng = np.random.default_rng(seed)
    scene = Image.fromarray((rng.gamma(1.0, 40.0, (24, 32)).clip(0, 255)).astype(np.uint8))
    smooth = np.asarray(scene.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float64)
    speckle = rng.rayleigh(0.8, (240, 320)).repeat(2, axis=0).repeat(2, axis=1)
    pixels = (smooth * (0.5 + 0.5 * speckle)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Reference:
    """DINOv2's data augmentation as its repository describes it, with the blur probabilities that really apply."""

    def __init__(self) -> None:
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
        colour = [transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(0.2)]
        blur = transforms.GaussianBlur(9, sigma=(0.1, 2.0))
        finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        extras = (
            [],
            [transforms.RandomApply([blur], p=0.9), transforms.RandomSolarize(128, p=0.2)],
            [transforms.RandomApply([blur], p=0.5)],
        )
        self._crops = [
            transforms.Compose([self._geometry(size, scale), *colour, *extra, *finish])
            for extra, size, scale in zip(extras, (224, 224, 96), ((0.32, 1.0), (0.32, 1.0), (0.05, 0.32)), strict=True)
        ]

    @staticmethod
    def _geometry(size: int, scale: tuple[float, float]) -> transforms.Compose:
        crop = transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC)
        return transforms.Compose([crop, transforms.RandomHorizontalFlip(0.5)])

    def __call__(self, data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        first, second, local = self._crops
        return [first(image), second(image), *(local(image) for _ in range(8))]


def build_shard(folder: Path, images: list[bytes]) -> ShardManifest:
    """One shard of the images, each a clip of its own."""
    buffer, offsets = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index, data in enumerate(images):
            member = tarfile.TarInfo(f"{index:06d}.jpg")
            member.size = len(data)
            offsets.append(buffer.tell() + tarfile.BLOCKSIZE)
            tar.addfile(member, io.BytesIO(data))
    content = buffer.getvalue()
    (folder / "bench-000000.tar").write_bytes(content)
    shard = Shard(
        name="bench-000000.tar",
        bytes=len(content),
        sha256=f"sha256:{hashlib.sha256(content).hexdigest()}",
        keys=tuple(f"{index:06d}" for index in range(len(images))),
        offsets=tuple(offsets),
        lengths=tuple(map(len, images)),
        clips=tuple(range(len(images))),
        patients=("",) * len(images),
    )
    return ShardManifest(
        name="bench",
        samples=len(images),
        bytes=len(content),
        dataset_digest=dataset_digest((shard,)),
        shards=(shard,),
    )


def measure(mode: str, images: int, rounds: int) -> dict[str, Any]:
    """Images a second of both pipelines on this core: the median of the rounds, which take turns."""
    data = [speckle_jpeg(seed, mode) for seed in range(images)]
    recipe = {"preset": "ultradino", "globalBatch": images, "virtualRanks": 1}
    training = TrainConfig.resolve({"data": {"shards": "file:///bench/shards.json"}, "recipe": recipe})
    reference = Reference()
    seconds: dict[str, list[float]] = {"reference": [], "stream": [], "photometrics": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = build_shard(folder, data)
        make = MicroBatchMaker(manifest, training, ShardCache(folder / "cache", 2**30, Storage(), folder.as_uri()))
        make(0, 0)
        reference(data[0])
        for step in range(rounds):
            started = time.perf_counter()
            for image in data:
                reference(image)
            read = time.perf_counter()
            batch = make(step, 0)
            made = time.perf_counter()
            for crops_u8, photo in (
                (batch.globals_u8, batch.globals_photo),
                (batch.locals_u8, batch.locals_photo),
            ):
                photometric.apply(crops_u8, photo, training.data.mean, training.data.std)
            ended = time.perf_counter()
            seconds["reference"].append(read - started)
            seconds["stream"].append(made - read)
            seconds["photometrics"].append(ended - made)
        make.cache.close()
    reference_s, stream_s, photometrics_s = (statistics.median(times) / images for times in seconds.values())
    return {
        "jpeg": mode,
        "reference_images_per_second": round(1 / reference_s, 1),
        "stream_images_per_second": round(1 / stream_s, 1),
        "ratio": round(reference_s / stream_s, 2),
        "photometrics_on_cpu_ms": round(1e3 * photometrics_s, 2),
        "ratio_with_photometrics_on_cpu": round(reference_s / (stream_s + photometrics_s), 2),
    }


@click.command()
@click.option("--images", default=32, show_default=True, help="Images in a round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds; the median counts.")
def main(images: int, rounds: int) -> None:
    """Print one line of JSON for JPEGs stored as colour, and one for JPEGs stored as gray."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    for mode in ("RGB", "L"):
        click.echo(json.dumps({"benchmark": "input_pipeline", **measure(mode, images, rounds)}))


if __name__ == "__main__":
    main()
