"""The shard manifest `shards.json`: what a data set is, to the byte."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonoforge_trainer.contract.base import Part, canonical_json

Sha256 = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Shard(Part):
    """One WebDataset tar. Samples are in the order of the tar; the lists have one entry for each."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")]
    """File name, beside the manifest."""
    bytes: Annotated[int, Field(gt=0)]
    """Size of the tar."""
    sha256: Sha256
    """Digest of the tar."""
    keys: tuple[str, ...]
    """WebDataset key of each sample."""
    offsets: tuple[int, ...]
    """Byte offset of each sample's image member data inside the tar."""
    lengths: tuple[int, ...]
    """Length in bytes of each sample's image member."""
    clips: tuple[int, ...]
    """Number of each sample's clip, unique in the data set. A still image is a clip of its own."""
    patients: tuple[str, ...]
    """Keyed hash of each sample's patient; empty text where it is not known."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.keys)

    @model_validator(mode="after")
    def _lists_have_one_entry_a_sample(self) -> Self:
        for name in ("offsets", "lengths", "clips", "patients"):
            if len(getattr(self, name)) != len(self.keys):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.keys)} keys")
        return self


class ShardManifest(Part):
    """A data set as a list of shards. Its digest is its identity."""

    format: Literal["sonoforge.shards/v1"] = "sonoforge.shards/v1"
    """Format of this document."""
    name: str
    """What people call the data set."""
    synthetic: bool = False
    """True for images that were generated and not measured."""
    licence: str = ""
    """Licence of the images; it travels with them."""
    citation: str = ""
    """How to cite the images."""
    classes: tuple[str, ...] = ()
    """Class names of a labelled set, sorted. Labels are texts, never numbers."""
    mask_classes: tuple[str, ...] = ()
    """Names of mask values 0, 1, 2 ... of a set with masks; value 0 is the background."""
    samples: Annotated[int, Field(gt=0)]
    """Number of samples in all shards."""
    bytes: Annotated[int, Field(gt=0)]
    """Size of all shards."""
    dataset_digest: Sha256
    """Digest over the shards' names, counts, sizes and digests, in order."""
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]
    """The shards, in order."""

    @model_validator(mode="after")
    def _totals_are_right(self) -> Self:
        for name, total in (
            ("samples", sum(s.samples for s in self.shards)),
            ("bytes", sum(s.bytes for s in self.shards)),
        ):
            if getattr(self, name) != total:
                raise ValueError(f"{name} is {getattr(self, name)}, but the shards add up to {total}")
        names = [s.name for s in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("two shards have the same name")
        if self.dataset_digest != dataset_digest(self.shards):
            raise ValueError("datasetDigest does not match the shards; the manifest was edited or damaged")
        return self


def dataset_digest(shards: tuple[Shard, ...]) -> str:
    """`sha256:<hex>` over every field of every shard, in order: keys, clips and patients decide the sample order."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(canonical_json(shard.document()).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"
