"""The harness of the tests that run on several ranks."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailure, launch, run_distributed

pytestmark = pytest.mark.distributed


def add_up(start: float) -> tuple[int, torch.Tensor]:
    total = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), total


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this rank is unwell")
    dist.barrier()


def die_on_rank_one() -> int:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return dist.get_rank()


def hang() -> None:
    time.sleep(60)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_returns_its_result(world_size: int) -> None:
    expected = sum(1.0 + rank for rank in range(world_size))
    assert run_distributed(add_up, world_size, 1.0) == [(rank, torch.tensor([expected])) for rank in range(world_size)]


def test_an_exception_comes_back_with_its_traceback() -> None:
    with pytest.raises(RankFailure, match="rank 1(.|\n)*fail_on_rank_one(.|\n)*ValueError: this rank is unwell"):
        run_distributed(fail_on_rank_one, 2)


def test_a_killed_rank_is_named_and_the_others_answer() -> None:
    first, second = launch(die_on_rank_one, 2)
    assert first == 0
    assert "SIGKILL" in str(second)


def test_a_rank_that_hangs_is_ended_and_says_where_it_was() -> None:
    with pytest.raises(RankFailure, match="rank 0: had to be ended(.|\n)*in hang(.|\n)*rank 1: had to be ended"):
        run_distributed(hang, 2, timeout=4)
