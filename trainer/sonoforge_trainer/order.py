"""Sample order: the samples of a step, as a pure function of (manifest, seed, step, virtual rank).

Every epoch permutes the shards and deals them to the virtual ranks in turn, going on where the epoch before ended; the
samples of each block of shards are permuted together. A virtual rank's stream is the endless concatenation of what it
was dealt: its *segments*, one an epoch. Step t of a virtual rank is positions t*B to (t+1)*B of its stream, so a
position is arithmetic on counts and nothing has to be remembered. All segments of an epoch together are the data set.

At most one frame of a clip is in a micro-batch (see `spread`). Two segments that meet in a micro-batch must agree
without a chain of dependencies back to the first epoch: of a virtual rank's segments, every other one chooses its ends
freely, and those between choose theirs around them. Where the rule cannot hold with each of the segment's samples used
once, a sample is left out of its epoch and another takes its place: a *substitution*, which is counted.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.contract import ContractError, ShardManifest
from sonoforge_trainer.draws import permutation, raw
from sonoforge_trainer.spread import Extent, fill_body, pick_ends

Ints = NDArray[np.int64]


class Piece(NamedTuple):
    """The part of a micro-batch that comes from one segment."""

    epoch: int
    """The segment: one an epoch."""
    first: int
    """Position in the segment."""
    places: int
    """Samples taken from there on."""


class Places(NamedTuple):
    """The samples of one virtual rank in one step."""

    ordinals_b: Ints
    """Position of each sample in the manifest."""
    epochs_b: Ints
    """Epoch of the virtual rank's stream that each belongs to."""
    substituted_b: NDArray[np.bool_]
    """Whether it takes the place of one that the clip rule leaves out."""


