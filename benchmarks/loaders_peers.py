"""The peers of `loaders.py`, each used as its documentation recommends. Runs in the peers' own environment.

A loader is made from one data set, a folder or an s3:// prefix, and gives the JPEG bytes of every sample once an epoch,
shuffled, in this process. `serve` runs passes as it is told on standard input, so that loaders can take turns.
"""

import io
import itertools
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

MICRO_BATCH = 64
"""Samples of a micro-batch, of those that know of one; the number of samples in the set is a multiple of it."""
SHUFFLE_SAMPLES = 1000
"""Samples that webdataset and mosaicml-streaming shuffle together; the tutorials' order of magnitude."""


@dataclass(frozen=True)
class Job:
    """What a process that holds one loader is given when it starts."""

    loader: str
    images: str
    """Folder of the JPEGs, 000000.jpg and so on."""
    local: str
    """Data set in the loader's format on local disk; written by `prepare`."""
    remote: str
    """The same as an s3:// prefix."""
    scratch: str
    """Folder for caches of what comes from S3."""
    samples: int
    shards: int
    shard_bytes: int
    core: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the text of `dump`."""
        return cls(**json.loads(text))

    def dump(self) -> str:
        """As one command line argument."""
        return json.dumps(asdict(self))


Epoch = Callable[[int], Iterator[Any]]
"""A pass over the data: the bytes of every sample of an epoch."""


class WebDataset:
    """webdataset: the shards' order and then a buffer of samples are shuffled. It cannot resume.

    s3:// comes through a boto3 handler, which its FAQ recommends, under a 1 MiB read buffer, which makes it twice as
    fast. It streams and keeps no cache; with one it would read everything twice in the first epoch.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def prepare(self) -> None:
        """Nothing: it reads the tars that Sonoforge reads."""

    def open(self, source: str, cache: str) -> Epoch:
        """A pass over the tars below `source`."""
        import boto3
        import webdataset

        if source.startswith("s3://"):
            client = boto3.client("s3")

            def open_s3(url: str, *_: Any, **__: Any) -> Any:
                bucket, _, key = url.removeprefix("s3://").partition("/")
                return io.BufferedReader(client.get_object(Bucket=bucket, Key=key)["Body"], 2**20)

            webdataset.gopen_schemes["s3"] = open_s3
        urls = [f"{source}/bench-{index:06d}.tar" for index in range(self._job.shards)]
        data = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(SHUFFLE_SAMPLES)
        return lambda _: (sample["jpg"] for sample in data)


class LitData:
    """litdata: chunks and the samples in them are shuffled. Its state dict resumes exactly.

    obstore, which it prefers for s3://, is installed; its cache holds the whole set.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def prepare(self) -> None:
        """Write its chunks."""
        import litdata

        litdata.optimize(
            fn=partial(_read, self._job.images),
            inputs=list(range(self._job.samples)),
            output_dir=self._job.local,
            chunk_bytes=self._job.shard_bytes,
            num_workers=1,
            verbose=False,
        )

    def open(self, source: str, cache: str) -> Epoch:
        """A pass over the chunks below `source`."""
        import litdata
        from litdata.streaming import downloader

        # obstore refuses http, and litdata has no setting for it; without this it would fall back to plain boto3.
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        where = {"cache_dir": cache} if source.startswith("s3://") else {}
        data = litdata.StreamingDataset(source, shuffle=True, max_cache_size="100GB", **where)
        return lambda _: (sample["jpg"] for sample in data)


class Mosaic:
    """mosaicml-streaming: py1e shuffle, the default, in blocks. Its state dict resumes exactly.

    With its default `predownload` it would wait in ticks of 7 ms for the thread that runs ahead.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def prepare(self) -> None:
        """Write its MDS shards."""
        import streaming

        with streaming.MDSWriter(
            out=self._job.local, columns={"jpg": "bytes"}, size_limit=self._job.shard_bytes
        ) as writer:
            for index in range(self._job.samples):
                writer.write(_read(self._job.images, index))

    def open(self, source: str, cache: str) -> Epoch:
        """A pass over the MDS shards below `source`."""
        import streaming

        where = {"remote": source, "local": cache} if source.startswith("s3://") else {"local": source}
        data = streaming.StreamingDataset(
            **where,
            shuffle=True,
            batch_size=MICRO_BATCH,
            num_canonical_nodes=1,
            shuffle_block_size=SHUFFLE_SAMPLES,
            predownload=self._job.samples,
        )
        return lambda _: (sample["jpg"] for sample in data)


LOADERS = {"webdataset": WebDataset, "litdata": LitData, "mosaicml-streaming": Mosaic}


def _read(images: str, index: int) -> dict[str, bytes]:
    return {"jpg": Path(images, f"{index:06d}.jpg").read_bytes()}


def decode_gray(data: Any) -> Any:
    """What Pillow needs to be told to decode a JPEG to gray pixels [H, W]."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        image.draft("L", image.size)
        return np.asarray(image.convert("L") if image.mode != "L" else image)


def serve(job: Job, loader: Any, decode: Callable[[Any], Any]) -> None:
    """Prepare, then answer each line of JSON on standard input with one on standard output, until it ends.

    A request names the samples to take, whether to decode, whether to add up checksums, and an S3 endpoint. With an
    endpoint, the data come from there through a new loader with an empty cache; without one, from local files, and a
    request goes on where the one before ended. The answer has the seconds from asking for the first sample to having
    the last one, how many there were and the sum of checksums.
    """
    os.sched_setaffinity(0, {job.core})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    loader.prepare()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    local: Iterator[Any] = iter(())
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        take = partial(measure, request, decode if request["decode"] else None)
        if not request["endpoint"]:
            if not number:
                local = endless(loader.open(job.local, ""))
            answer = take(local)
        else:
            os.environ["AWS_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL_S3"] = request["endpoint"]
            os.environ["S3_ENDPOINT_URL"] = request["endpoint"]  # mosaicml-streaming's own name for it
            with tempfile.TemporaryDirectory(dir=job.scratch, ignore_cleanup_errors=True) as cache:
                answer = take(loader.open(job.remote, cache)(0))
        print(json.dumps(answer), file=answers, flush=True)


def endless(epoch: Epoch) -> Iterator[Any]:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(epoch(number) for number in itertools.count())


def measure(request: dict[str, Any], decode: Callable[[Any], Any] | None, samples: Iterator[Any]) -> dict[str, Any]:
    """Take the samples of one request."""
    count = checksum = 0
    started = time.perf_counter()
    for data in itertools.islice(samples, request["samples"]):
        count += 1
        if decode:
            decode(data)
        if request["check"]:
            checksum += zlib.crc32(data)
    return {"seconds": time.perf_counter() - started, "samples": count, "checksum": checksum}


if __name__ == "__main__":
    _job = Job.parse(sys.argv[1])
    serve(_job, LOADERS[_job.loader](_job), decode_gray)
