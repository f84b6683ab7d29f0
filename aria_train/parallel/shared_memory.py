"""Memory that ranks on one machine share: what a rank writes, the others read where it lies.

Over gloo a message between two processes of a machine is copied into the kernel's buffers and out of them, by threads
that take turns with the computation. Here each rank copies by itself, and a byte through a socket says that it is done.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.parallel.collectives import gather_objects
from aria_train.parallel.sockets import Sockets

_ROOM = 24 << 20
"""Bytes of a turn, until one needs more."""
_ALIGNMENT = 64


class SharedMemory:
    """Two rooms that all ranks of a group write and read, used in turns: a rank that has come to the next turn has read
    what was written in the last, so that its room may be written again once all have met in the next.

    All ranks take the same turns. One ends with `meet`, with `finish`, or with the start of the next.
    """

    def __init__(self, group: dist.ProcessGroup, sockets: Sockets, memory: Tensor) -> None:
        self._group, self._rank, self._sockets = group, group.rank(), sockets
        self._others = [rank for rank in range(group.size()) if rank != self._rank]
        self._rooms = memory.view(2, -1)
        self._refused = math.inf
        """Bytes of a room that the machine did not have."""
        self._turn = 0
        self._read: Callable[[], None] | None = None
        """What is left to do in this turn, once all others have written."""

    @staticmethod
    def of(group: dist.ProcessGroup) -> SharedMemory | None:
        """A new one. Collective. None for a rank alone, for ranks on several machines, and where memory is short."""
        if group.size() == 1 or (sockets := Sockets.between(group)) is None:
            return None
        memory = _share(2 * _ROOM, group, sockets)
        return SharedMemory(group, sockets, memory) if memory is not None else None

    def room(self, size: int) -> Tensor | None:
        """uint8 [size] in a new turn, the same for all ranks; all ask for as many. None where memory is short."""
        self.finish()
        if size > self._rooms.shape[1] and not self._make_larger(size):
            return None
        self._turn = 1 - self._turn
        return self._rooms[self._turn, :size]

    def meet(self) -> None:
        """Until all ranks have written in this turn."""
        self._sockets.announce()
        self._sockets.wait()

    def finish(self) -> None:
        """Until what was started last has arrived. Does nothing where it has."""
        if self._read is not None:
            read, self._read = self._read, None
            self._sockets.wait()
            read()

    def start_exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Each rank's part of `sent` to it, and each rank's into its part of `received` by the time of `finish`.
        Parts are contiguous, and of any size; what does not fit into a room goes as a message."""
        room = self.room(self._rooms.shape[1])
        assert room is not None
        fits = room.shape[0] // (self._group.size() * len(self._others)) // _ALIGNMENT * _ALIGNMENT
        slots = room[: self._group.size() * len(self._others) * fits].view(self._group.size(), -1, fits)
        works: list[dist.Work] = []
        for rank in self._others:
            if (part := _bytes(sent[rank])).shape[0] <= fits:
                slots[self._rank, self._slot(self._rank, rank), : part.shape[0]].copy_(part)
            else:
                works.append(self._group.send([part], rank, 0))
        copies: list[tuple[Tensor, Tensor]] = []
        for rank in self._others:
            if (part := _bytes(received[rank])).shape[0] <= fits:
                copies.append((part, slots[rank, self._slot(rank, self._rank), : part.shape[0]]))
            else:
                works.append(self._group.recv([part], rank, 0))
        self._sockets.announce()
        self._read = functools.partial(self._take, works, copies)
        received[self._rank].copy_(sent[self._rank])

    def _make_larger(self, size: int) -> bool:
        """Rooms of so many bytes; those before are gone once nothing reads them."""
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        if size >= self._refused:
            return False
        if (memory := _share(2 * size, self._group, self._sockets)) is None:
            self._refused = size
            return False
        self._rooms = memory.view(2, -1)
        return True

    @staticmethod
    def _take(works: list[dist.Work], copies: list[tuple[Tensor, Tensor]]) -> None:
        for work in works:
            work.wait()
        for part, shown in copies:
            part.copy_(shown)

    @staticmethod
    def _slot(writer: int, reader: int) -> int:
        """Of the writer's room: it keeps none for itself."""
        return reader - (reader > writer)


def _bytes(part: Tensor) -> Tensor:
    return part.view(-1).view(torch.uint8)


def _share(size: int, group: dist.ProcessGroup, sockets: Sockets) -> Tensor | None:
    """uint8 [size], the same on all ranks. Collective. None where one has no room for it."""
    file = sockets.hand_out(_reserve(size) if group.rank() == 0 else None)
    memory = _map(file, size) if file is not None else None
    return memory if all(gather_objects(memory is not None, group)) else None


def _reserve(size: int) -> int | None:
    """An open file in memory with all its pages: where there are too few, that is seen here and not when they are
    written. It has no name, and is gone with the last process that has it open."""
    with contextlib.suppress(OSError):
        file = os.memfd_create("aria_train")
        try:
            os.posix_fallocate(file, 0, size)
            return file
        except OSError:
            os.close(file)
    return None


def _map(file: int, size: int) -> Tensor | None:
    """uint8 [size]. Closes the file."""
    with contextlib.suppress(OSError), open(file, "r+b") as opened:
        return torch.frombuffer(mmap.mmap(opened.fileno(), size), dtype=torch.uint8)
    return None
