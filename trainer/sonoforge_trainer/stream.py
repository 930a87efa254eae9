"""The stream of micro-batches, made ahead of the training step by worker processes or by one thread."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sonoforge_trainer.cache import DataError, ShardCache, private_folder
from sonoforge_trainer.contract import ContractError, ExecutionConfig, ShardManifest, TrainConfig
from sonoforge_trainer.micro_batch import MicroBatch, MicroBatchMaker
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.storage import Storage, StorageError

__all__ = ["MicroBatch", "Stream"]

_log = structlog.get_logger(__name__)

_FETCHES = 4
"""Shards fetched at a time: small ones have too few ranges to use all connections, and verifying one takes a while."""

_Item = tuple[int, int]
"""Step and virtual rank."""


class Stream:
    """Micro-batches from shards. Close it, or use it as a context manager, to stop what works ahead.

    `base_uri` is the folder of the shards. Raises ContractError where the data set and the configuration do not fit.
    """

    def __init__(
        self,
        manifest: ShardManifest,
        base_uri: str,
        training: TrainConfig,
        execution: ExecutionConfig,
        storage: Storage,
        hasher: KeyHasher,
    ) -> None:
        wanted = training.data.dataset_digest
        if wanted and wanted != manifest.dataset_digest:
            raise ContractError(
                f"data.datasetDigest asks for {wanted}, but {base_uri} holds {manifest.dataset_digest}. "
                f"Give the URI of the right data set, or leave datasetDigest out"
            )
        largest = max(shard.bytes for shard in manifest.shards)
        if largest > execution.cache_bytes:
            raise ContractError(
                f"execution.cacheBytes is {execution.cache_bytes}, but the largest shard has {largest} bytes. "
                f"Allow for at least the shards of a block (data.blockShards) for each virtual rank of a process"
            )
        self._manifest, self._hasher = manifest, hasher
        self._steps = training.recipe.steps
        self._execution = execution
        self._workers = _default_workers() if execution.loader_workers is None else execution.loader_workers
        self._pin = execution.device == "cuda" or (execution.device == "auto" and torch.cuda.is_available())
        self._known_corrupt: set[int] = set()
        self._running = ExitStack()
        self._warned_of_substitutes = self._warned_of_cache = False
        if self._workers:
            # One clean process imports torch once and forks the workers, while this one builds the model.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["sonoforge_trainer.micro_batch"])
            forkserver.ensure_running()
        with ExitStack() as resources:
            folder = Path(execution.cache_dir) if execution.cache_dir else resources.enter_context(private_folder())
            self._cache = ShardCache(folder, execution.cache_bytes, storage, base_uri)
            self._make = MicroBatchMaker(manifest, training, self._cache)
            self._resources = resources.pop_all()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop workers and threads, close and, where it is private, remove the cache."""
        self._running.close()
        self._cache.close()
        self._resources.close()

    def batches(self, first_step: int, virtual_ranks: Sequence[int]) -> Iterator[list[MicroBatch]]:
        """For each step from `first_step` to the last of the recipe, a micro-batch for each virtual rank given.

        Ends what an earlier call still has running. Raises DataError and StorageError.
        """
        self._running.close()
        items = _Items(first_step, self._steps, virtual_ranks)
        ahead = max(self._execution.prefetch_batches, -(-len(virtual_ranks) // max(1, self._workers)))
        made = self._from_workers(items, ahead) if self._workers else self._from_thread(items, ahead)
        prefetch = self._prefetcher(virtual_ranks)
        for step in range(first_step, self._steps):
            prefetch(step)
            batches = list(islice(made, len(virtual_ranks)))
            for batch in batches:
                self._report(batch)
            yield batches

    def sample_log_lines(self, batches: Sequence[MicroBatch]) -> list[dict[str, Any]]:
        """A record for `samples.jsonl` for each micro-batch: step, virtual rank, keyed hash of each sample used."""
        return [
            {
                "step": batch.step,
                "vrank": batch.virtual_rank,
                "samples": [self._hash(ordinal) for ordinal in batch.sample_ids.tolist()],
            }
            for batch in batches
        ]

    def _hash(self, ordinal: int) -> str:
        shard = int(self._make.order.shard_of(np.array(ordinal)))
        key = self._manifest.shards[shard].keys[ordinal - self._make.order.shard_ordinals(shard).start]
        return self._hasher.hash(key)

    def _report(self, batch: MicroBatch) -> None:
        for ordinal in batch.corrupt_ids:
            if ordinal not in self._known_corrupt:
                self._known_corrupt.add(ordinal)
                _log.warning("stream.corrupt_sample", sample=self._hash(ordinal), action="replaced by another sample")
        if batch.substituted and not self._warned_of_substitutes:
            self._warned_of_substitutes = True
            _log.warning(
                "stream.clip_rule_leaves_samples_out",
                step=batch.step,
                virtual_rank=batch.virtual_rank,
                samples=batch.substituted,
                advice="spread the frames of a clip over more shards, use more shards a block or a smaller micro-batch",
            )

    def _from_thread(self, items: _Items, ahead: int) -> Iterator[MicroBatch]:
        executor = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._running.callback(executor.shutdown, wait=True, cancel_futures=True)
        waiting: deque[Future[MicroBatch]] = deque()
        for item in items:
            waiting.append(executor.submit(self._make_here, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _make_here(self, item: _Item) -> MicroBatch:
        batch = self._make(*item)
        return batch.pin_memory() if self._pin else batch

    def _from_workers(self, items: _Items, ahead: int) -> Iterator[MicroBatch]:
        loader = DataLoader(
            _Made(self._make),
            sampler=items,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=ahead,
            collate_fn=_as_is,
            worker_init_fn=_end_with_the_training_process,
            pin_memory=self._pin,
            multiprocessing_context="forkserver",
            generator=torch.Generator(),  # else it would draw from the global one
        )
        made = iter(loader)
        # The loader's iterator ends its processes when it goes.
        holder = [made]
        del made
        self._running.callback(holder.clear)
        while holder:
            try:
                batch = next(holder[0])
            except StopIteration:
                return
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def _prefetcher(self, virtual_ranks: Sequence[int]) -> Any:
        """A function that has the shards of the blocks in use, and of the next ones, fetched in the background."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._running.callback(executor.shutdown, wait=True, cancel_futures=True)
        fetched: set[int] = set()
        running: list[Future[None]] = []

        def prefetch(step: int) -> None:
            if not running or running[-1].done():
                running[:] = [executor.submit(self._fetch_ahead, step, virtual_ranks, fetched)]

        return prefetch

    def _fetch_ahead(self, step: int, virtual_ranks: Sequence[int], fetched: set[int]) -> None:
        blocks = [self._make.order.upcoming_shards(step, rank, 2) for rank in virtual_ranks]
        wanted = list(dict.fromkeys(int(s) for ahead in (0, 1) for block in blocks for s in block[ahead]))
        room = self._execution.cache_bytes
        in_use = sum(self._make.files[shard].bytes for shard in {int(s) for block in blocks for s in block[0]})
        if in_use > room and not self._warned_of_cache:
            self._warned_of_cache = True
            _log.warning(
                "stream.cache_is_small",
                cache_bytes=room,
                in_use_bytes=in_use,
                effect="shards are fetched again and again",
                advice=f"set execution.cacheBytes to {2 * in_use}, or lower data.blockShards",
            )
        missing = []
        for shard in wanted:
            room -= self._make.files[shard].bytes
            if room < 0:
                break
            if shard not in fetched:
                missing.append(shard)
        if missing:
            with ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch") as fetchers:
                list(fetchers.map(self._fetch, missing))
        fetched.clear()
        fetched.update(wanted)

    def _fetch(self, shard: int) -> None:
        # Whoever needs the shard meets the same error, and reports it.
        with suppress(DataError, StorageError):
            self._cache.fetch(self._make.files[shard])


class _Items(Sampler[_Item]):
    """Steps and virtual ranks in the order in which the training asks for them."""

    def __init__(self, first_step: int, steps: int, virtual_ranks: Sequence[int]) -> None:
        self._steps, self._virtual_ranks = range(first_step, steps), tuple(virtual_ranks)

    def __iter__(self) -> Iterator[_Item]:
        return ((step, rank) for step in self._steps for rank in self._virtual_ranks)


class _Made(Dataset[MicroBatch | Exception]):
    """Micro-batches by item, in a worker process. An error travels as a value: the loader would rewrite it."""

    def __init__(self, make: MicroBatchMaker) -> None:
        self._make = make

    def __getitem__(self, item: _Item) -> MicroBatch | Exception:
        try:
            return self._make(*item)
        except Exception as error:  # noqa: BLE001 - raised again by the process that asked
            return error


def _as_is(batch: Any) -> Any:
    return batch


def _end_with_the_training_process(_: int) -> None:
    """Leave when the process that asked is gone, killed or not.

    The loader's own watch is on the process that forked the worker, which lives as long as its workers do.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _default_workers() -> int:
    """The CPUs of this process, less one for the training itself. Processes of torchrun on one node share its CPUs."""
    cpus = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) - 1
