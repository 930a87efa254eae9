"""Small data sets for the stream's tests: a manifest from lists of clips, and real shards on disk."""

import hashlib

import pytest

from sonoforge_trainer.contract import Shard, ShardManifest, dataset_digest


def manifest_of(clips_by_shard, name="test"):
    """A manifest without shards on disk: one shard for each list of clip numbers, one sample for each entry."""
    shards, ordinal = [], 0
    for index, clips in enumerate(clips_by_shard):
        keys = tuple(f"patient-{ordinal + i:06d}" for i in range(len(clips)))
        ordinal += len(clips)
        shards.append(
            Shard(
                name=f"{name}-{index:06d}.tar",
                bytes=1024 * (len(clips) + 1),
                sha256=f"sha256:{hashlib.sha256(str(index).encode()).hexdigest()}",
                keys=keys,
                offsets=tuple(512 + 1024 * i for i in range(len(clips))),
                lengths=(512,) * len(clips),
                clips=tuple(clips),
                patients=("",) * len(clips),
            )
        )
    return ShardManifest(
        name=name,
        samples=ordinal,
        bytes=sum(s.bytes for s in shards),
        dataset_digest=dataset_digest(tuple(shards)),
        shards=tuple(shards),
    )


@pytest.fixture(scope="session")
def make_manifest():
    return manifest_of
