"""The processes of a run: who this one is, which virtual ranks it hosts, and how processes add up tensors.

A run of one process needs no process group: every reduction is then the identity, and nothing else in the trainer
asks how many processes there are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sonoforge_trainer.contract import ContractError, ExecutionConfig


def assign_virtual_ranks(virtual_ranks: int, world_size: int, rank: int) -> range:
    """The virtual ranks that process `rank` of `world_size` hosts: contiguous, sizes differ by at most one.

    Raises ContractError where there are more processes than virtual ranks.
    """
    if world_size > virtual_ranks:
        raise ContractError(
            f"{world_size} processes for {virtual_ranks} virtual ranks: {world_size - virtual_ranks} would be idle. "
            f"Use at most {virtual_ranks} processes, or raise recipe.virtualRanks (it is part of the result, so "
            "only for a new run)"
        )
    each, extra = divmod(virtual_ranks, world_size)
    first = rank * each + min(rank, extra)
    return range(first, first + each + (rank < extra))


def choose_device(execution: ExecutionConfig, local_rank: int = 0) -> torch.device:
    """The device of a process: its own GPU where there is one (`auto`), or what the configuration says.

    Raises ContractError where the configuration asks for CUDA and this process has no such GPU.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if execution.device == "cpu" or (execution.device == "auto" and not available):
        return torch.device("cpu")
    if local_rank >= available:
        raise ContractError(
            f"execution.device is {execution.device} and this is local process {local_rank}, but {available} CUDA "
            f"devices are visible. Start at most {available} processes per node, or use execution.device: cpu"
        )
    return torch.device("cuda", local_rank)


@dataclass
class Ranks:
    """One process among the processes of a run.

    `collectives` counts the reductions that went over the network, so that a test can hold the trainer to its budget.
    """

    rank: int = 0
    """Number of this process, 0 to world_size - 1."""
    world_size: int = 1
    """Processes of the run."""
    local_rank: int = 0
    """Number of this process on its node."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process keeps its tensors."""
    group: dist.ProcessGroup | None = None
    """Group of the step's reductions; None in a run of one process."""
    control: dist.ProcessGroup | None = None
    """Gloo group for host-side talk from other threads (checkpoint commits), apart from the step's order of calls."""
    store: Store | None = None
    """Key-value store that all processes reach; None in a run of one process."""
    collectives: int = 0
    """Reductions issued so far."""

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Ranks:
        """A run of one process, without a process group."""
        return cls(device=torch.device(device))

    @classmethod
    def from_env(cls, execution: ExecutionConfig, environ: Mapping[str, str] | None = None) -> Ranks:
        """Join the run that torchrun describes in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*).

        Without these variables, or with one process, no group is made. Raises ContractError for a broken environment
        and torch.distributed.DistError where the others do not come in time.
        """
        environ = os.environ if environ is None else environ
        try:
            rank, world_size, local_rank = (
                int(environ.get(name, default))
                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            )
        except ValueError:
            raise ContractError(
                "RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers; start the trainer with torchrun"
            ) from None
        if not 0 <= rank < world_size:
            raise ContractError(f"RANK {rank} is not below WORLD_SIZE {world_size}; start the trainer with torchrun")
        device = choose_device(execution, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if world_size == 1:
            return cls(local_rank=local_rank, device=device)
        timeout = timedelta(seconds=execution.collective_timeout_seconds)
        store, _, _ = next(rendezvous("env://", rank=rank, world_size=world_size, timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("process-group", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        group, control = dist.group.WORLD, dist.new_group(timeout=timeout, backend="gloo")
        assert isinstance(control, dist.ProcessGroup)
        return cls(rank, world_size, local_rank, device, group, control, PrefixStore("trainer", store))

    def virtual_ranks(self, count: int) -> range:
        """The virtual ranks of this process, of `count`. Raises ContractError where there are more processes."""
        return assign_virtual_ranks(count, self.world_size, self.rank)

    def agree(self, topic: str, text: str) -> str:
        """What rank 0 says about a topic; every process asks about it once. Waits for rank 0."""
        if self.store is None:
            return text
        if self.rank == 0:
            self.store.set(f"agree/{topic}", text)
            return text
        said: bytes = self.store.get(f"agree/{topic}")
        return said.decode()

    def sum(self, values: Tensor) -> Tensor:
        """Add up a float32 tensor over all processes, in place; returns it."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Largest value over all processes of each element of a float32 tensor, in place; returns it."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def meet(self) -> None:
        """Wait until all processes are here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave the process groups."""
        if self.group is not None:
            self.group = self.control = self.store = None
            dist.destroy_process_group()

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        assert values.dtype == torch.float32, "sums over processes are made in float32"
        if self.group is not None:
            dist.all_reduce(values, operation, group=self.group)
            self.collectives += 1
        return values
