"""Reading checkpoints: which ones exist, which is the newest sound one, and their tensors.

A checkpoint exists when its COMMIT object names the digest of its manifest and every object has the size that the
manifest says. Content digests are checked while the content is read. What fails is marked with a QUARANTINE object and
never deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from sonoforge_trainer.checkpoint.errors import (
    AllCheckpointsDamagedError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    UnknownCheckpointError,
)
from sonoforge_trainer.checkpoint.identity import RunIdentity, utc_text
from sonoforge_trainer.contract import (
    COMMIT,
    IMPORTED,
    MANIFEST,
    METRICS,
    MODEL_CARD,
    QUARANTINE,
    TEACHER,
    CheckpointManifest,
    CheckpointRef,
    ContractError,
    ModelCard,
    StoredObject,
    canonical_json,
    parse_prefix,
)
from sonoforge_trainer.storage import IntegrityError, ObjectInfo, ObjectNotFoundError, Storage

if TYPE_CHECKING:
    from torch import Tensor

PRUNED = "PRUNED"
"""Object that marks a checkpoint whose state was deleted on purpose; its body is the CheckpointRef it had."""

_READERS = 4  # parts read at once; each read is itself several ranged requests
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint in memory."""

    ref: CheckpointRef
    """Where it was loaded from."""
    manifest: CheckpointManifest
    """Its manifest, verified."""
    tensors: Mapping[str, Tensor]
    """The whole training state by name, on the CPU, as views into `parts`."""
    parts: tuple[Tensor, ...] = field(repr=False)
    """The state files as they were read, uint8."""


@dataclass(frozen=True)
class LoadedTeacher:
    """The backbone of a checkpoint in memory."""

    manifest: CheckpointManifest
    """Manifest of its checkpoint, verified."""
    card: ModelCard
    """What the backbone expects of an image."""
    tensors: Mapping[str, Tensor]
    """By plain DINOv2 name, on the CPU."""


@dataclass(frozen=True)
class Prefix:
    """What storage lists below one checkpoint's prefix."""

    uri: str
    """The prefix, without a slash at its end."""
    step: int
    """Optimiser steps, from its name."""
    attempt: str
    """The attempt that wrote it, from its name."""
    objects: Mapping[str, ObjectInfo]
    """By name below the prefix."""

    @property
    def committed(self) -> bool:
        """It was committed, and is neither quarantined nor pruned. Whether it is sound is another question."""
        return COMMIT in self.objects and not self.objects.keys() & {QUARANTINE, PRUNED}