class Order:
    """The sample order of a run. Cheap to make, picklable, safe to use from several threads; it caches segments.

    An ordinal is the position of a sample in the manifest. Raises ContractError where the data set has fewer clips than
    a micro-batch has samples.
    """

    def __init__(
        self,
        manifest: ShardManifest,
        seed: int,
        virtual_ranks: int,
        micro_batch: int,
        block_shards: int,
        clip_aware: bool = True,
    ) -> None:
        self.seed, self.virtual_ranks = seed, virtual_ranks
        self.micro_batch_size, self.block_shards = micro_batch, block_shards
        self._counts_s = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
        self._first_s = np.cumsum(self._counts_s) - self._counts_s
        self._clips_n: Ints
        if clip_aware:
            self._clips_n = np.concatenate([np.array(shard.clips, dtype=np.int64) for shard in manifest.shards])
        else:
            # Every sample is a clip of its own: a micro-batch still never holds a sample twice.
            self._clips_n = np.arange(manifest.samples, dtype=np.int64)
        clips = len(np.unique(self._clips_n))
        if clips < micro_batch:
            raise ContractError(
                f"data set {manifest.name!r} has {clips} {'clips' if clip_aware else 'samples'}, but a micro-batch of "
                f"{micro_batch} (recipe.globalBatch / recipe.virtualRanks) takes at most one frame of each. Use more "
                f"virtual ranks, a smaller global batch{', data.clipAware: false' if clip_aware else ''} or more data"
            )
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._ends_ev = np.zeros((0, self.virtual_ranks), dtype=np.int64)
        self._segments: OrderedDict[tuple[int, int], tuple[Ints, Ints]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        dropped = ("_lock", "_ends_ev", "_segments")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    def micro_batch(self, step: int, virtual_rank: int) -> tuple[Ints, Ints]:
        """Ordinals and epochs [B] of the samples that a virtual rank sees in a step (counted from 0)."""
        return self.places(step, virtual_rank)[:2]

    def places(self, step: int, virtual_rank: int) -> Places:
        """What a virtual rank sees in a step (counted from 0)."""
        rank = virtual_rank
        pieces = self._pieces(step, rank)
        ordinals_b = np.concatenate([self._segment(p.epoch, rank)[1][p.first : p.first + p.places] for p in pieces])
        epochs_b = np.repeat([p.epoch for p in pieces], [p.places for p in pieces])
        # Clips come twice only where more than two segments meet, in a data set of a few micro-batches.
        clips_b = np.where(ordinals_b >= 0, self._clips_n[ordinals_b], -1)
        substituted_b = np.ones(len(clips_b), dtype=bool)
        substituted_b[np.unique(clips_b, return_index=True)[1]] = False
        substituted_b |= ordinals_b < 0
        missing = np.flatnonzero(substituted_b)
        clips_b[missing] = -1
        for slot in missing:
            ordinals_b[slot] = self._substitute(step, rank, int(slot), int(epochs_b[slot]), clips_b)
            clips_b[slot] = self._clips_n[ordinals_b[slot]]
        return Places(ordinals_b, epochs_b, substituted_b)

    def substitutions(self, epoch: int, virtual_rank: int | None = None) -> int:
        """How many samples of an epoch are left out for others, in one virtual rank's segment or in all of them.

        0 means that each sample comes exactly once. Takes time in proportion to the data.
        """
        if virtual_rank is None:
            return sum(self.substitutions(epoch, rank) for rank in range(self.virtual_ranks))
        total = 0
        start, end = self._bounds(epoch, virtual_rank)
        for step in range(start // self.micro_batch_size, -(-end // self.micro_batch_size)):
            _, epochs_b, substituted_b = self.places(step, virtual_rank)
            total += int(np.sum(substituted_b & (epochs_b == epoch)))
        return total

    def segment(self, epoch: int, virtual_rank: int) -> tuple[int, int]:
        """First and one-past-last position of a segment in its virtual rank's stream; position p is in step p // B."""
        return self._bounds(epoch, virtual_rank)

    def upcoming_shards(self, step: int, virtual_rank: int, blocks: int) -> list[Ints]:
        """The shards of the block that a step begins in, and of the blocks after it: one array of indices each."""
        position = step * self.micro_batch_size
        epoch = self._epoch_at(position, virtual_rank)
        skip = position - self._bounds(epoch, virtual_rank)[0]
        upcoming: list[Ints] = []
        while len(upcoming) < blocks:
            for shards in self._blocks(epoch, virtual_rank):
                samples = int(self._counts_s[shards].sum())
                if skip < samples and len(upcoming) < blocks:
                    upcoming.append(shards)
                skip -= min(skip, samples)
            epoch += 1
        return upcoming

    def shard_of(self, ordinals: Ints) -> Ints:
        """Index of the shard that holds each ordinal."""
        return np.searchsorted(self._first_s, ordinals, side="right") - 1

    def shard_ordinals(self, shard: int) -> range:
        """The ordinals of a shard's samples."""
        return range(int(self._first_s[shard]), int(self._first_s[shard] + self._counts_s[shard]))

    def clips(self, ordinals: Ints) -> Ints:
        """The clip of each ordinal; without clip awareness, the ordinal itself."""
        return self._clips_n[ordinals]

    def _deal(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's shards in their order, and the virtual rank that each goes to."""
        shards = permutation(len(self._counts_s), self.seed, "shards", epoch)
        # Going on where the epoch before ended keeps the shares equal, also with fewer shards than virtual ranks.
        return shards, (epoch * len(shards) + np.arange(len(shards))) % self.virtual_ranks

    def _blocks(self, epoch: int, rank: int) -> list[Ints]:
        shards, ranks = self._deal(epoch)
        mine = shards[ranks == rank]
        return [mine[i : i + self.block_shards] for i in range(0, len(mine), self.block_shards)]

    def _know_epochs(self, epochs: int) -> Ints:
        """Positions [E, V] at which the segments of at least the first `epochs` epochs end."""
        with self._lock:
            known = len(self._ends_ev)
            if known < epochs:
                sizes_ev = np.zeros((max(epochs, 2 * known, 16) - known, self.virtual_ranks), dtype=np.int64)
                for row, sizes_v in enumerate(sizes_ev):
                    shards, ranks = self._deal(known + row)
                    np.add.at(sizes_v, ranks, self._counts_s[shards])
                before_v = self._ends_ev[-1] if known else 0
                self._ends_ev = np.concatenate([self._ends_ev, before_v + np.cumsum(sizes_ev, axis=0)])
            return self._ends_ev

    def _bounds(self, epoch: int, rank: int) -> tuple[int, int]:
        ends_e = self._know_epochs(epoch + 1)[:, rank]
        return int(ends_e[epoch - 1]) if epoch else 0, int(ends_e[epoch])

    def _chooses_freely(self, epoch: int, rank: int) -> bool:
        """True for the first, third, fifth ... segment of a virtual rank that is not empty."""
        sizes_e = np.diff(self._know_epochs(epoch + 1)[:epoch, rank], prepend=0)
        return int(np.count_nonzero(sizes_e)) % 2 == 0

    def _epoch_at(self, position: int, rank: int) -> int:
        ends_ev = self._know_epochs(1)
        while ends_ev[-1, rank] <= position:
            ends_ev = self._know_epochs(len(ends_ev) + 1)
        return int(np.searchsorted(ends_ev[:, rank], position, side="right"))

    def _pieces(self, step: int, rank: int) -> list[Piece]:
        position, end = step * self.micro_batch_size, (step + 1) * self.micro_batch_size
        epoch = self._epoch_at(position, rank)
        pieces = []
        while position < end:
            first, last = self._bounds(epoch, rank)
            if position < last:
                pieces.append(Piece(epoch, position - first, min(end, last) - position))
                position = min(end, last)
            epoch += 1
        return pieces

    def _stream(self, epoch: int, rank: int) -> Ints:
        """The segment's ordinals, shuffled within blocks, before the clip rule."""
        parts = [np.zeros(0, dtype=np.int64)]
        for block, shards in enumerate(self._blocks(epoch, rank)):
            ordinals = np.concatenate(
                [np.arange(self._first_s[s], self._first_s[s] + self._counts_s[s]) for s in shards]
            )
            parts.append(ordinals[permutation(len(ordinals), self.seed, "block", epoch, rank, block)])
        return np.concatenate(parts)

    def _ends(self, epoch: int, rank: int, stream_n: Ints) -> tuple[Ints, Ints]:
        """Where in the stream the samples of the segment's head and tail are."""
        start, end = self._bounds(epoch, rank)
        extent = Extent.of(start, end - start, self.micro_batch_size)
        banned = [np.zeros(0, dtype=np.int64)] * 2
        if not self._chooses_freely(epoch, rank):
            for index, places, position in ((0, extent.head, start), (1, extent.tail, end - 1)):
                if places:
                    banned[index] = self._free_clips(position // self.micro_batch_size, rank)
        return pick_ends(self._clips_n[stream_n], extent, *banned)

    def _free_clips(self, step: int, rank: int) -> Ints:
        """The clips that segments which choose freely bring to a micro-batch."""
        clips = [np.zeros(0, dtype=np.int64)]
        for piece in self._pieces(step, rank):
            if self._chooses_freely(piece.epoch, rank):
                stream_n = self._stream(piece.epoch, rank)
                head, tail = self._ends(piece.epoch, rank, stream_n)
                chosen = head if piece.first == 0 and len(head) else tail
                clips.append(self._clips_n[stream_n[chosen[chosen >= 0]]])
        return np.concatenate(clips)

    def _segment(self, epoch: int, rank: int) -> tuple[Ints, Ints]:
        """The segment's stream, and the ordinal at each of its places (-1 where the clip rule leaves none)."""
        with self._lock:
            key = epoch, rank
            if key not in self._segments:
                stream_n = self._stream(epoch, rank)
                start, end = self._bounds(epoch, rank)
                extent = Extent.of(start, end - start, self.micro_batch_size)
                head, tail = self._ends(epoch, rank, stream_n)
                rest = np.ones(len(stream_n), dtype=bool)
                rest[head[head >= 0]] = rest[tail[tail >= 0]] = False
                body = fill_body(self._clips_n[stream_n], np.flatnonzero(rest), extent)
                places = np.concatenate([head, body, tail])
                self._segments[key] = stream_n, np.where(places >= 0, stream_n[places], -1)
                while len(self._segments) > 2 * self.virtual_ranks + 2:
                    self._segments.popitem(last=False)
            self._segments.move_to_end(key)
            return self._segments[key]

    def _substitute(self, step: int, rank: int, slot: int, epoch: int, present: Ints) -> int:
        """A sample of the segment, or else of the data set, whose clip is not in the micro-batch."""
        candidates = self._segment(epoch, rank)[0]
        candidates = candidates[~np.isin(self._clips_n[candidates], present)]
        if not len(candidates):
            candidates = np.flatnonzero(~np.isin(self._clips_n, present))
        return int(candidates[int(raw(1, self.seed, "substitute", step, rank, slot)[0]) % len(candidates)])
