"""The launcher starts ranks again by itself after one has died, unless that would not help."""

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
dist.destroy_process_group()  # gloo's threads may abort an interpreter that ends around them
"""


@pytest.mark.distributed
def test_ranks_that_start_again_do_not_wait_for_the_dead(tmp_path: Path) -> None:
    done = launch(tmp_path, PROGRAM)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("met again") == 1


MISTAKE = """
import os, sys, time
from aria_train.errors import EXIT_USER_ERROR

if os.environ["RANK"] == "0":
    print("train.no_such_key", flush=True)
    sys.exit(EXIT_USER_ERROR)
time.sleep(60)
"""


@pytest.mark.distributed
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    done = launch(tmp_path, MISTAKE)
    assert done.returncode == 2
    assert done.stdout.count("train.no_such_key") == 1


def launch(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of the program, that may start again once."""
    (folder / "program.py").write_text(program)
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [sys.executable, "-m", "aria_train.elastic", *options, str(folder / "program.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)
