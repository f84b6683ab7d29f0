"""A run under the project's launcher, some of whose workers are killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def run_and_kill(arguments: list[str], run_dir: Path, bench: Any, config: Any, kills: int) -> int:
    """Kills one worker after another, each when the run has come further; returns the most steps that one cost."""
    chance, worst = random.Random(1), 0
    with launched("aria_train", arguments, run_dir) as launcher:
        for number in range(kills):
            _wait(lambda: steps(run_dir) >= 8 + 10 * number, launcher)  # noqa: B023
            os.kill(chance.choice(workers(launcher.pid)), signal.SIGKILL)
            time.sleep(1.0)
            worst = max(worst, bench.steps_lost(config))
        assert launcher.wait(900) == 0, log_of(run_dir).read_text()[-3000:]
    return worst


@contextlib.contextmanager
def launched(
    module: str, arguments: list[str], run_dir: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks of `python -m module` under the launcher, which is ended if it still runs afterwards."""
    command = [sys.executable, "-m", "aria_train.elastic", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"} | dict(variables or {})
    with log_of(run_dir).open("w") as log:
        launcher = subprocess.Popen(
            [*command, "-m", module, *arguments], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            yield launcher
        finally:
            if launcher.poll() is None:
                launcher.kill()


def log_of(run_dir: Path) -> Path:
    """What the launcher and its ranks say."""
    return run_dir.parent / "launcher.log"


def steps(run_dir: Path) -> int:
    """Those that the run's record holds: whole lines, for the last one may be being written."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _wait(condition: Any, launcher: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 900
    while not condition():
        assert launcher.poll() is None, "the launcher has ended"
        assert time.monotonic() < end, "no progress"
        time.sleep(0.02)


def workers(pid: int) -> list[int]:
    """The processes that a launcher has started."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = (line.split() for line in listing.splitlines())
    return [int(child) for child, parent in pairs if int(parent) == pid]
