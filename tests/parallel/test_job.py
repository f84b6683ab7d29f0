"""A rank that fails beside others that wait for it in a collective."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAILING = """
import sys, time
from unittest import mock
import torch.distributed as dist
from aria_train.cli import _print_error
from aria_train.errors import ConfigError, UserError
from aria_train.parallel.job import orderly_end

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
over_nccl = {"get_world_size": lambda: 2, "get_backend": lambda: "cpu:gloo,cuda:nccl", "barrier": lambda: None}
# Over NCCL, leaving the group waits for ranks that wait for this one.
with mock.patch.multiple(dist, **over_nccl, destroy_process_group=lambda: time.sleep(1000)):
    try:
        with orderly_end():
            raise ERROR
    except UserError as error:
        _print_error(error)
        sys.exit(2)
"""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [("ConfigError('mend it')", 2, "mend it"), ("RuntimeError('out of memory')", 1, "RuntimeError: out of memory")],
)
def test_over_nccl_a_failing_rank_says_why_and_waits_for_nobody(error: str, status: int, said: str) -> None:
    command = [sys.executable, "-c", FAILING.replace("ERROR", error)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert said in done.stderr
