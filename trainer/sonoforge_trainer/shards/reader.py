"""Reads a data set sample by sample, each shard checked against the manifest first."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sonoforge_trainer.contract import Shard, ShardManifest
from sonoforge_trainer.shards.faults import DataSetError, TarError
from sonoforge_trainer.shards.tars import members
from sonoforge_trainer.storage import Storage


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as it is stored."""

    key: str
    """WebDataset key."""
    image: bytes
    """JPEG or PNG, 8-bit gray or RGB."""
    mask: bytes | None
    """PNG of class indices of the image's size."""
    fields: dict[str, Any]
    """The JSON member: label, split and patient (a keyed hash) are texts, empty where not known; clip is a number;
    other fields are the texts that the builder was told to keep."""


def read_manifest(uri: str, storage: Storage) -> ShardManifest:
    """The manifest at the URI of a `shards.json`. Raises StorageError, or ContractError where it does not fit."""
    return ShardManifest.from_json(storage.read(uri), where=uri, show_values=False)


def base_of(manifest_uri: str) -> str:
    """The URI below which the shards of a manifest lie."""
    return manifest_uri.rpartition("/")[0]


def iterate(manifest: ShardManifest, base_uri: str, storage: Storage) -> Iterator[Sample]:
    """Every sample in the order of the manifest. One shard is in memory at a time.

    Raises StorageError (IntegrityError where a shard's digest is wrong), or DataSetError where a shard fits its digest
    but not its list of samples.
    """
    for shard in manifest.shards:
        yield from _samples(shard, f"{base_uri.rstrip('/')}/{shard.name}", storage)


def _samples(shard: Shard, uri: str, storage: Storage) -> Iterator[Sample]:
    data = memoryview(storage.read(uri, sha256=shard.sha256))
    try:
        found = members(io.BytesIO(data))
    except TarError as error:
        raise DataSetError(f"{uri}: {error}") from None
    parts: dict[str, dict[str, memoryview]] = {}
    for member in found:
        key, _, suffix = member.name.partition(".")
        parts.setdefault(key, {})[suffix] = data[member.offset : member.offset + member.length]
    for position, (key, offset, length) in enumerate(zip(shard.keys, shard.offsets, shard.lengths, strict=True)):
        sample = parts.get(key, {})
        try:
            fields = json.loads(bytes(sample["json"]))
        except (KeyError, ValueError):
            raise DataSetError(
                f"{uri}: sample {position} has no readable JSON member; build the data set again"
            ) from None
        mask = sample.get("mask.png")
        yield Sample(key, bytes(data[offset : offset + length]), None if mask is None else bytes(mask), fields)
