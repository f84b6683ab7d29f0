"""The launcher starts ranks again by itself after one has died."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, torch, torch.distributed as dist
from aria_train.parallel.mesh import init_process_group

init_process_group(torch.device("cpu"))
dist.all_reduce(torch.ones(1))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
print("met again" if dist.get_rank() == 0 else "", flush=True)
"""


@pytest.mark.distributed
def test_ranks_that_start_again_do_not_wait_for_the_dead(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [sys.executable, "-m", "aria_train.elastic", *options, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("met again") == 1
