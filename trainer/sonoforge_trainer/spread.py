"""The clip rule on one segment: give every sample a micro-batch so that no clip comes twice in one.

A segment is what a virtual rank sees of one epoch. It begins inside a micro-batch that an earlier segment opened (its
*head*), fills whole micro-batches (its *body*) and ends inside one that a later segment will complete (its *tail*).
Samples are named by their position in the segment's shuffled stream; -1 marks a place that no sample may take.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Extent:
    """The places of a segment in its micro-batches."""

    head: int
    """Places in the micro-batch that an earlier segment opened."""
    body: int
    """Whole micro-batches."""
    tail: int
    """Places in the micro-batch that a later segment completes."""
    micro_batch: int
    """Places in a whole micro-batch."""

    @classmethod
    def of(cls, start: int, samples: int, micro_batch: int) -> Extent:
        """The extent of a segment that begins at a position of its virtual rank's stream."""
        head = min(samples, -start % micro_batch)
        body, tail = divmod(samples - head, micro_batch)
        return cls(head, body, tail, micro_batch)


def pick_ends(clips_n: Ints, extent: Extent, head_banned: Ints, tail_banned: Ints) -> tuple[Ints, Ints]:
    """Choose the samples of head and tail, without the banned clips, so that the body can hold the rest.

    The head comes from the front of the stream and the tail from its end. A clip with more frames than the body has
    micro-batches goes first, the most crowded before the others.
    """
    names_c, clips_n, counts_c = np.unique(clips_n, return_inverse=True, return_counts=True)
    head_banned_c, tail_banned_c = np.isin(names_c, head_banned), np.isin(names_c, tail_banned)
    stream_n = np.arange(len(clips_n))
    head_open_c = ~head_banned_c & (extent.head > 0)
    crowded_c = np.where(counts_c > extent.body, counts_c - extent.body - head_open_c + 1, 0)
    tail = _pick(stream_n[::-1], clips_n, extent.tail, tail_banned_c, crowded_c)
    taken = tail[tail >= 0]
    left_c = counts_c - np.bincount(clips_n[taken], minlength=len(counts_c))
    crowded_c = np.maximum(left_c - extent.body, 0)
    head = _pick(np.setdiff1d(stream_n, taken), clips_n, extent.head, head_banned_c, crowded_c)
    return head, tail[::-1]


def _pick(candidates: Ints, clips_n: Ints, places: int, banned_c: NDArray[np.bool_], crowded_c: Ints) -> Ints:
    """The first candidate of each clip that is not banned, crowded clips first."""
    candidates = candidates[~banned_c[clips_n[candidates]]]
    _, first = np.unique(clips_n[candidates], return_index=True)
    candidates = candidates[np.sort(first)]
    candidates = candidates[np.argsort(-crowded_c[clips_n[candidates]], kind="stable")][:places]
    return np.pad(candidates, (0, places - len(candidates)), constant_values=-1)


def fill_body(clips_n: Ints, samples: Ints, extent: Extent) -> Ints:
    """Spread `samples` (ascending positions) over the body's micro-batches, in the order of the stream.

    A frame whose clip is in the micro-batch already waits for the next one. A clip with as many frames left as there
    are micro-batches left is taken at once; with equal micro-batches that is enough for everything to fit, wherever it
    can: no clip has more frames than micro-batches, and there are no more samples than places. What cannot fit is left
    out, latest in the stream first.
    """
    places = extent.body * extent.micro_batch
    frames_n = clips_n[samples]
    if len(samples) == places and _rows_are_distinct(frames_n.reshape(extent.body, extent.micro_batch)):
        return samples
    _, frames_n = np.unique(frames_n, return_inverse=True)
    by_clip = np.argsort(frames_n, kind="stable")
    counts_c = np.bincount(frames_n)
    first_c = np.cumsum(counts_c) - counts_c
    nth_n = np.empty_like(frames_n)
    nth_n[by_clip] = np.arange(len(by_clip)) - np.repeat(first_c, counts_c)
    fits = np.flatnonzero(nth_n < extent.body)[:places]
    return _greedy(frames_n[fits], samples[fits], extent)


def _rows_are_distinct(rows: Ints) -> bool:
    return bool(np.all(np.diff(np.sort(rows, axis=1), axis=1)))


def _greedy(frames_n: Ints, samples: Ints, extent: Extent) -> Ints:
    """`fill_body` for samples that fit: a heap holds the next frame of every clip, so its top is next in the stream."""
    clip_of = frames_n.tolist()
    queues: dict[int, list[int]] = {}
    for index in range(len(clip_of) - 1, -1, -1):
        queues.setdefault(clip_of[index], []).append(index)
    heap = sorted(queue[-1] for queue in queues.values())
    # A clip left out `slack` times has to be in every later micro-batch: with k frames taken, at latest in number
    # slack + k. It is looked at again when that number comes up.
    slack = {clip: extent.body - len(queue) for clip, queue in queues.items()}
    frames = {clip: len(queue) for clip, queue in queues.items()}
    due: dict[int, list[int]] = {}
    for clip, deadline in slack.items():
        due.setdefault(deadline, []).append(clip)
    placed = np.full((extent.body, extent.micro_batch), -1, dtype=np.int64)
    for number in range(extent.body):
        taken: list[int] = []
        for clip in due.pop(number, ()):
            queue = queues[clip]
            if not queue:
                continue
            deadline = slack[clip] + frames[clip] - len(queue)
            if deadline == number:
                taken.append(queue.pop())
                deadline += 1
            due.setdefault(deadline, []).append(clip)
        assert len(taken) <= extent.micro_batch
        while len(taken) < extent.micro_batch and heap:
            index = heapq.heappop(heap)
            queue = queues[clip_of[index]]
            # A frame that was taken because it was due is still in the heap, and is no longer the end of its queue.
            if queue and queue[-1] == index:
                taken.append(queue.pop())
        for index in taken:
            queue = queues[clip_of[index]]
            if queue:
                heapq.heappush(heap, queue[-1])
        placed[number, : len(taken)] = samples[taken]
    return placed.reshape(-1)
