"""All-to-all of rows among the ranks of a group, in two steps: what is computed between them hides it.

The backend's own where there is one that is fast; in memory that ranks share, where they speak over gloo.
"""

from __future__ import annotations

import itertools
import weakref
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from aria_train.parallel.shared_memory import SharedMemory

_keys = itertools.count()
_memories: weakref.WeakValueDictionary[int, SharedMemory] = weakref.WeakValueDictionary()
"""By what an operator can be given."""


class Exchange:
    """Of the ranks of a group, one at a time."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Collective."""
        self.num_ranks = group.size()
        self._group = group.group_name
        self._memory = SharedMemory.of(group) if dist.get_backend(group) == "gloo" else None
        self._key = next(_keys)
        if self._memory is not None:
            _memories[self._key] = self._memory

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends rows [R, ...] off, so many to each rank -> [S, ...], from each rank so many, there after `wait`."""
        rows = rows.contiguous()
        if self._memory is not None:
            return cast(Tensor, torch.ops.aria_train.all_to_all(rows, sent, received, self._key))
        moving = torch.ops._c10d_functional.all_to_all_single(rows, received, sent, self._group)
        return cast(Tensor, moving)

    def wait(self, moving: Tensor) -> Tensor:
        """What `start` returned, once it is there."""
        if self._memory is not None:
            with record_function("aria_train::all_to_all wait"):  # as the backend's own stands in a profile
                self._memory.finish()
            return moving
        return cast(Tensor, torch.ops._c10d_functional.wait_tensor(moving))


@torch.library.custom_op("aria_train::to_host", mutates_args=())
def to_host(numbers: Tensor) -> Tensor:
    """A copy on the host, which waits for the device. An operator, so that selective recomputation keeps it and does
    not wait again."""
    return numbers.to("cpu", copy=True)


@to_host.register_fake
def _(numbers: Tensor) -> Tensor:
    return torch.empty_like(numbers, device="cpu")


torch.library.define("aria_train::all_to_all", "(Tensor rows, SymInt[] sent, SymInt[] received, int memory) -> Tensor")


@torch.library.impl("aria_train::all_to_all", "cpu")
def _all_to_all(rows: Tensor, sent: list[int], received: list[int], memory: int) -> Tensor:
    """An operator, so that selective recomputation can keep what arrived and does not exchange it again."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    # Written to later: `data`, so that it does not count as changed since.
    _memories[memory].start_exchange(rows.split(sent), arrived.data.split(received))
    return arrived
