"""All-gather and reduce-scatter over gloo: in memory that ranks share, or as exchanges between pairs of ranks.

Gloo has no reduce-scatter: torch makes one of an all-reduce, which moves twice as much and copies its input first. Its
all-gather takes two copies more. For messages of some MiB between two ranks, exchanges take a third to a half of the
time, and shared memory about a third of that again. An all-to-all is in `exchange.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from aria_train.parallel.shared_memory import SharedMemory


def exchange_directly(modules: Sequence[FSDPModule]) -> None:
    """Lets sharded modules communicate this way, where ranks speak over gloo."""
    if dist.get_backend() == "gloo":
        memory_of = functools.cache(SharedMemory.of)  # made when a group first communicates, and gone with the modules
        for module in modules:
            module.set_custom_all_gather(cast(Any, DirectAllGather(memory_of)))
            module.set_custom_reduce_scatter(cast(Any, DirectReduceScatter(memory_of)))


class _Communication:
    """What FSDP2's own communications have in common; it does not publish their type."""

    def __init__(self, memory_of: Callable[[dist.ProcessGroup], SharedMemory | None]) -> None:
        self._memory_of = memory_of

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class DirectAllGather(_Communication):
    """[n] of each of R ranks, in its place of the output -> [R * n] on all, in order of rank."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        assert not async_op
        parts = output_tensor.view(group.size(), -1)
        if (memory := self._memory_of(group)) is not None:
            memory.all_gather(parts)
            return
        works = [
            work
            for distance in range(1, group.size())
            for work in _exchange(group, distance, [input_tensor] * group.size(), parts[group.rank() - distance])
        ]
        for work in works:
            work.wait()


class DirectReduceScatter(_Communication):
    """[R * n] of each of R ranks -> [n], the sum over ranks of this rank's part."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM
        assert not async_op
        parts = input_tensor.view(group.size(), -1)
        if (memory := self._memory_of(group)) is not None:
            memory.reduce_scatter(parts, output_tensor)
            return
        total, received = parts[group.rank()], torch.empty_like(output_tensor)
        for distance in range(1, group.size()):
            for work in _exchange(group, distance, parts, received):
                work.wait()
            total = torch.add(total, received, out=output_tensor)
        if total is not output_tensor:
            output_tensor.copy_(total)


def _exchange(
    group: dist.ProcessGroup, distance: int, parts: Sequence[Tensor] | Tensor, received: Tensor
) -> list[dist.Work]:
    """Starts to send the rank so far ahead its part, and to receive from the one as far behind."""
    to, source = (group.rank() + distance) % group.size(), (group.rank() - distance) % group.size()
    return [group.recv([received], source, 0), group.send([parts[to]], to, 0)]
