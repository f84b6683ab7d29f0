"""SIGKILLs at random moments, of either rank or both, over runs that are started again each time."""

from __future__ import annotations

import random
import time

from faults.scenarios import STEPS, Bench, Row
from tests.distributed import RankFailure


def killed_at_random(bench: Bench, kills: int = 100) -> Row:
    """Every run that comes to its end must be bitwise the one left alone."""
    chance, struck, started, completed, worst = random.Random(0), 0, 0, 0, 0
    config = bench.config("random-0", train={"max_steps": STEPS})
    began = time.monotonic()
    bench.live(bench.config("timing"))
    longest = time.monotonic() - began
    newest = 0
    while struck < kills:
        outcomes = bench.live(config, ("at random", chance.randrange(2**32), longest))
        started += 1
        if any(isinstance(outcome, RankFailure) for outcome in outcomes):
            assert "SIGKILL" in str(outcomes), outcomes
            struck += 1
            kept = bench.newest(config)
            assert kept >= newest, "a complete checkpoint was lost"
            newest = kept
            worst = max(worst, bench.steps_lost(config))
        else:
            bench.assert_same_end(config)
            completed, newest = completed + 1, 0
            config = bench.config(f"random-{completed}")
    bench.finish(config)
    return Row(
        f"{kills} random SIGKILLs",
        f"of either rank or both, at random moments of {started} starts; {completed + 1} runs came to their end",
        struck,
        f"at most {worst} steps per kill, those since the last complete checkpoint; final parameters, moments and "
        "metrics bitwise those of the undisturbed run",
    )
