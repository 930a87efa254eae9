"""Sonoforge's side of `loaders.py`: what `Stream` does for a micro-batch, up to the bytes or the pixels of samples.

Order, shard cache and the thread that fetches shards ahead are those of `Stream`; what is left out comes after
decoding: crops, the parameters of the photometrics, masks.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import structlog
from loaders_peers import MICRO_BATCH, Epoch, Job, serve

from sonoforge_trainer.contract import ExecutionConfig, ShardManifest, TrainConfig
from sonoforge_trainer.decode import decode
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.stream import Stream


class Sonoforge:
    """Sonoforge: samples of four shards at a time are shuffled. Any step can be asked for."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def prepare(self) -> None:
        """Nothing: the shards are there."""

    def open(self, source: str, cache: str) -> Epoch:
        """A pass over the shards below `source`; on local disk, the cache has been filled before."""
        recipe = {"preset": "tiny", "globalBatch": MICRO_BATCH, "virtualRanks": 1}
        base_uri, storage = source if source.startswith("s3://") else Path(source).as_uri(), Storage.from_env()
        data = {"shards": f"{base_uri}/shards.json", "blockShards": 4}
        training = TrainConfig.resolve({"data": data, "recipe": recipe})
        manifest = ShardManifest.model_validate_json(storage.read(training.data.shards))
        execution = ExecutionConfig(loader_workers=0, cache_dir=cache or f"{self._job.scratch}/cache")
        stream = Stream(manifest, base_uri, training, execution, storage, KeyHasher(b"benchmark-benchmark"))
        return lambda number: raw_samples(stream, self._job.samples // MICRO_BATCH * number, self._job.samples)


def raw_samples(stream: Stream, first_step: int, samples: int) -> Iterator[bytes]:
    """The encoded samples of the stream from a step on; `MicroBatchMaker._image` without decoding."""
    # The parts of Stream are private because only bytes without pixels, which no training wants, need them apart.
    make = stream._make
    prefetch = stream._prefetcher([0])
    for step in range(first_step, first_step + samples // MICRO_BATCH):
        prefetch(step)
        ordinals_b, _, _ = make.order.places(step, 0)
        for ordinal in ordinals_b.tolist():
            yield make.encoded(ordinal)


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    _job = Job.parse(sys.argv[1])
    serve(_job, Sonoforge(_job), lambda data: decode(data, 1))
