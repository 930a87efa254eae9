"""A small run whose checkpoints the tests write and read, on files and on a real S3 server."""

import dataclasses

import pytest
import torch

from sonoforge_trainer.checkpoint import CheckpointStore, CheckpointWriter, RunIdentity, Snapshot
from sonoforge_trainer.contract import ModelCard
from sonoforge_trainer.storage import Storage, StorageSettings

IDENTITY = RunIdentity(
    job="fetal",
    uid="0b5c",
    seed=7,
    virtual_ranks=4,
    config_digest="sha256:" + "c" * 64,
    data_digest="sha256:" + "d" * 64,
)
CARD = ModelCard(
    arch="vit_tiny",
    embed_dim=192,
    depth=2,
    heads=3,
    patch_size=8,
    registers=0,
    in_channels=1,
    ffn="mlp",
    pos_embed="offset",
    mean=(0.25,),
    std=(0.5,),
    resolution=64,
    data_digest="sha256:" + "d" * 64,
    config_digest="sha256:" + "c" * 64,
    samples=0,
)


def make_snapshot(step: int) -> Snapshot:
    """A state of several types whose values follow from the step."""
    draw = torch.Generator().manual_seed(step)
    weight = torch.randn(33, 17, generator=draw)
    return Snapshot(
        step=step,
        samples=64 * step,
        tensors={
            "student.weight": weight,
            "student.bias": torch.randn(17, generator=draw),
            "teacher.weight": weight * 0.5,
            "optimizer.moment": torch.randn(33, 17, generator=draw).to(torch.bfloat16),
            "optimizer.steps": torch.tensor(step),
            "centers.used": torch.tensor([True, False, step % 2 == 0]),
        },
        teacher={"cls_token": weight[:1].clone(), "norm.weight": weight[0, :5].clone()},
        card=CARD.model_copy(update={"samples": 64 * step}),
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a test's checkpoints are."""

    storage: Storage
    uri: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    """What other processes need to reach it."""

    def store(self, identity: RunIdentity | None = IDENTITY) -> CheckpointStore:
        """A store that has seen nothing yet, as after a restart."""
        return CheckpointStore(self.storage, self.uri, identity)

    def writer(self, attempt: str = "A1", **options: object) -> CheckpointWriter:
        """A writer of a process group of one."""
        return CheckpointWriter(self.storage, self.uri, IDENTITY, attempt, **options)

    def save(self, *steps: int, attempt: str = "A1"):
        """Commit checkpoints of these steps after those that are there, and return their references."""
        there = self.store().committed()
        writer = self.writer(attempt, restored=there[-1] if there else None)
        refs = []
        for step in steps:
            assert writer.save(make_snapshot(step))
            refs.append(writer.wait(60).ref)
        return refs

    def names(self, prefix: str = "") -> list[str]:
        """Every object, below the checkpoints' URI."""
        base = f"{self.uri}/{prefix}"
        return [info.uri.removeprefix(base) for info in self.storage.list(base)]

    def overwrite(self, uri: str, data: bytes) -> None:
        """Damage an object."""
        self.storage.delete(uri)
        self.storage.write(uri, data)


@pytest.fixture
def snapshot():
    """`snapshot(step)`: a small training state."""
    return make_snapshot


@pytest.fixture
def identity() -> RunIdentity:
    """The run that the checkpoints belong to."""
    return IDENTITY


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path) -> Place:
    """An empty place for checkpoints: a folder, and a bucket of a real S3 server."""
    if request.param == "file":
        return Place(Storage(), f"file://{tmp_path}/runs/fetal")
    s3 = request.getfixturevalue("s3")
    return Place(s3.storage, f"{s3.uri}/fetal", s3.env)


@pytest.fixture
def folder(tmp_path) -> Place:
    """An empty folder for checkpoints."""
    return Place(Storage(), f"file://{tmp_path}/runs/fetal")


@pytest.fixture
def faulty(s3, proxy) -> tuple[Place, Place]:
    """A place for checkpoints behind the fault proxy, and the same place without it."""
    settings = StorageSettings(endpoint=proxy.endpoint, retry_first_delay_seconds=0.01, stall_seconds=5.0)
    return Place(Storage(settings), f"{s3.uri}/fetal"), Place(s3.storage, f"{s3.uri}/fetal")
