"""Sockets between ranks of one machine: how they wake each other, and notice that one has ended.

A byte over gloo wakes a thread on either side, three times, beside the threads that compute. Here the rank that waits
is woken itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Iterator

import torch.distributed as dist

from aria_train.parallel.collectives import broadcast_object, gather_objects
from aria_train.parallel.mesh import patience

_NAMES = "\0aria_train"
"""Where names begin. The zero says that there is no file of that name: the kernel forgets it with the process."""


class Sockets:
    """One between each two ranks of a group."""

    def __init__(self, rank: int, sockets: dict[int, socket.socket]) -> None:
        self.rank, self._sockets, self._patience = rank, sockets, patience()
        for other in sockets.values():
            other.settimeout(self._patience.total_seconds())

    @staticmethod
    def between(group: dist.ProcessGroup) -> Sockets | None:
        """Collective. None for ranks that cannot reach each other, as those of several machines."""
        rank, ranks = group.rank(), group.size()
        names = f"{_NAMES}-{broadcast_object(lambda: secrets.token_hex(16), group)}"
        sockets: dict[int, socket.socket] = {}
        with _listen(f"{names}-{rank}", ranks) or contextlib.nullcontext() as listening:
            if not all(gather_objects(listening is not None, group)):
                return None
            for other in range(rank):
                with contextlib.suppress(OSError):
                    sockets[other] = _connect(f"{names}-{other}", rank)
            if not all(gather_objects(len(sockets) == rank, group)):
                return None
            assert listening is not None
            while len(sockets) < ranks - 1:
                accepted, _ = listening.accept()
                if _user_of(accepted) == os.getuid():  # others of the machine can see the names
                    sockets[int.from_bytes(accepted.recv(4))] = accepted
        return Sockets(rank, sockets)

    def announce(self) -> None:
        """Tells all others that this rank has come so far."""
        for other in self._sockets:
            with self._speaking_to(other):
                self._sockets[other].sendall(b".")

    def wait(self) -> None:
        """Until all others have announced as much once more."""
        for other in self._sockets:
            with self._speaking_to(other):
                if not self._sockets[other].recv(1):
                    raise ConnectionResetError

    def hand_out(self, file: int | None) -> int | None:
        """The first rank's open file, if it has one, on all ranks: a descriptor of their own on each."""
        if self.rank == 0:
            for other in self._sockets:
                with self._speaking_to(other):
                    socket.send_fds(self._sockets[other], [b"."], [] if file is None else [file])
            return file
        with self._speaking_to(0):
            told, files, _, _ = socket.recv_fds(self._sockets[0], 1, 1)
            if not told:
                raise ConnectionResetError
        return files[0] if files else None

    @contextlib.contextmanager
    def _speaking_to(self, other: int) -> Iterator[None]:
        ranks = len(self._sockets) + 1
        try:
            yield
        except TimeoutError as error:
            raise TimeoutError(f"Rank {other} of {ranks} has not come for {self._patience}.") from error
        except OSError as error:
            raise ConnectionError(f"The connection to rank {other} of {ranks} is closed: it has ended.") from error


def _listen(name: str, ranks: int) -> socket.socket | None:
    """None where the system has no such names."""
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(name)
    except OSError:
        listening.close()
        return None
    listening.listen(ranks)
    return listening


def _user_of(connected: socket.socket) -> int:
    """Who runs the process at the other end, as the kernel knows."""
    _, user, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def _connect(name: str, rank: int) -> socket.socket:
    """Also tells the rank of that name who comes."""
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(name)
    connected.sendall(rank.to_bytes(4))
    return connected
