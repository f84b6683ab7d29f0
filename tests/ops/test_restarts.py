"""The launcher starts ranks again by itself after one has died, unless that would not help."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aria_train import elastic
from aria_train.errors import EXIT_RESTART

OPTIONS = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]

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


STOPPABLE = """
import os, sys, time
from aria_train.elastic import leave_stopped
from aria_train.train.signals import asked, graceful_stop

end = time.monotonic() + 120  # by itself too, should the launcher be killed
with graceful_stop():
    os.write(1, b"ready\\n")  # in one piece, as others write beside it
    while not asked() and time.monotonic() < end:
        time.sleep(0.05)
sys.exit(leave_stopped())
"""


@pytest.mark.distributed
def test_a_request_to_stop_is_passed_on_where_there_is_no_ps(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(STOPPABLE)
    command = [sys.executable, "-m", "aria_train.elastic", *OPTIONS, str(tmp_path / "program.py")]
    bare = {**os.environ, "PATH": "/nonexistent"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=bare) as launcher:
        try:
            assert launcher.stdout is not None
            assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
            launcher.terminate()
            _, said = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    assert launcher.returncode == EXIT_RESTART, said[-2000:]


@pytest.mark.parametrize("proc", [True, False])
def test_children_are_known_whatever_their_names(proc: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not proc:
        if shutil.which("ps") is None:
            pytest.skip("there is no ps")
        monkeypatch.setattr(elastic, "_parents_in_proc", lambda: iter(()))
    program = tmp_path / "a) R 1 (b"
    program.symlink_to(shutil.which("sleep") or "sleep")
    with subprocess.Popen([program, "60"]) as child:
        try:
            assert child.pid in elastic._children()
            assert os.getppid() not in elastic._children()
        finally:
            child.kill()


def launch(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of the program, that may start again once."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "aria_train.elastic", *OPTIONS, str(folder / "program.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)
