"""Bad batches change nothing, on any rank; too many of them bring back earlier weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from aria_train.config import GuardConfig, RunConfig
from aria_train.parallel import checkpoint
from aria_train.train.guard import Guard, GuardState
from tests.distributed import RankFailure, launch, run_distributed
from tests.ops.faults import (
    assert_same,
    poison,
    run,
    run_never_seeing,
    run_with_bad_steps,
    saved_tensors,
)
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values

NAN = math.nan


def judged(norms: list[float], config: GuardConfig, loss: float = 1.0) -> list[str | None]:
    guard = Guard(config, GuardState())
    return [guard.judge(loss, norm) for norm in norms]


def test_what_is_not_finite_is_always_skipped() -> None:
    guard = Guard(GuardConfig(), GuardState())
    assert guard.judge(NAN, 1.0) == "the loss is nan"
    assert guard.judge(1.0, math.inf) == "the gradient norm is inf"
    assert guard.judge(1.0, 1e30) is None
    assert guard.state == GuardState(skipped=2, streak=0)


def test_a_spike_is_k_sigmas_above_a_full_window_of_updates() -> None:
    config = GuardConfig(spike_sigmas=3, spike_window=4)
    # Window 1, 2, 1, 2: mean 1.5, sigma 0.5.
    assert judged([100.0, 1, 2, 1], config) == [None] * 4
    assert judged([1, 2, 1, 2, 2.9], config) == [None] * 5
    *_, verdict = judged([1, 2, 1, 2, 3.1], config)
    assert verdict == "the gradient norm 3.1 is 3.2 sigmas above the last 4"
    # A skipped norm does not widen the window.
    assert judged([1, 2, 1, 2, 9, 9, 9], config)[4:] == [judged([1, 2, 1, 2, 9], config)[4]] * 3


def test_a_rollback_is_due_after_so_many_in_a_row() -> None:
    guard = Guard(GuardConfig(rollback_after=2), GuardState())
    due = []
    for norm in (NAN, 1.0, NAN, NAN):
        guard.judge(1.0, norm)
        due.append(guard.wants_rollback)
    assert due == [False, False, False, True]
    guard.rolled_back(step=4, to_step=1)
    assert guard.state == GuardState(skipped=6, streak=0, rolled_back_at=4)
    assert not guard.wants_rollback


def config_of(folder: Path, name: str, **sections: Any) -> RunConfig:
    sections = {"train": {}, "checkpoint": {"interval_steps": 3, "keep_last": 99}, "guard": {}} | sections
    base = tiny_config(folder / name, unequal_corpora(folder / "corpora"))
    values = {"train": {"max_steps": 9, **sections.pop("train")}}
    return with_values(base, **values, **sections)


def final(config: RunConfig) -> dict[str, Any]:
    newest, _ = checkpoint.latest(Path(config.train.run_dir))
    assert newest is not None
    return saved_tensors(newest.folder)


def skips(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(config.train.run_dir, "skipped.jsonl").read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.parametrize("expert_ranks", [1, 2])
def test_a_run_after_a_bad_batch_is_one_that_never_saw_it(tmp_path: Path, expert_ranks: int) -> None:
    layout = {"parallel": {"expert_parallel_size": expert_ranks}}
    bad = config_of(tmp_path, "bad", **layout)
    run_distributed(run_with_bad_steps, 2, bad, {4: NAN}, 1)
    unseen = config_of(tmp_path, "unseen", **layout)
    run_distributed(run_never_seeing, 2, unseen, {4: 0})
    assert_same(final(bad), final(unseen))
    steps, expected = read_steps(bad.train.run_dir), read_steps(unseen.train.run_dir)
    assert steps[:3] + steps[4:] == expected[:3] + expected[4:]
    assert steps[3]["grad_norm"] is None
    assert steps[3]["skipped"] == "the gradient norm is nan"
    assert skips(bad) == [
        {
            "stage": "tiny", "step": 4, "reason": "the gradient norm is nan", "windows": [36, 48],
            "loss": steps[3]["loss"], "grad_norm": None,
        }
    ]  # fmt: skip


def tensors_around_bad_steps(config: RunConfig) -> list[bool]:
    """For each step, whether it left every tensor of this rank's state as it was."""
    import torch

    from aria_train.train.trainer import Trainer

    poison({2: NAN, 3: math.inf, 4: 1e6}, 0)
    trainer = Trainer(config)
    same = []
    for _ in range(5):
        before = {n: t.to_local().clone() if hasattr(t, "to_local") else t.clone() for n, t in local(trainer)}
        trainer.advance(next(trainer.loader))
        after = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in local(trainer)}
        same.append(all(torch.equal(before[name], after[name]) for name in before))
    trainer.close()
    return same


def local(trainer: Any) -> list[tuple[str, Any]]:
    steps = [(f"step {i}", s["step"]) for i, s in enumerate(trainer.state.optimizer.state.values())]
    return [*trainer.state.tensors().items(), *steps]


