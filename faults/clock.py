"""A run whose wall clock jumps, as it does when NTP corrects it: ahead, behind, by a year.

The launcher and its ranks ask `site/sitecustomize.py` for the time of day. (Not `libfaketime`, under which Python's
`time.sleep` fails: of version 0.9.10, `clock_nanosleep` takes no monotonic clock.) The first rank sets it, so that it
jumps between two steps: `python -m faults.clock train CONFIG` is `aria-train` with jumps.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from aria_train.parallel import checkpoint
from faults.launcher import launched, log_of
from faults.scenarios import INTERVAL, STEPS, Bench, Row, steps

JUMPS = {4: 3600, 9: -3600, 17: 365 * 86_400, 24: 0}
"""Step -> seconds that the clock is ahead of the true time from then on."""
KILLED_IN = 13
"""Step in which a rank dies, so that all start again under a clock that was set back."""
_SITE = Path(__file__).resolve().parent / "site"
_OFFSET = "FAULTS_CLOCK_OFFSET"


def clock_jumps(bench: Bench) -> Row:
    often = {"interval_minutes": 30, "keep_last": STEPS}
    config = bench.config("clock", checkpoint=often, guard={"hang_minutes": 30})
    run_dir, offset = Path(config.train.run_dir), bench.folder / "clock.offset"
    offset.write_text("0")
    faked = {"PYTHONPATH": f"{_SITE}{os.pathsep}{os.getcwd()}", _OFFSET: str(offset)}
    with launched("faults.clock", bench.arguments(config), run_dir, faked) as launcher:
        assert launcher.wait(900) == 0, log_of(run_dir).read_text()[-3000:]
    resumed = re.findall(r"resumed from \S*step_(\d+)", log_of(run_dir).read_text())
    assert len(resumed) == 1, resumed
    lost = KILLED_IN - 1 - int(resumed[0])
    bench.assert_same_end(config)
    shelf = [entry.folder.name for entry in checkpoint.entries(run_dir)]
    assert shelf == [f"step_{step:08d}" for step in range(INTERVAL, STEPS + 1, INTERVAL)], shelf
    seconds = [json.loads(line)["step_seconds"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert 0 < min(seconds) <= max(seconds) < 600, seconds
    return Row(
        "clock jumps",
        "Python's clock in the launcher and its ranks: an hour ahead, two hours back, a year ahead and back again; a "
        "SIGKILL and a restart while it is behind; with `interval_minutes: 30` and `hang_minutes: 30`",
        len(JUMPS),
        f"nothing by the jumps: no save more or less, no alarm; {steps(lost)} by the SIGKILL",
    )


def main(arguments: list[str]) -> int:
    """One rank's life."""
    from aria_train.cli import main as aria_train
    from aria_train.train.trainer import Trainer

    take_step = Trainer._step

    def with_jump(self: Any, batches: Any) -> Any:
        step, killed = self.state.step + 1, Path(self.config.train.run_dir, "killed")
        if step in JUMPS and self.is_main:
            _set_clock(JUMPS[step])
        if step == KILLED_IN and not self.is_main and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(self, batches)

    Trainer._step = with_jump  # type: ignore[method-assign]
    return aria_train(arguments)


def _set_clock(ahead: int) -> None:
    offset = Path(os.environ[_OFFSET])
    jump, before = ahead - int(offset.read_text()), time.time()
    aside = offset.with_suffix(".new")
    aside.write_text(str(ahead))
    aside.rename(offset)
    assert abs(time.time() - before - jump) < 30, "the clock did not jump"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
