"""Small data sets for the stream's tests: a manifest from lists of clips, and real shards on disk."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from sonoforge_trainer.contract import ExecutionConfig, Shard, ShardManifest, TrainConfig, dataset_digest
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.stream import Stream


def manifest_of(shards, name="test"):
    return ShardManifest(
        name=name,
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        dataset_digest=dataset_digest(tuple(shards)),
        shards=tuple(shards),
    )


@pytest.fixture(scope="session")
def make_manifest():
    """A function from lists of clip numbers, one for each shard, to a manifest without shards on disk."""

    def make(clips_by_shard):
        shards, first = [], 0
        for index, clips in enumerate(clips_by_shard):
            shards.append(
                Shard(
                    name=f"test-{index:06d}.tar",
                    bytes=1024 * (len(clips) + 1),
                    sha256=f"sha256:{hashlib.sha256(str(index).encode()).hexdigest()}",
                    keys=tuple(f"{first + i:06d}" for i in range(len(clips))),
                    offsets=tuple(512 + 1024 * i for i in range(len(clips))),
                    lengths=(512,) * len(clips),
                    clips=tuple(clips),
                    patients=("",) * len(clips),
                )
            )
            first += len(clips)
        return manifest_of(shards)

    return make


def jpeg(ordinal):
    """A noisy gray gradient; its size and content depend on the ordinal."""
    rng = np.random.default_rng(ordinal)
    rows, columns = 40 + ordinal % 7, 52 + ordinal % 5
    pixels = np.linspace(0, 200, rows)[:, None] + rng.integers(0, 56, (rows, columns))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shard(folder, index, clips, images):
    """A WebDataset tar with patient-like keys."""
    buffer, offsets, lengths, keys = io.BytesIO(), [], [], []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for position, data in enumerate(images):
            keys.append(f"MRN{index:03d}{position:03d}_DOE_JANE")
            member = tarfile.TarInfo(f"{keys[-1]}.jpg")
            member.size = len(data)
            offsets.append(buffer.tell() + 512)
            lengths.append(len(data))
            tar.addfile(member, io.BytesIO(data))
    name, content = f"test-{index:06d}.tar", buffer.getvalue()
    (folder / name).write_bytes(content)
    return Shard(
        name=name,
        bytes=len(content),
        sha256=f"sha256:{hashlib.sha256(content).hexdigest()}",
        keys=keys,
        offsets=offsets,
        lengths=lengths,
        clips=clips,
        patients=[""] * len(clips),
    )


@pytest.fixture(scope="session")
def make_data_set():
    """A function that writes shards of 8 samples, two frames a clip, and gives their manifest.

    `corrupt` names the ordinals whose image is cut in half.
    """

    def make(folder, shards=4, corrupt=()):
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for index in range(shards):
            ordinals = range(8 * index, 8 * index + 8)
            images = [jpeg(o)[: len(jpeg(o)) // 2 if o in corrupt else None] for o in ordinals]
            made.append(write_shard(folder, index, [o // 2 for o in ordinals], images))
        return manifest_of(made)

    return make


@pytest.fixture(scope="session")
def data_set(make_data_set, tmp_path_factory):
    """A folder of four whole shards, and their manifest. Do not change the folder."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, make_data_set(folder)


@pytest.fixture(scope="session")
def make_training():
    """A function that gives the tiny preset on crops of 32 and 16 pixels, with 4 virtual ranks of 3 samples."""

    def make(**recipe):
        crops = {"globalSize": 32, "localSize": 16, "localCount": 2}
        recipe = {"preset": "tiny", "globalBatch": 12, "virtualRanks": 4, "crops": crops, **recipe}
        return TrainConfig.resolve({"data": {"shards": "file:///x/shards.json"}, "recipe": recipe})

    return make


@pytest.fixture
def make_stream(make_training, tmp_path):
    """A function that opens a stream on a folder of shards; all are closed at the end."""
    opened = []

    def make(folder, manifest, training=None, workers=0, **execution):
        execution = {"device": "cpu", "cache_dir": str(tmp_path / "cache"), **execution}
        stream = Stream(
            manifest,
            folder.as_uri(),
            training or make_training(),
            ExecutionConfig(loader_workers=workers, **execution),
            Storage(),
            KeyHasher(b"0123456789abcdef"),
        )
        opened.append(stream)
        return stream

    yield make
    for stream in opened:
        stream.close()