class CheckpointStore:
    """The checkpoints below one URI. `identity` is the run that may load them; without one, any run's can be read."""

    def __init__(self, storage: Storage, uri: str, identity: RunIdentity | None = None) -> None:
        self.storage = storage
        self.uri = uri.rstrip("/")
        self.identity = identity
        self._manifests: dict[str, tuple[str, CheckpointManifest]] = {}  # a prefix is write-once, so these stay right
        self._reported: set[str] = set()

    def prefixes(self) -> Iterator[Prefix]:
        """Every prefix that looks like a checkpoint's, in whatever state, by step and attempt. One LIST."""
        found: dict[str, dict[str, ObjectInfo]] = {}
        for info in self.storage.list(f"{self.uri}/"):
            parts = info.uri.removeprefix(self.uri).split("/", 3)
            if len(parts) == 4 and parse_prefix("/".join(parts[:3])):
                found.setdefault("/".join(parts[:3]), {})[parts[3]] = info
        for below, objects in sorted(found.items()):
            name = parse_prefix(below)
            assert name is not None
            yield Prefix(self.uri + below, *name, objects)

    def committed(self) -> list[CheckpointRef]:
        """Every committed checkpoint with a matching manifest and sizes, oldest first.

        One LIST, and two small reads for each checkpoint not seen before. Writes nothing.
        """
        refs = []
        for prefix in self.prefixes():
            if not prefix.committed:
                continue
            try:
                refs.append(self.inspect(prefix)[0])
            except DamagedCheckpointError as error:
                if prefix.uri not in self._reported:
                    self._reported.add(prefix.uri)
                    _log.warning("checkpoint ignored", uri=prefix.uri, reason=error.reason)
        return sorted(refs, key=lambda ref: (ref.step, ref.created))

    def quarantined(self) -> list[str]:
        """URIs of the checkpoints that were found damaged."""
        return [prefix.uri for prefix in self.prefixes() if QUARANTINE in prefix.objects]

    def find(self, checkpoint_id: str) -> CheckpointRef:
        """The committed checkpoint with this `CheckpointRef.id`. Raises UnknownCheckpointError."""
        refs = {ref.id: ref for ref in self.committed()}
        if checkpoint_id not in refs:
            known = ", ".join(refs) or "none"
            raise UnknownCheckpointError(f"no checkpoint {checkpoint_id!r} below {self.uri}; committed: {known}")
        return refs[checkpoint_id]

    def inspect(self, prefix: Prefix) -> tuple[CheckpointRef, CheckpointManifest]:
        """The manifest of a committed prefix, checked against COMMIT, its place and the listed sizes.

        Raises DamagedCheckpointError.
        """
        if prefix.uri not in self._manifests:
            self._manifests[prefix.uri] = self._read_manifest(prefix.uri)
        digest, manifest = self._manifests[prefix.uri]
        if (manifest.step, manifest.attempt) != (prefix.step, prefix.attempt):
            raise DamagedCheckpointError(prefix.uri, f"{MANIFEST} is of step {manifest.step}, {manifest.attempt}")
        for stored in manifest.objects:
            info = prefix.objects.get(stored.name)
            if info is None:
                raise DamagedCheckpointError(prefix.uri, f"{stored.name} is missing")
            if info.size != stored.bytes:
                raise DamagedCheckpointError(prefix.uri, f"{stored.name} has {info.size} of {stored.bytes} bytes")
        return reference(prefix.uri, digest, manifest), manifest

    def verify(self, ref: CheckpointRef) -> CheckpointManifest:
        """Read every object of a checkpoint, whatever was read before, and compare digests.

        Raises DamagedCheckpointError.
        """
        self._manifests.pop(ref.uri, None)
        manifest = self.manifest(ref.uri, ref.manifest_digest)
        for stored in manifest.objects:
            self._read(ref.uri, stored, memoryview(bytearray(stored.bytes)))
        return manifest

    def manifest(self, uri: str, manifest_digest: str) -> CheckpointManifest:
        """The manifest at this prefix, checked against the digest it should have. Raises DamagedCheckpointError."""
        digest, manifest = self._manifests.get(uri) or self._read_manifest(uri)
        if digest != manifest_digest:
            raise DamagedCheckpointError(uri, f"{MANIFEST} has digest {digest}, expected {manifest_digest}")
        self._manifests[uri] = (digest, manifest)
        return manifest

    def load(self, ref: CheckpointRef) -> LoadedCheckpoint:
        """Read the training state. Any number of processes may have written it.

        Raises ForeignCheckpointError (a ValueError) where it is not this run's, DamagedCheckpointError, StorageError.
        """
        manifest = self.manifest(ref.uri, ref.manifest_digest)
        if self.identity is not None:
            self.identity.require(manifest, ref.uri)
        names = [stored for stored in manifest.objects if stored.name.startswith("state-")]
        if not names:
            raise ForeignCheckpointError(
                f"checkpoint {ref.uri} is of imported weights, which no training continues from"
            )
        with ThreadPoolExecutor(min(_READERS, len(names)), "checkpoint-read") as readers:
            parts = tuple(readers.map(lambda stored: self._read_tensor_file(ref.uri, stored), names))
        return LoadedCheckpoint(ref, manifest, merge(ref.uri, parts), parts)

    def load_teacher(self, uri: str, manifest_digest: str) -> LoadedTeacher:
        """The teacher's backbone in the checkpoint at this prefix. Any run may read it.

        Raises DamagedCheckpointError, StorageError.
        """
        manifest = self.manifest(uri, manifest_digest)
        objects = {stored.name: stored for stored in manifest.objects}
        card = bytearray(objects[MODEL_CARD].bytes)
        self._read(uri, objects[MODEL_CARD], memoryview(card))
        part = self._read_tensor_file(uri, objects[TEACHER])
        return LoadedTeacher(manifest, ModelCard.from_json(bytes(card), where=MODEL_CARD), merge(uri, (part,)))

    def metric_records(self, uri: str, manifest: CheckpointManifest) -> list[dict[str, Any]]:
        """The metric records of the steps between the checkpoint before and this one; none where it has no log.

        Raises DamagedCheckpointError, StorageError.
        """
        stored = next((stored for stored in manifest.objects if stored.name == METRICS), None)
        if stored is None:
            return []
        text = bytearray(stored.bytes)
        self._read(uri, stored, memoryview(text))
        return [json.loads(line) for line in text.splitlines()]

    def load_latest(self) -> LoadedCheckpoint | None:
        """Load the newest sound checkpoint, verified while it is read; None where there never was one.

        Damaged ones on the way are quarantined. Raises AllCheckpointsDamagedError, ForeignCheckpointError.
        """
        damaged = []
        for prefix in sorted(self.prefixes(), key=self._age, reverse=True):
            if QUARANTINE in prefix.objects:
                damaged.append(prefix.uri)
            if not prefix.committed:
                continue
            try:
                ref, _ = self.inspect(prefix)
                loaded = self.load(ref)
            except DamagedCheckpointError as error:
                if self._is_pruned(prefix.uri):
                    continue  # deleted on purpose while it was being read
                self.quarantine(prefix.uri, error.reason)
                damaged.append(prefix.uri)
                continue
            if damaged:
                _log.error("fell back to an older checkpoint", uri=ref.uri, step=ref.step, damaged=len(damaged))
            return loaded
        if damaged:
            raise AllCheckpointsDamagedError(self.uri, tuple(damaged))
        return None

    def quarantine(self, uri: str, reason: str) -> None:
        """Mark a checkpoint as damaged. Doing it twice changes nothing more."""
        body = canonical_json({"reason": reason, "found": utc_text(datetime.now(UTC))})
        self.storage.write(f"{uri}/{QUARANTINE}", body.encode())
        _log.error("checkpoint quarantined", uri=uri, reason=reason)

    def _age(self, prefix: Prefix) -> tuple[int, str]:
        """Sorts by step, then time of writing; a manifest that cannot be read comes last within its step."""
        if not prefix.committed:
            return prefix.step, ""
        try:
            return prefix.step, self.inspect(prefix)[0].created
        except DamagedCheckpointError:
            return prefix.step, "~"

    def _is_pruned(self, uri: str) -> bool:
        names = {info.uri.removeprefix(f"{uri}/") for info in self.storage.list(f"{uri}/")}
        return PRUNED in names or COMMIT not in names

    def _read_manifest(self, uri: str) -> tuple[str, CheckpointManifest]:
        try:
            committed = self.storage.read(f"{uri}/{COMMIT}").decode("ascii", "replace").strip()
            body = self.storage.read(f"{uri}/{MANIFEST}")
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            if digest != committed:
                raise DamagedCheckpointError(uri, f"{COMMIT} does not name the digest of {MANIFEST}")
            manifest = CheckpointManifest.from_json(body, where=MANIFEST)
        except ObjectNotFoundError as error:
            raise DamagedCheckpointError(uri, f"an object is missing: {error}") from None
        except ContractError as error:
            raise DamagedCheckpointError(uri, str(error)) from None
        if fault := manifest_fault(manifest):
            raise DamagedCheckpointError(uri, fault)
        return digest, manifest

    def _read(self, uri: str, stored: StoredObject, buffer: memoryview) -> None:
        try:
            self.storage.read_into(f"{uri}/{stored.name}", buffer, sha256=stored.sha256)
        except (IntegrityError, ObjectNotFoundError) as error:
            raise DamagedCheckpointError(uri, f"{stored.name}: {error}") from error

    def _read_tensor_file(self, uri: str, stored: StoredObject) -> Tensor:
        import torch

        buffer_u8 = torch.empty(stored.bytes, dtype=torch.uint8)
        self._read(uri, stored, buffer_u8.numpy().data)
        return buffer_u8