@pytest.mark.distributed
def test_weights_and_moments_stay_to_the_bit_on_every_rank(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", guard={"spike_sigmas": 4, "spike_window": 2})
    # Step 4 is no spike yet: its window holds the norm of step 1 alone.
    assert run_distributed(tensors_around_bad_steps, 2, config) == [[False, True, True, False, False]] * 2


@pytest.mark.distributed
def test_after_bad_steps_in_a_row_the_run_goes_back_and_skips_the_data(tmp_path: Path) -> None:
    guard = {"guard": {"rollback_after": 2}}
    bad = config_of(tmp_path, "bad", **guard)
    run_distributed(run_with_bad_steps, 2, bad, {5: NAN, 6: NAN}, 0)
    unseen = config_of(tmp_path, "unseen", **guard)
    run_distributed(run_never_seeing, 2, unseen, {5: 0, 6: 3})
    assert_same(final(bad), final(unseen))
    told = skips(bad)
    assert [line["step"] for line in told] == [5, 6, 6]
    assert told[2]["windows"] == [36, 72]
    assert told[2]["reason"].startswith("rolled back to the weights of ")
    manifest = checkpoint.read_manifest(checkpoint.folder_of_step(Path(bad.train.run_dir), 9))
    assert manifest.guard["skipped"] == 3
    assert manifest.updates == 6


def run_until_step(config: RunConfig, factors: dict[int, float], last: int) -> None:
    """Like run_with_bad_steps, but killed in the step after `last`."""
    import os
    import signal

    from aria_train.train import trainer

    poison(factors, 0)
    report = trainer.Trainer._step

    def step_or_die(self: Any, batches: Any) -> Any:
        if self.state.step == last:
            self.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return report(self, batches)

    trainer.Trainer._step = step_or_die  # type: ignore[method-assign]
    run(config)


@pytest.mark.distributed
@pytest.mark.parametrize("last", [5, 7])
def test_a_run_killed_amid_bad_steps_decides_the_same_again(tmp_path: Path, last: int) -> None:
    """Killed after the first bad step, and after the rollback."""
    guard = {"guard": {"rollback_after": 2, "spike_sigmas": 6, "spike_window": 2}}
    factors = {5: NAN, 6: 1e4}
    whole = config_of(tmp_path, "whole", **guard)
    run_distributed(run_with_bad_steps, 2, whole, factors, 0)
    assert [line["step"] for line in skips(whole)] == [5, 6, 6]
    killed = config_of(tmp_path, "killed", **guard)
    outcomes = launch(run_until_step, 2, killed, factors, last)
    assert all(isinstance(outcome, RankFailure) for outcome in outcomes)
    run_distributed(run_with_bad_steps, 2, killed, factors, 0)
    assert_same(final(killed), final(whole))
    assert read_steps(killed.train.run_dir) == read_steps(whole.train.run_dir)
    strip = [{k: v for k, v in line.items() if k != "reason"} for line in skips(killed)]
    assert strip == [{k: v for k, v in line.items() if k != "reason"} for line in skips(whole)]


@pytest.mark.distributed
def test_a_run_that_cannot_be_helped_says_so(tmp_path: Path) -> None:
    always = dict.fromkeys(range(1, 10), NAN)
    first, _ = launch(run_with_bad_steps, 2, config_of(tmp_path, "new", guard={"rollback_after": 2}), always, 0)
    assert "DivergenceError: steps 1 to 2 were all skipped, and there is no good checkpoint" in str(first)
    late = dict.fromkeys(range(5, 10), NAN)
    first, _ = launch(run_with_bad_steps, 2, config_of(tmp_path, "old", guard={"rollback_after": 2}), late, 0)
    assert "steps 7 to 8 were all skipped, right after the rollback at step 6" in str(first)


def replay(config: RunConfig, factors: dict[int, float], step: int) -> str:
    import contextlib
    import io

    from aria_train.train.replay import replay_step

    poison(factors, 0)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        replay_step(config, step)
    return said.getvalue()


@pytest.mark.distributed
def test_a_skipped_step_can_be_replayed(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run")
    factors = {5: 1e4, 8: NAN}
    config = with_values(config, guard={"spike_sigmas": 6, "spike_window": 2})
    run_distributed(run_with_bad_steps, 2, config, factors, 0)
    before = {path: path.read_bytes() for path in Path(config.train.run_dir).rglob("*") if path.is_file()}
    said, silent = run_distributed(replay, 2, config, factors, 5)
    after = {path: path.read_bytes() for path in Path(config.train.run_dir).rglob("*") if path.is_file()}
    assert before == after
    assert not silent
    assert "retracing" in said
    result = json.loads(said.splitlines()[-1])
    recorded = read_steps(config.train.run_dir)[4]
    assert result["metrics"]["skipped"] == recorded["skipped"]
    assert result["metrics"]["grad_norm"] == recorded["grad_norm"]
    windows = result["windows"]
    assert sorted(window["window"] for window in windows) == list(range(48, 60))
    mean = sum(w["loss"] * w["targets"] for w in windows) / sum(w["targets"] for w in windows)
    assert mean == pytest.approx(recorded["loss"], rel=1e-5)
