"""The wall clock may jump, when NTP corrects it: no step, save or file depends on it."""

from __future__ import annotations

import ast
import itertools
import time
from pathlib import Path

import aria_train
from aria_train.config import RunConfig
from aria_train.parallel import checkpoint
from tests.distributed import run_distributed
from tests.ops.faults import assert_same, run, saved_tensors
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values

WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}


def test_nothing_asks_for_the_time_of_day() -> None:
    package = Path(aria_train.__file__).parent
    calls = [
        (file.name, node.lineno, ast.unparse(node.func))
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert len(calls) > 1000
    assert [call for call in calls if call[2].removeprefix("datetime.") in WALL_CLOCKS] == []


def run_under_jumps(config: RunConfig) -> int:
    """Every question for the time of day is answered with two days more, or a day less, than the one before."""
    now, jumps, asked = time.time(), itertools.cycle((172_800.0, -86_400.0)), 0

    def jumping() -> float:
        nonlocal now, asked
        now += next(jumps)
        asked += 1
        return now

    time.time = jumping
    assert time.time() != time.time()
    run(config)
    return asked


def test_a_run_under_a_jumping_clock_is_the_same_run(tmp_path: Path) -> None:
    """Also where saves by the clock and the watchdog would act on a day that seems to have passed."""
    base = tiny_config(tmp_path / "alone", unequal_corpora(tmp_path / "corpora"), parallel={"expert_parallel_size": 2})
    base = with_values(base, checkpoint={"interval_minutes": 60, "keep_last": 9}, guard={"hang_minutes": 1})
    jumped = with_values(base, train={"run_dir": str(tmp_path / "jumped")})
    run_distributed(run, 2, base)
    run_distributed(run_under_jumps, 2, jumped)
    for config in (base, jumped):
        assert [entry.folder.name for entry in checkpoint.entries(Path(config.train.run_dir))] == ["step_00000005"]
    ends = [checkpoint.folder_of_step(Path(config.train.run_dir), 5) for config in (base, jumped)]
    assert_same(*map(saved_tensors, ends))
    assert read_steps(base.train.run_dir) == read_steps(jumped.train.run_dir)
