"""Memory that ranks on one machine share: what a rank writes, the others read where it lies.

Over gloo a message between two processes of a machine is copied into the kernel's buffers and out of them, by threads
that take turns with the computation. Here each rank copies by itself, and a byte through a socket says that it is done.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.parallel.collectives import gather_objects
from aria_train.parallel.sockets import Sockets

_BYTES = 48 << 20
"""Of a group. Larger messages go in pieces that stay in a processor's cache."""
_ALIGNMENT = 64


class SharedMemory:
    """Two rooms for each of R ranks, used in turns: a rank that has come to the next turn has read what was shown in
    the last, so that room may be written again.

    A turn ends with `finish`, or with the start of the next.
    """

    def __init__(self, group: dist.ProcessGroup, sockets: Sockets, memory: Tensor) -> None:
        self._group, self._rank, self._sockets = group, group.rank(), sockets
        self._others = [rank for rank in range(group.size()) if rank != self._rank]
        self._rooms = memory.view(2, group.size(), -1)
        self._turn = 0
        self._read: Callable[[], None] | None = None
        """What is left to do in this turn, once all others have written."""

    @staticmethod
    def of(group: dist.ProcessGroup) -> SharedMemory | None:
        """A new one. Collective. None for a rank alone, for ranks on several machines, and where memory is short."""
        if group.size() == 1 or (sockets := Sockets.between(group)) is None:
            return None
        room = _BYTES // (2 * group.size()) // _ALIGNMENT * _ALIGNMENT
        size = 2 * group.size() * room
        file = sockets.hand_out(_reserve(size) if group.rank() == 0 else None)
        memory = _map(file, size) if file is not None else None
        everyone = all(gather_objects(memory is not None, group))
        return SharedMemory(group, sockets, memory) if memory is not None and everyone else None

    def finish(self) -> None:
        """Until what was started last has arrived. Does nothing where it has."""
        if self._read is not None:
            read, self._read = self._read, None
            self._sockets.wait()
            read()

    def all_gather(self, parts_RN: Tensor) -> None:
        """Each rank's row of parts [R, N] -> the others' rows too."""
        mine = parts_RN[self._rank]
        for piece, rooms in self._pieces(mine[None]):
            rooms[self._rank, 0].copy_(mine[piece])
            self._show(functools.partial(self._gather, parts_RN[:, piece], rooms))
        self.finish()

    def reduce_scatter(self, parts_RN: Tensor, total_N: Tensor) -> None:
        """Sum over ranks of this rank's row of parts [R, N] -> total [N]: its own first, the others' in order."""
        for piece, rooms in self._pieces(parts_RN[1:]):
            for rank in self._others:
                rooms[self._rank, self._slot(self._rank, rank)].copy_(parts_RN[rank, piece])
            self._show(functools.partial(self._add_up, parts_RN[self._rank, piece], rooms, total_N[piece]))
        self.finish()

    def start_exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Each rank's part of `sent` to it, and each rank's into its part of `received` by the time of `finish`.
        Parts are contiguous, and of any size; what does not fit into a room goes as a message."""
        rooms = self._next_rooms()
        fits = rooms.shape[1] // len(self._others) // _ALIGNMENT * _ALIGNMENT
        slots = rooms[:, : fits * len(self._others)].unflatten(1, (-1, fits))
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
        self._show(functools.partial(self._take, works, copies))
        received[self._rank].copy_(sent[self._rank])

    def _gather(self, parts_RN: Tensor, rooms: Tensor) -> None:
        for rank in self._others:
            parts_RN[rank].copy_(rooms[rank, 0])

    def _add_up(self, mine_N: Tensor, rooms: Tensor, total_N: Tensor) -> None:
        total = mine_N
        for rank in self._others:
            total = torch.add(total, rooms[rank, self._slot(rank, self._rank)], out=total_N)

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

    def _pieces(self, shown_KN: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of N numbers that fit into a room K times, each with the rooms of its turn: [R, K, piece]."""
        slots, numbers = shown_KN.shape
        longest = self._rooms.shape[2] // (slots * shown_KN.dtype.itemsize)
        for start in range(0, numbers, longest):
            piece = slice(start, min(start + longest, numbers))
            rooms = self._next_rooms().view(shown_KN.dtype)[:, : slots * (piece.stop - start)]
            yield piece, rooms.unflatten(1, (slots, -1))

    def _next_rooms(self) -> Tensor:
        """uint8 [R, bytes] of a new turn."""
        self.finish()
        self._turn = 1 - self._turn
        return self._rooms[self._turn]

    def _show(self, read: Callable[[], None]) -> None:
        """This rank has written, and does `read` when all have."""
        self._sockets.announce()
        self._read = read


def _bytes(part: Tensor) -> Tensor:
    return part.view(-1).view(torch.uint8)


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
