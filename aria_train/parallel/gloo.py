"""All-gather and reduce-scatter over gloo: in memory that ranks share, or as exchanges between pairs of ranks.

Gloo has no reduce-scatter: torch makes one of an all-reduce, which moves twice as much and copies its input first. Its
all-gather takes two copies more. Exchanges take a third to a half of the time. In shared memory nothing is moved: ranks
write what they give where the others read it. An all-to-all is in `exchange.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from aria_train.parallel.shared_memory import SharedMemory

MemoryOf = Callable[[dist.ProcessGroup], SharedMemory | None]


def exchange_directly(modules: dict[FSDPModule, DeviceMesh]) -> None:
    """Lets modules that are sharded over the last dimension of a mesh communicate so, where ranks speak over gloo."""
    if dist.get_backend() == "gloo":
        memory_of = functools.cache(SharedMemory.of)  # made when a group first communicates, and gone with the modules
        for module, mesh in modules.items():
            group = mesh.get_group(mesh.ndim - 1)
            module.set_custom_all_gather(cast(Any, DirectAllGather(group, memory_of)))
            module.set_custom_reduce_scatter(cast(Any, DirectReduceScatter(group, memory_of)))


class _Communication:
    """What FSDP2's own communications have in common; it does not publish their type."""

    def __init__(self, group: dist.ProcessGroup, memory_of: MemoryOf) -> None:
        self._group, self._memory_of = group, memory_of

    def _share(self, *shape: int, dtype: torch.dtype) -> Tensor | None:
        """Numbers that all ranks write and read, in a new turn of their memory. None where they have none."""
        memory = self._memory_of(self._group)
        room = memory.room(math.prod(shape) * dtype.itemsize) if memory is not None else None
        return None if room is None else room.view(dtype).view(shape)

    def _meet(self) -> None:
        """Until all ranks have written in this turn."""
        memory = self._memory_of(self._group)
        assert memory is not None
        memory.meet()


class DirectAllGather(_Communication):
    """[n] of each of R ranks, in its place of the output -> [R * n] on all, in order of rank.

    FSDP2 copies the parameters out of one output before it allocates the next.
    """

    _shared: Tensor | None = None
    """The output, if it lies in shared memory."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The output."""
        self._shared = self._share(*size, dtype=dtype)
        return torch.empty(*size, dtype=dtype, device=device) if self._shared is None else self._shared

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        assert not async_op
        if self._shared is not None:
            assert output_tensor.data_ptr() == self._shared.data_ptr()
            self._meet()
            return
        parts = output_tensor.view(group.size(), -1)
        works = [
            work
            for distance in range(1, group.size())
            for work in _exchange(group, distance, [input_tensor] * group.size(), parts[group.rank() - distance])
        ]
        for work in works:
            work.wait()


class DirectReduceScatter(_Communication):
    """[R * n] of each of R ranks -> [n], the sum over ranks of this rank's part."""

    _shared: Tensor | None = None
    """The inputs of all ranks [R, R * n], if they lie in shared memory."""
    _output_is_next = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The input; at every second call the output, which becomes the gradient."""
        is_output, self._output_is_next = self._output_is_next, not self._output_is_next
        if not is_output:
            self._shared = self._share(self._group.size(), *size, dtype=dtype)
            if self._shared is not None:
                return self._shared[self._group.rank()]
        return torch.empty(*size, dtype=dtype, device=device)

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
        if self._shared is None:
            parts = _received(group, input_tensor, output_tensor)
        else:
            assert input_tensor.data_ptr() == self._shared[group.rank()].data_ptr()
            parts = self._shown(self._shared)
        total = next(parts)
        for part in parts:
            total = torch.add(total, part, out=output_tensor)
        if total is not output_tensor:
            output_tensor.copy_(total)

    def _shown(self, inputs: Tensor) -> Iterator[Tensor]:
        """Of the inputs of all ranks [R, R * n], what each gives to this one: its own first."""
        self._meet()
        ranks, rank = self._group.size(), self._group.rank()
        parts = inputs.view(ranks, ranks, -1)[:, rank]
        for distance in range(ranks):
            yield parts[rank - distance]


def _received(group: dist.ProcessGroup, given: Tensor, like: Tensor) -> Iterator[Tensor]:
    """What each rank gives to this one, its own first; the others' in one place, so each until the next."""
    parts, received = given.view(group.size(), -1), torch.empty_like(like)
    yield parts[group.rank()]
    for distance in range(1, group.size()):
        for work in _exchange(group, distance, parts, received):
            work.wait()
        yield received


def _exchange(
    group: dist.ProcessGroup, distance: int, parts: Sequence[Tensor] | Tensor, received: Tensor
) -> list[dist.Work]:
    """Starts to send the rank so far ahead its part, and to receive from the one as far behind."""
    to, source = (group.rank() + distance) % group.size(), (group.rank() - distance) % group.size()
    return [group.recv([received], source, 0), group.send([parts[to]], to, 0)]
