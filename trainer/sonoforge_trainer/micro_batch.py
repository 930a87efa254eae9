"""One virtual rank's share of a step: a pure function of (manifest, configuration, step, virtual rank)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sonoforge_trainer import crops, photometric
from sonoforge_trainer.cache import DataError, ShardCache, ShardFile
from sonoforge_trainer.contract import ShardManifest, TrainConfig
from sonoforge_trainer.crops import MultiCrop
from sonoforge_trainer.decode import CorruptImageError, decode
from sonoforge_trainer.draws import permutation, uniforms
from sonoforge_trainer.masks import draw_masks
from sonoforge_trainer.order import Order
from sonoforge_trainer.photometric import Photometrics

_MAX_REPLACEMENTS = 100
"""Images in a row that cannot be decoded before the data set counts as damaged."""


@dataclass(frozen=True)
class MicroBatch:
    """CPU tensors of B samples with C channels, L local crops and N patches a global crop; pixels are uint8."""

    step: int
    """Step, from 0."""
    virtual_rank: int
    """Virtual rank."""
    globals_u8: Tensor
    """[2 B, C, G, G]: first all first views, then all second views."""
    locals_u8: Tensor
    """[L B, C, S, S]: first the first local crop of every sample."""
    globals_photo: Photometrics
    """Photometric parameters of the 2 B global crops."""
    locals_photo: Photometrics
    """Photometric parameters of the L B local crops."""
    masks: Tensor
    """[2 B, N] bool: patches hidden from the student."""
    mask_indices: Tensor
    """[M] int64 into the flattened masks; M never changes in a run."""
    mask_weights: Tensor
    """[M] float32: 1 / (masked patches of that crop)."""
    sample_ids: Tensor
    """[B] int64: position in the manifest of the sample that was used."""
    visits: Tensor
    """[B] int64: epoch of the virtual rank's stream."""
    corrupt_ids: tuple[int, ...] = ()
    """Positions in the manifest of samples that could not be decoded and were replaced."""
    substituted: int = 0
    """Samples that take the place of others because of the clip rule."""

    @property
    def corrupt(self) -> int:
        """Samples that could not be decoded and were replaced."""
        return len(self.corrupt_ids)

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory, for copies that do not wait."""
        return self._map(lambda part: part.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = True) -> MicroBatch:
        """The same on a device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def _map(self, function: Any) -> MicroBatch:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return MicroBatch(
            **{name: function(p) if isinstance(p, Tensor | Photometrics) else p for name, p in parts.items()}
        )

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Between processes, small tensors travel by value: each shared tensor costs two file descriptors."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in _SMALL:
            part = parts[name]
            parts[name] = (part.values_n7 if isinstance(part, Photometrics) else part).numpy()
        return _rebuild, (parts,)


_SMALL = ("globals_photo", "locals_photo", "masks", "mask_indices", "mask_weights", "sample_ids", "visits")


def _rebuild(parts: dict[str, Any]) -> MicroBatch:
    for name in _SMALL:
        tensor = torch.from_numpy(parts[name])
        parts[name] = Photometrics(tensor) if name.endswith("photo") else tensor
    return MicroBatch(**parts)


