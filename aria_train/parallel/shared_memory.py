"""Memory that ranks on one machine share: what a rank writes, the others read where it lies.

Over gloo a message between two processes of a machine is copied into the kernel's buffers and out of them. In memory
that both see, a message of some MiB takes half the time to two thirds. Only a byte that says it is there still goes
over gloo: a rank that died is an error then, as it is elsewhere, and not a byte that never changes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.parallel.collectives import broadcast_object, gather_objects

_FOLDER = Path("/dev/shm")
_BYTES = 48 << 20
"""Of a group. Containers are often given 64 MiB for everything."""
_ALIGNMENT = 64


class SharedMemory:
    """Two rooms for each of R ranks, used in turns: a rank that has come to the next turn has read what was shown in
    the last, so that room may be written again."""

    def __init__(self, group: dist.ProcessGroup, memory: Tensor) -> None:
        self._group, self._rank = group, group.rank()
        self._others = [rank for rank in range(group.size()) if rank != self._rank]
        self._rooms = memory.view(2, group.size(), -1)
        self._turn = 0

    @staticmethod
    def of(group: dist.ProcessGroup) -> SharedMemory | None:
        """A new one. Collective. None for a rank alone, for ranks on several machines, and where memory is short."""
        if group.size() == 1:
            return None
        room = _BYTES // (2 * group.size()) // _ALIGNMENT * _ALIGNMENT
        size = 2 * group.size() * room
        name = broadcast_object(lambda: _reserve(size), group)
        memory = _open(name, size) if name is not None else None
        everyone = all(gather_objects(memory is not None, group))
        if name is not None and group.rank() == 0:
            (_FOLDER / name).unlink()  # the memory stays as long as a process has it, however that ends
        return SharedMemory(group, memory) if memory is not None and everyone else None

    def all_gather(self, parts_RN: Tensor) -> None:
        """Each rank's row of parts [R, N] -> the others' rows too."""
        mine = parts_RN[self._rank]
        for piece, rooms in self._turns(mine[None]):
            rooms[self._rank, 0].copy_(mine[piece])
            self._meet()
            for rank in self._others:
                parts_RN[rank, piece].copy_(rooms[rank, 0])

    def reduce_scatter(self, parts_RN: Tensor, total_N: Tensor) -> None:
        """Sum over ranks of this rank's row of parts [R, N] -> total [N]: its own first, the others' in order."""
        for piece, rooms in self._turns(parts_RN[1:]):
            for rank in self._others:
                rooms[self._rank, self._slot(self._rank, rank)].copy_(parts_RN[rank, piece])
            self._meet()
            total = parts_RN[self._rank, piece]
            for rank in self._others:
                total = torch.add(total, rooms[rank, self._slot(rank, self._rank)], out=total_N[piece])

    @staticmethod
    def _slot(writer: int, reader: int) -> int:
        """Of the writer's room: it keeps none for itself."""
        return reader - (reader > writer)

    def _turns(self, shown_KN: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of N numbers that fit into a room K times, each with the rooms of its turn: [R, K, piece]."""
        slots, numbers = shown_KN.shape
        longest = self._rooms.shape[2] // (slots * shown_KN.dtype.itemsize)
        for start in range(0, numbers, longest):
            piece = slice(start, min(start + longest, numbers))
            self._turn = 1 - self._turn
            rooms = self._rooms[self._turn].view(shown_KN.dtype)[:, : slots * (piece.stop - start)]
            yield piece, rooms.unflatten(1, (slots, -1))

    def _meet(self) -> None:
        """Until all ranks have written."""
        here = torch.zeros(1, dtype=torch.uint8)
        theirs = torch.zeros(len(self._others), 1, dtype=torch.uint8)
        works = [self._group.recv([theirs[n]], rank, 0) for n, rank in enumerate(self._others)]
        works += [self._group.send([here], rank, 0) for rank in self._others]
        for work in works:
            work.wait()


def _reserve(size: int) -> str | None:
    """Name of a file in memory with all its pages: where there are too few, that is seen here and not when they are
    written."""
    name = f"aria_train-{secrets.token_hex(16)}"
    with contextlib.suppress(OSError):
        file = os.open(_FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(file, 0, size)
            return name
        except OSError:
            (_FOLDER / name).unlink()
        finally:
            os.close(file)
    return None


def _open(name: str, size: int) -> Tensor | None:
    """uint8 [size]. None on another machine, where nothing has this name."""
    with contextlib.suppress(OSError), open(_FOLDER / name, "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
    return None
