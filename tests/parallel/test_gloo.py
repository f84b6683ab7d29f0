"""Shared memory, and exchanges between pairs of ranks, give what the collectives do that they stand in for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.parallel import shared_memory
from aria_train.parallel.gloo import DirectAllGather, DirectReduceScatter
from aria_train.parallel.shared_memory import SharedMemory
from tests.distributed import RankFailure, launch, run_distributed

pytestmark = pytest.mark.distributed

NUMBERS = 48
"""What fits into a room here, so that most messages take many turns."""


def exchange(sizes: list[int], shared: bool, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """For every size: what all ranks gave, gathered; and this rank's part of the sum of whole tensors."""
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    assert group is not None
    shared_memory._BYTES = 2 * ranks * NUMBERS * 4
    memory = SharedMemory.of(group) if shared else None
    assert (memory is not None) == (shared and ranks > 1)
    gather, reduce = DirectAllGather(lambda _: memory), DirectReduceScatter(lambda _: memory)
    results = []
    for size in sizes:
        gathered = torch.full((ranks * size,), -1, dtype=dtype)
        mine = gathered[rank * size : (rank + 1) * size]
        mine.copy_(numbers(size, rank))
        gather(gathered, mine, group)
        part, whole = torch.full((size,), -1, dtype=dtype), numbers(ranks * size, rank).to(dtype)
        reduce(part, whole, group, dist.ReduceOp.SUM)
        assert torch.equal(whole, numbers(ranks * size, rank).to(dtype)), "what was given stays as it is"
        results.append((gathered, part))
    return results


def numbers(size: int, rank: int) -> Tensor:
    """Small ones: sums are exact in every precision, in any order."""
    return torch.arange(size, dtype=torch.float32) % 20 * (rank + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("shared", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16), (True, torch.float64)]
)
def test_exchanges_equal_the_plain_computation(ranks: int, shared: bool, dtype: torch.dtype) -> None:
    sizes = [0, 1, 7, NUMBERS, NUMBERS + 1, 10_000]
    for rank, results in enumerate(run_distributed(exchange, ranks, sizes, shared, dtype)):
        for size, (gathered, part) in zip(sizes, results, strict=True):
            assert torch.equal(gathered.float(), torch.cat([numbers(size, other) for other in range(ranks)]))
            whole = torch.stack([numbers(ranks * size, other) for other in range(ranks)]).sum(0)
            assert torch.equal(part.float(), whole[rank * size : (rank + 1) * size])


def hurried(turns: int) -> bool:
    """Whether no rank ever reads what another wrote for a later turn, where one now and then is slow to read."""
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    assert group is not None
    memory = SharedMemory.of(group)
    assert memory is not None
    meet = memory._meet

    def meet_and_rest() -> None:
        meet()
        if (turn + rank) % ranks == 0:
            time.sleep(0.002)

    memory._meet = meet_and_rest  # type: ignore[method-assign]
    parts = torch.empty(ranks, 1000)
    expected = torch.arange(ranks)[:, None].expand(-1, 1000)
    right = True
    for turn in range(turns):
        parts[rank] = turn * ranks + rank
        memory.all_gather(parts)
        right &= torch.equal(parts, (expected + turn * ranks).float())
    return right


def test_a_rank_that_is_ahead_overwrites_nothing() -> None:
    assert run_distributed(hurried, 3, 300) == [True] * 3


def shares_memory(folders: list[str]) -> bool:
    """Whether the group does, where each rank has such a folder for it."""
    group = dist.group.WORLD
    assert group is not None
    shared_memory._FOLDER = Path(folders[group.rank()])
    return SharedMemory.of(group) is not None


def test_ranks_that_have_no_memory_in_common_exchange_messages(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for folders in ([here, here, there], [there, here, here], [tmp_path / "missing"] * 3):
        assert run_distributed(shares_memory, 3, [str(folder) for folder in folders]) == [False] * 3
    assert run_distributed(shares_memory, 3, [str(here)] * 3) == [True] * 3
    assert not [*here.iterdir(), *there.iterdir()]


def shares_scarce_memory(folders: list[str]) -> bool:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    os.posix_fallocate = refuse
    return shares_memory(folders)


def test_a_full_memory_is_noticed_before_it_is_used(tmp_path: Path) -> None:
    assert run_distributed(shares_scarce_memory, 2, [str(tmp_path)] * 2) == [False, False]
    assert not list(tmp_path.iterdir())


def die_in_the_middle(folder: str) -> None:
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    assert group is not None
    shared_memory._FOLDER = Path(folder)
    memory = SharedMemory.of(group)
    assert memory is not None
    memory.all_gather(torch.zeros(ranks, 10))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    memory.all_gather(torch.zeros(ranks, 10))


def test_a_rank_that_dies_is_an_error_on_the_others_and_leaves_nothing(tmp_path: Path) -> None:
    survivor, dead = launch(die_in_the_middle, 2, str(tmp_path), timeout=60)
    assert isinstance(dead, RankFailure)
    assert "SIGKILL" in str(dead)
    assert isinstance(survivor, RankFailure)
    assert "Connection" in str(survivor)
    assert not list(tmp_path.iterdir())
