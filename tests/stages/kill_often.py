"""Four stages on two ranks, killed at random moments and started again, against the same stages left alone.

python -m tests.stages.kill_often 10 0              # stages that take seconds; the test suite kills fewer times
python -m tests.stages.kill_often 10 0 runs/demo    # those of a finished `make demo`, under its own command
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo.run import CONFIGS, PROCESSES
from demo.summary import STAGES
from tests.stages.recipe import write_stages
from tests.stages.test_interruption import assert_complete, assert_same, kill_and_go_on, run


def kill_tiny_stages(kills: int, seed: int) -> None:
    """Stages of a few steps, written for the tests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_stages(folder / "stages")
        seconds = assert_complete(run(paths, folder / "alone"))
        struck = kill_and_go_on(paths, folder / "killed", seconds, kills, seed)
        assert_same(folder / "killed", folder / "alone")
    print(f"{struck} of {kills} kills struck; weights, moments, metrics and timeline are equal to the bit")


def kill_demo(kills: int, seed: int, finished: Path) -> None:
    """The demo's command: its launcher and both ranks killed, so many times."""
    root, chance = finished.with_name(f"{finished.name}-killed"), random.Random(seed)
    total = _steps(finished)
    for number, moment in enumerate(sorted(chance.uniform(0, total) for _ in range(kills))):
        with _start(root) as launcher:
            while _steps(root) < moment and launcher.poll() is None:
                time.sleep(0.1)
            time.sleep(chance.uniform(0, 5))  # into evaluations, checkpoints and hand-overs as well
            assert launcher.poll() is None, "the run ended by itself"
            for process in [launcher.pid, *_descendants(launcher.pid)]:
                os.kill(process, signal.SIGKILL)
        print(f"\nKill {number + 1} of {kills}: after {_steps(root)} of {total} steps\n", flush=True)
    with _start(root) as launcher:
        assert launcher.wait() == 0
    assert_same(root, finished, STAGES)
    print(f"{kills} kills in {total} steps; weights, moments, metrics and timeline are equal to the bit")


def _start(root: Path) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "aria_train.elastic", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command = [*launcher, "-m", "aria_train", "curriculum", *CONFIGS, f"train.run_dir={root}"]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _steps(root: Path) -> int:
    """Steps of all stages in their metrics: whole lines, since a kill or a step may be amid the last."""
    return sum(file.read_bytes().count(b"\n") for file in root.glob("*/metrics.jsonl"))


def _descendants(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, above in pairs if above == parent]
    return found[1:]


if __name__ == "__main__":
    kills, seed = (int(number) for number in [*sys.argv[1:3], "10", "0"][:2])
    if sys.argv[3:]:
        kill_demo(kills, seed, Path(sys.argv[3]))
    else:
        kill_tiny_stages(kills, seed)
