"""Checks a data set against its manifest: every object, every byte, every sample."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sonoforge_trainer.contract import Shard, ShardManifest
from sonoforge_trainer.shards.faults import ImageError, TarError
from sonoforge_trainer.shards.images import decode
from sonoforge_trainer.shards.tars import Member, members
from sonoforge_trainer.storage import IntegrityError, ObjectNotFoundError, Storage


@dataclass(frozen=True, order=True)
class Fault:
    """Something that is not as the manifest says."""

    uri: str
    """The object."""
    message: str
    """What is wrong. Samples are named by their position in the shard."""


def verify(
    manifest: ShardManifest, base_uri: str, storage: Storage, *, decode_images: bool = False, workers: int = 4
) -> list[Fault]:
    """Read every shard and list what is wrong, sorted by object; an empty list means all is well.

    Checks presence, size, SHA-256, the structure of the tar, keys and their order, offsets and lengths of the images,
    that each sample has one image and a JSON that agrees, and that no other tar lies there. `decode_images` decodes
    every image and mask as well. Raises StorageError where storage fails for another reason than a missing or short
    object.
    """
    base = base_uri.rstrip("/")
    faults = [
        Fault(info.uri, "is not in the manifest")
        for info in storage.list(base + "/")
        if info.uri.endswith(".tar") and info.uri.removeprefix(base + "/") not in {s.name for s in manifest.shards}
    ]

    def check(shard: Shard) -> list[Fault]:
        uri = f"{base}/{shard.name}"
        return [Fault(uri, message) for message in _shard_faults(shard, manifest, uri, storage, decode_images)]

    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(check, manifest.shards):
            faults += found
    counts: dict[str, int] = {}
    for shard in manifest.shards:
        for key in shard.keys:
            counts[key] = counts.get(key, 0) + 1
    repeated = sum(count > 1 for count in counts.values())
    if repeated:
        faults.append(Fault(base, f"{repeated} keys are used by more than one sample"))
    return sorted(faults)


def _shard_faults(
    shard: Shard, manifest: ShardManifest, uri: str, storage: Storage, decode_images: bool
) -> Iterator[str]:
    try:
        data = storage.read(uri)
    except ObjectNotFoundError:
        yield "is missing"
        return
    except IntegrityError as error:
        yield f"cannot be read whole ({error})"
        return
    if len(data) != shard.bytes:
        yield f"has {len(data)} bytes, the manifest says {shard.bytes}"
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != shard.sha256:
        yield "has another SHA-256 than the manifest says: it was altered"
    try:
        found = members(io.BytesIO(data))
    except TarError as error:
        yield str(error)
        return
    samples: dict[str, dict[str, Member]] = {}
    for member in found:
        key, _, suffix = member.name.partition(".")
        if suffix in samples.setdefault(key, {}):
            yield f"two members at or before byte {member.offset} have the same name"
        samples[key][suffix] = member
    if tuple(samples) != shard.keys:
        yield f"holds {len(samples)} samples, the manifest {shard.samples}, or their keys or order differ"
    for position, key in enumerate(shard.keys):
        if key in samples:
            for message in _sample_faults(shard, position, samples[key], manifest, data, decode_images):
                yield f"sample {position}: {message}"


def _sample_faults(
    shard: Shard, position: int, parts: dict[str, Member], manifest: ShardManifest, data: bytes, decode_images: bool
) -> Iterator[str]:
    images = [member for suffix, member in parts.items() if suffix in ("jpg", "png")]
    if len(images) != 1 or "json" not in parts or set(parts) - {"jpg", "png", "json", "mask.png"}:
        yield "has other members than one image, perhaps a mask, and a JSON"
        return
    image = images[0]
    if (image.offset, image.length) != (shard.offsets[position], shard.lengths[position]):
        yield "the image is not at the offset, or not of the length, that the manifest says"
    try:
        fields = json.loads(_bytes(data, parts["json"]))
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        yield "the JSON is broken"
    else:
        if (fields.get("clip"), fields.get("patient")) != (shard.clips[position], shard.patients[position]):
            yield "the JSON names another clip or patient than the manifest"
        if fields.get("label") and fields["label"] not in manifest.classes:
            yield "the label is none of the manifest's classes"
    if decode_images:
        yield from _pixel_faults(_bytes(data, image), parts.get("mask.png"), manifest, data)


def _pixel_faults(image: bytes, mask: Member | None, manifest: ShardManifest, data: bytes) -> Iterator[str]:
    try:
        pixels = decode(image)
    except ImageError as error:
        yield f"the image does not decode: {error}"
        return
    if mask is None:
        return
    try:
        indices = decode(_bytes(data, mask))
    except ImageError as error:
        yield f"the mask does not decode: {error}"
        return
    if indices.shape != pixels.shape[:2]:
        yield "the mask has another size than the image"
    elif int(indices.max()) >= len(manifest.mask_classes):
        yield f"the mask has the value {int(indices.max())}, but there are {len(manifest.mask_classes)} mask classes"


def _bytes(data: bytes, member: Member) -> bytes:
    return data[member.offset : member.offset + member.length]
