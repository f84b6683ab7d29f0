"""Exchanges between pairs of ranks give what the collectives do that they stand in for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.parallel.gloo import PairwiseAllGather, PairwiseReduceScatter
from tests.distributed import run_distributed

pytestmark = pytest.mark.distributed


def exchange(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """For every size: what all ranks gave, gathered; and this rank's part of the sum of whole tensors."""
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    results = []
    for size in sizes:
        gathered = torch.full((ranks * size,), -1.0)
        mine = gathered[rank * size : (rank + 1) * size]
        mine.copy_(numbers(size, rank))
        PairwiseAllGather()(gathered, mine, group)
        part, whole = torch.full((size,), -1.0), numbers(ranks * size, rank)
        PairwiseReduceScatter()(part, whole, group, dist.ReduceOp.SUM)
        assert torch.equal(whole, numbers(ranks * size, rank)), "what was given stays as it is"
        results.append((gathered, part))
    return results


def numbers(size: int, rank: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32) * (rank + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_exchanges_equal_the_plain_computation(ranks: int) -> None:
    sizes = [0, 1, 7, 100_000]
    for rank, results in enumerate(run_distributed(exchange, ranks, sizes)):
        for size, (gathered, part) in zip(sizes, results, strict=True):
            assert torch.equal(gathered, torch.cat([numbers(size, other) for other in range(ranks)]))
            whole = torch.stack([numbers(ranks * size, other) for other in range(ranks)]).sum(0)
            assert torch.equal(part, whole[rank * size : (rank + 1) * size])
