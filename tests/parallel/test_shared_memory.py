"""Memory that ranks share: what it moves, who has none, and what happens when a rank ends or does not come."""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.parallel import shared_memory, sockets
from aria_train.parallel.shared_memory import SharedMemory
from tests.distributed import RankFailure, launch, run_distributed

pytestmark = pytest.mark.distributed

ROOM = 512
"""Bytes of a rank in a room here: some parts fit, others do not."""
PARTS = [
    # rows that each rank sends to each, by what the two have in common
    lambda sender, receiver: 1,
    lambda sender, receiver: 0,
    lambda sender, receiver: sender + 2 * receiver,
    lambda sender, receiver: 40 * (sender + receiver),
    lambda sender, receiver: 300 if sender < receiver else 1,
    lambda sender, receiver: 0 if sender else 5,
]


def shared(room: int) -> SharedMemory:
    group = dist.group.WORLD
    assert group is not None
    shared_memory._ROOM = group.size() * room
    memory = SharedMemory.of(group)
    assert memory is not None
    return memory


def gather(memory: SharedMemory, parts: Tensor) -> None:
    """The other ranks' rows of parts [R, N] float32, into larger rooms where they must be."""
    room = memory.room(4 * parts.numel())
    assert room is not None
    shown, rank = room.view(torch.float32).view_as(parts), dist.get_rank()
    shown[rank] = parts[rank]
    memory.meet()
    parts.copy_(shown)


def rows(sender: int, receiver: int, count: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(3 * count) % 50 + 100 * sender + 10 * receiver).view(count, 3).to(dtype)


def exchange(dtype: torch.dtype) -> list[bool]:
    """Whether this rank received what all sent to it, for each of PARTS; something else is gathered between."""
    memory, ranks, rank = shared(ROOM), dist.get_world_size(), dist.get_rank()
    found = []
    for count in PARTS:
        sent = [rows(rank, other, count(rank, other), dtype) for other in range(ranks)]
        wanted = [rows(other, rank, count(other, rank), dtype) for other in range(ranks)]
        received = [torch.full_like(part, -1) for part in wanted]
        memory.start_exchange(sent, received)
        if count(0, 1) % 2:  # ends what was started
            gathered = torch.full((ranks, 1000), float(rank))
            gather(memory, gathered)
            assert torch.equal(gathered[:, 0], torch.arange(float(ranks)))
        memory.finish()
        memory.finish()
        found.append(all(map(torch.equal, received, wanted)))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_parts_of_any_size_reach_their_ranks(ranks: int, dtype: torch.dtype) -> None:
    assert run_distributed(exchange, ranks, dtype) == [[True] * len(PARTS)] * ranks


def hurried(turns: int) -> bool:
    """Whether no rank ever reads what another wrote for a later turn, where one now and then is slow to read."""
    memory, ranks, rank = shared(4096), dist.get_world_size(), dist.get_rank()
    wait = memory._sockets.wait

    def wait_and_rest() -> None:
        wait()
        if (turn + rank) % ranks == 0:
            time.sleep(0.002)

    memory._sockets.wait = wait_and_rest  # type: ignore[method-assign]
    parts, given, taken = torch.empty(ranks, 1000), torch.empty(ranks, 100), torch.empty(ranks, 100)
    expected = torch.arange(ranks)[:, None]
    right = True
    for turn in range(turns):
        parts[rank] = turn * ranks + rank
        gather(memory, parts)
        given.fill_(turn * ranks + rank)
        memory.start_exchange(list(given), list(taken))
        right &= torch.equal(parts, (expected.expand(-1, 1000) + turn * ranks).float())
        memory.finish()
        right &= torch.equal(taken, (expected.expand(-1, 100) + turn * ranks).float())
    return right


def test_a_rank_that_is_ahead_overwrites_nothing() -> None:
    assert run_distributed(hurried, 3, 150) == [True] * 3


