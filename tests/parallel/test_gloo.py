"""Shared memory, and exchanges between pairs of ranks, give what the collectives do that they stand in for."""

from __future__ import annotations

from unittest import mock

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
"""What fits into a room here at first. It becomes larger with the messages."""


def exchange(sizes: list[int], shared: bool, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """For every size: what all ranks gave, gathered; and this rank's part of the sum of whole tensors."""
    ranks, group = dist.get_world_size(), dist.group.WORLD
    assert group is not None
    shared_memory._ROOM = NUMBERS * 4
    memory = SharedMemory.of(group) if shared else None
    assert (memory is not None) == (shared and ranks > 1)
    gather, reduce = DirectAllGather(group, lambda _: memory), DirectReduceScatter(group, lambda _: memory)
    return [(gathered(gather, size, dtype), reduced(reduce, size, dtype)) for size in sizes]


def gathered(gather: DirectAllGather, size: int, dtype: torch.dtype) -> Tensor:
    """As FSDP2 does it."""
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    assert group is not None
    output = gather.allocate([ranks * size], dtype=dtype, device=torch.device("cpu"))
    mine = output.narrow(0, rank * size, size).copy_(numbers(size, rank))
    gather(output, mine, group)
    return output.clone()


def reduced(reduce: DirectReduceScatter, size: int, dtype: torch.dtype) -> Tensor:
    """As FSDP2 does it, which keeps what it returns."""
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    assert group is not None
    whole = reduce.allocate([ranks * size], dtype=dtype, device=torch.device("cpu"))
    whole.copy_(numbers(ranks * size, rank))
    part = reduce.allocate([size], dtype=dtype, device=torch.device("cpu"))
    reduce(part, whole, group, dist.ReduceOp.SUM)
    assert torch.equal(whole, numbers(ranks * size, rank).to(dtype)), "what was given stays as it is"
    return part


def numbers(size: int, rank: int) -> Tensor:
    """Small ones: sums are exact in every precision, in any order."""
    return torch.arange(size, dtype=torch.float32) % 20 * (rank + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("shared", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16), (True, torch.float64)]
)
def test_exchanges_equal_the_plain_computation(ranks: int, shared: bool, dtype: torch.dtype) -> None:
    sizes = [0, 1, 7, NUMBERS, NUMBERS + 1, 10_000, 9_999]
    for rank, results in enumerate(run_distributed(exchange, ranks, sizes, shared, dtype)):
        for size, (gathered, part) in zip(sizes, results, strict=True):
            assert torch.equal(gathered.float(), torch.cat([numbers(size, other) for other in range(ranks)]))
            whole = torch.stack([numbers(ranks * size, other) for other in range(ranks)]).sum(0)
            assert torch.equal(part.float(), whole[rank * size : (rank + 1) * size])


def exchange_where_memory_is_short(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """As `exchange`; there is none beyond the first rooms."""
    reserve, asked = shared_memory._reserve, list[int]()

    def refuse(size: int) -> int | None:
        asked.append(size)
        return reserve(size) if len(asked) == 1 else None

    with mock.patch.object(shared_memory, "_reserve", refuse):
        found = exchange(sizes, True, torch.float32)
    assert len(asked) == (2 if dist.get_rank() == 0 else 0), "what was refused is not asked for again"
    return found


def test_what_has_no_room_in_memory_goes_as_a_message() -> None:
    sizes = [1, 10_000, 1, 10_000, 20_000]
    for rank, results in enumerate(run_distributed(exchange_where_memory_is_short, 2, sizes)):
        for size, (gathered, part) in zip(sizes, results, strict=True):
            assert torch.equal(gathered, torch.cat([numbers(size, other) for other in range(2)]))
            assert torch.equal(part, 3 * numbers(2 * size, 0)[rank * size : (rank + 1) * size])