class MicroBatchMaker:
    """Makes micro-batches. Picklable and safe to use from several threads; holds no sample key."""

    def __init__(self, manifest: ShardManifest, training: TrainConfig, cache: ShardCache) -> None:
        recipe = training.recipe
        self.order = Order(
            manifest,
            recipe.seed,
            recipe.virtual_ranks,
            recipe.micro_batch,
            training.data.block_shards,
            training.data.clip_aware,
        )
        self.files = [ShardFile(shard.name, shard.bytes, shard.sha256) for shard in manifest.shards]
        self.cache = cache
        self._offsets_n = np.concatenate([np.array(shard.offsets, dtype=np.int64) for shard in manifest.shards])
        self._lengths_n = np.concatenate([np.array(shard.lengths, dtype=np.int64) for shard in manifest.shards])
        self._shards_n = np.repeat(
            np.arange(len(self.files), dtype=np.int32), [shard.samples for shard in manifest.shards]
        )
        self._training = training
        self._multi_crop = MultiCrop(recipe.crops, recipe.augment)

    def __call__(self, step: int, virtual_rank: int) -> MicroBatch:
        """The micro-batch of a virtual rank in a step (from 0). Raises DataError and StorageError."""
        recipe, channels = self._training.recipe, self._training.model.in_channels
        sizes = recipe.crops
        ordinals_b, visits_b, substituted_b = self.order.places(step, virtual_rank)
        batch, views = len(ordinals_b), 2 + sizes.local_count
        globals_vb = np.empty((2, batch, channels, sizes.global_size, sizes.global_size), dtype=np.uint8)
        locals_lb = np.empty((views - 2, batch, channels, sizes.local_size, sizes.local_size), dtype=np.uint8)
        photo_draws = np.empty((views, batch, photometric.UNIFORMS))
        corrupt = []
        for index in range(batch):
            wanted = int(ordinals_b[index])
            image_chw, used = self._image(ordinals_b, index, int(visits_b[index]))
            if used != wanted:
                ordinals_b[index] = used
                corrupt.append(wanted)
            draws = uniforms(
                views * (crops.UNIFORMS + photometric.UNIFORMS), recipe.seed, "augment", used, int(visits_b[index])
            ).reshape(views, -1)
            self._multi_crop(image_chw, draws[:, : crops.UNIFORMS], globals_vb[:, index], locals_lb[:, index])
            photo_draws[:, index] = draws[:, crops.UNIFORMS :]
        globals_photo, locals_photo = self._photometrics(photo_draws)
        grid = sizes.global_size // self._training.model.patch_size
        masks_kn = draw_masks(2 * batch, grid, recipe.masks, recipe.seed, step, virtual_rank)
        weights_kn = np.broadcast_to(1 / np.maximum(masks_kn.sum(axis=1, keepdims=True), 1), masks_kn.shape)
        return MicroBatch(
            step=step,
            virtual_rank=virtual_rank,
            globals_u8=torch.from_numpy(globals_vb).flatten(0, 1),
            locals_u8=torch.from_numpy(locals_lb).flatten(0, 1),
            globals_photo=globals_photo,
            locals_photo=locals_photo,
            masks=torch.from_numpy(masks_kn),
            mask_indices=torch.from_numpy(np.flatnonzero(masks_kn)),
            mask_weights=torch.from_numpy(weights_kn[masks_kn].astype(np.float32)),
            sample_ids=torch.from_numpy(ordinals_b),
            visits=torch.from_numpy(visits_b),
            corrupt_ids=tuple(corrupt),
            substituted=int(substituted_b.sum()),
        )

    def encoded(self, ordinal: int) -> bytes:
        """A sample's image as it is in its shard. Raises DataError and StorageError."""
        shard = self.files[self._shards_n[ordinal]]
        return self.cache.read(shard, int(self._offsets_n[ordinal]), int(self._lengths_n[ordinal]))

    def _photometrics(self, draws_kbd: NDArray[np.float64]) -> tuple[Photometrics, Photometrics]:
        augment, (views, batch, _) = self._training.recipe.augment, draws_kbd.shape
        blur_k = np.array([*augment.blur[:2], *[augment.blur[2]] * (views - 2)])
        solarize_k = np.array([0.0, augment.solarize, *[0.0] * (views - 2)])
        values = photometric.draw(
            draws_kbd.reshape(views * batch, -1), augment, np.repeat(blur_k, batch), np.repeat(solarize_k, batch)
        )
        return Photometrics(torch.from_numpy(values[: 2 * batch])), Photometrics(torch.from_numpy(values[2 * batch :]))

    def _image(self, ordinals_b: NDArray[np.int64], index: int, visit: int) -> tuple[NDArray[np.uint8], int]:
        """The pixels of a sample and its ordinal, or those of its replacement if it is corrupt."""
        wanted = int(ordinals_b[index])
        attempts = self._candidates(wanted, visit, np.delete(ordinals_b, index))
        for ordinal, _ in zip(attempts, range(_MAX_REPLACEMENTS), strict=False):
            try:
                return decode(self.encoded(ordinal), self._training.model.in_channels), ordinal
            except CorruptImageError:
                continue
        uri = self.cache.uri(self.files[self._shards_n[wanted]])
        raise DataError(
            f"shard {uri}: an image and every one that could replace it cannot be decoded. Run `sonoforge shards "
            f"verify` and build the data set again without them"
        )

    def _candidates(self, ordinal: int, visit: int, others_b: NDArray[np.int64]) -> Iterator[int]:
        """The sample, then what may replace it: from its own shard, then from those after it, by the clip rule.

        A function of (seed, sample, visit) and of the samples beside it. Where no other clip is left, the rule goes.
        """
        yield ordinal
        home = int(self._shards_n[ordinal])
        shards = [*range(home, len(self.files)), *range(home)]
        taken = self.order.clips(others_b)
        for conflicts in (False, True):
            for shard in shards:
                candidates = np.array(self.order.shard_ordinals(shard))
                shuffled = permutation(len(candidates), self._training.recipe.seed, "corrupt", ordinal, visit, shard)
                candidates = candidates[shuffled]
                conflicting = np.isin(self.order.clips(candidates), taken)
                for candidate in candidates[conflicting == conflicts].tolist():
                    if candidate != ordinal and candidate not in others_b:
                        yield candidate