def shares_memory(machines: list[int]) -> bool:
    """Whether the group does, where each rank is on such a machine; and no file stays open."""
    group = dist.group.WORLD
    assert group is not None
    sockets._NAMES = f"\0aria_train test {os.getppid()} {machines[group.rank()]}"
    before = open_files()
    found = SharedMemory.of(group)
    mapped = found is not None
    del found
    assert open_files() <= before
    return mapped


def open_files() -> int:
    gc.collect()  # of tests before
    return len(list(Path("/proc/self/fd").iterdir()))


def test_ranks_of_several_machines_exchange_messages() -> None:
    for machines in ([0, 0, 1], [1, 0, 0], [0, 1, 2]):
        assert run_distributed(shares_memory, 3, machines) == [False] * 3
    assert run_distributed(shares_memory, 3, [0, 0, 0]) == [True] * 3


def shares_without_names() -> bool:
    if dist.get_rank() == 1:
        sockets._NAMES = "/no such folder/"
    found = SharedMemory.of(dist.group.WORLD)  # type: ignore[arg-type]
    return found is not None


def test_a_rank_that_cannot_listen_has_all_exchange_messages() -> None:
    assert run_distributed(shares_without_names, 3) == [False] * 3


def shares_scarce_memory() -> bool:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    os.posix_fallocate = refuse
    return shares_memory([0, 0])


def test_a_full_memory_is_noticed_before_it_is_used() -> None:
    assert run_distributed(shares_scarce_memory, 2) == [False, False]


def visited_by_a_stranger() -> bool:
    """A process of another user connects before the ranks do, as a rank would."""
    listen, user_of = sockets._listen, sockets._user_of
    strangers = []

    def listen_and_be_visited(name: str, ranks: int) -> socket.socket:
        listening = listen(name, ranks + 1)
        assert listening is not None
        strangers.append(sockets._connect(name, 1))
        return listening

    def first_is_another(connected: socket.socket) -> int:
        seen.append(connected)
        return user_of(connected) + (len(seen) == 1)

    seen: list[socket.socket] = []
    sockets._listen, sockets._user_of = listen_and_be_visited, first_is_another
    memory, rank = shared(4096), dist.get_rank()
    parts = torch.full((2, 10), float(rank))
    gather(memory, parts)
    return torch.equal(parts[:, 0], torch.arange(2.0))


def test_another_user_of_the_machine_is_no_rank() -> None:
    assert run_distributed(visited_by_a_stranger, 2) == [True, True]


def die_in_the_middle(dead: int, numbers: int) -> None:
    memory, rank = shared(4096), dist.get_rank()
    gather(memory, torch.zeros(2, 10))
    if rank == dead:
        os.kill(os.getpid(), signal.SIGKILL)
    gather(memory, torch.zeros(2, numbers))


@pytest.mark.parametrize(("dead", "numbers"), [(1, 10), (0, 10_000)], ids=["in a turn", "handing out larger rooms"])
def test_a_rank_that_dies_is_an_error_on_the_others(dead: int, numbers: int) -> None:
    outcomes = launch(die_in_the_middle, 2, dead, numbers, timeout=60)
    assert all(isinstance(outcome, RankFailure) for outcome in outcomes)
    assert "SIGKILL" in str(outcomes[dead])
    assert f"The connection to rank {dead} of 2 is closed: it has ended." in str(outcomes[1 - dead])


def stay_away() -> None:
    sockets.patience = lambda: timedelta(seconds=0.2)  # type: ignore[assignment]
    memory, rank = shared(4096), dist.get_rank()
    if rank == 1:
        time.sleep(2)
    gather(memory, torch.zeros(2, 10))


def test_a_rank_that_does_not_come_is_an_error_that_names_it() -> None:
    waiting, _ = launch(stay_away, 2, timeout=60)
    assert isinstance(waiting, RankFailure)
    assert "Rank 1 of 2 has not come for 0:00:00.2" in str(waiting)
