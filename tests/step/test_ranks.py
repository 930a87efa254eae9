"""Which process hosts which virtual ranks, and on which device."""

import pytest
import torch

from sonoforge_trainer.contract.config import ExecutionConfig
from sonoforge_trainer.ranks import Ranks, assign_virtual_ranks, choose_device


@pytest.mark.parametrize(
    ("virtual_ranks", "world_size", "expected"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),
        (4, 3, [[0, 1], [2], [3]]),
        (4, 4, [[0], [1], [2], [3]]),
        (8, 3, [[0, 1, 2], [3, 4, 5], [6, 7]]),
    ],
)
def test_virtual_ranks_are_dealt_in_order_and_evenly(virtual_ranks, world_size, expected):
    assert [list(assign_virtual_ranks(virtual_ranks, world_size, rank)) for rank in range(world_size)] == expected


def test_more_processes_than_virtual_ranks_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"5 processes for 4 virtual ranks: 1 would be idle. Use at most 4"):
        assign_virtual_ranks(4, 5, 0)


def test_one_process_needs_no_group_and_issues_no_collective():
    ranks = Ranks.single()
    values = torch.tensor([1.0, 2.0])
    assert ranks.sum(values) is values
    assert ranks.max(values).tolist() == [1.0, 2.0]
    assert (ranks.collectives, ranks.group, list(ranks.virtual_ranks(3))) == (0, None, [0, 1, 2])


def test_an_environment_without_torchrun_is_one_process():
    ranks = Ranks.from_env(ExecutionConfig(device="cpu"), {})
    assert (ranks.rank, ranks.world_size, ranks.group) == (0, 1, None)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "must be whole numbers; start the trainer with torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
    ],
)
def test_a_broken_environment_is_a_clear_error(environ, message):
    with pytest.raises(ValueError, match=message):
        Ranks.from_env(ExecutionConfig(device="cpu"), environ)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_a_clear_error():
    with pytest.raises(ValueError, match=r"0 CUDA devices are visible. Start at most 0 processes per node, or use"):
        choose_device(ExecutionConfig(device="cuda"))


def test_auto_is_the_cpu_where_there_is_no_gpu():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device(ExecutionConfig()).type == expected
