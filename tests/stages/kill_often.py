"""Four stages on two ranks, killed at random moments and started again, against the same stages left alone.

python -m tests.stages.kill_often 10 0              # stages that take seconds; the test suite kills fewer times
python -m tests.stages.kill_often 10 0 runs/demo    # those of a finished `make demo`, under its own command
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from demo.run import CONFIGS
from demo.summary import STAGES
from faults.launcher import launched, log_of, steps, workers
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
    arguments = ["curriculum", *CONFIGS, f"train.run_dir={root}"]
    total = _steps(finished)
    for number, moment in enumerate(sorted(chance.uniform(0, total) for _ in range(kills))):
        with launched("aria_train", arguments, root) as launcher:
            while _steps(root) < moment and launcher.poll() is None:
                time.sleep(0.1)
            time.sleep(chance.uniform(0, 5))  # into evaluations, checkpoints and hand-overs as well
            assert launcher.poll() is None, log_of(root).read_text()[-3000:]
            for process in [launcher.pid, *workers(launcher.pid)]:
                os.kill(process, signal.SIGKILL)
            launcher.wait()
        print(f"kill {number + 1} of {kills}: after {_steps(root)} of {total} steps", flush=True)
    with launched("aria_train", arguments, root) as launcher:
        assert launcher.wait() == 0, log_of(root).read_text()[-3000:]
    assert_same(root, finished, STAGES)
    print(f"{kills} kills in {total} steps; weights, moments, metrics and timeline are equal to the bit")


def _steps(root: Path) -> int:
    return sum(steps(root / name) for name in STAGES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="tests.stages.kill_often", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kills", type=int, nargs="?", default=10)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("finished", type=Path, nargs="?", help="run root of a finished demo")
    given = parser.parse_args()
    if given.finished:
        kill_demo(given.kills, given.seed, given.finished)
    else:
        kill_tiny_stages(given.kills, given.seed)
