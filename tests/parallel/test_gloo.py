"""Shared memory, and exchanges between pairs of ranks, give what the collectives do that they stand in for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.parallel import shared_memory
from aria_train.parallel.gloo import DirectAllGather, DirectReduceScatter
from aria_train.parallel.shared_memory import SharedMemory
from tests.distributed import run_distributed

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