def manifest_fault(manifest: CheckpointManifest) -> str | None:
    """Why the objects that a manifest lists cannot be a checkpoint's, or None."""
    names = [stored.name for stored in manifest.objects]
    if any("/" in name or name in ("", ".", "..", MANIFEST, COMMIT, QUARANTINE, PRUNED) for name in names):
        return f"{MANIFEST} lists an object that is not a part of a checkpoint"
    if len(set(names)) != len(names):
        return f"{MANIFEST} lists an object twice"
    has_state = any(name.startswith("state-") for name in names) or manifest.extra.get(IMPORTED) is True
    if not {TEACHER, MODEL_CARD} <= set(names) or not has_state:
        return f"{MANIFEST} does not list a state, {TEACHER} and {MODEL_CARD}"
    return None


def reference(uri: str, digest: str, manifest: CheckpointManifest) -> CheckpointRef:
    """The reference to the checkpoint at this prefix, whose manifest has this digest."""
    return CheckpointRef(
        step=manifest.step, samples=manifest.samples, uri=uri, manifest_digest=digest, created=manifest.created
    )


def merge(uri: str, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The tensors of several state files. Raises DamagedCheckpointError."""
    from sonoforge_trainer.checkpoint.tensorfile import TensorFileError, parse

    tensors: dict[str, Tensor] = {}
    for part in parts:
        try:
            named = parse(part)
        except TensorFileError as error:
            raise DamagedCheckpointError(uri, f"a part is not a safetensors file: {error}") from None
        if named.keys() & tensors.keys():
            raise DamagedCheckpointError(uri, "two parts hold the same tensor")
        tensors.update(named)
    return tensors
