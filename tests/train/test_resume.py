"""Killed at any moment and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from aria_train.config import RunConfig
from aria_train.data.loader import Loader
from aria_train.parallel import checkpoint
from tests.distributed import RankFailure, launch, run_distributed
from tests.tiny import read_steps, tiny_config, unequal_corpora, with_values

pytestmark = pytest.mark.distributed

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


# ---------------------------------------------------------------------------------------------------------------------
# What ranks do


def run(config: RunConfig) -> None:
    from aria_train.train.session import run_stage

    run_stage(config)


def run_until_killed(config: RunConfig, rank: int, moment: str, count: int) -> int:
    """Runs a stage, but one rank is killed: in the middle of step `count` (moment `step`), or just before it touches
    the run directory for the `count`-th time (`file`). Returns how often this rank touched it."""
    touched = 0
    dying = os.environ["RANK"] == str(rank)
    inside = os.path.abspath(config.train.run_dir)

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in FILE_EVENTS and str(args[0]).startswith(inside):
            touched += 1
            if dying and moment == "file" and touched == count:
                os.kill(os.getpid(), signal.SIGKILL)

    if moment == "step" and dying:
        _kill_in_step(count)
    sys.addaudithook(on_event)
    run(config)
    return touched


def _kill_in_step(step: int) -> None:
    """After the backward passes and before the weights move."""
    from aria_train.train import trainer

    clip, remaining = trainer.clip_gradients, step

    def clip_or_die(*args: Any) -> Any:
        nonlocal remaining
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        remaining -= 1
        return clip(*args)

    trainer.clip_gradients = clip_or_die


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


@dataclass
class Result:
    steps: list[dict[str, Any]]
    evaluations: str
    step: int
    tensors: dict[str, Tensor]
    """Weights, moments, and what else is saved."""


def result(config: RunConfig) -> Result:
    run_dir = Path(config.train.run_dir)
    newest, _ = checkpoint.latest(run_dir)
    assert newest is not None
    evaluations = run_dir / "evaluations.jsonl"
    return Result(
        read_steps(run_dir),
        evaluations.read_text() if evaluations.exists() else "",
        newest.step,
        saved_tensors(newest.folder),
    )


def saved_tensors(folder: Any) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


def assert_bitwise_equal(found: Result, wanted: Result) -> None:
    assert found.steps == wanted.steps
    assert found.evaluations == wanted.evaluations
    assert found.step == wanted.step
    assert found.tensors.keys() == wanted.tensors.keys()
    differing = [name for name, tensor in wanted.tensors.items() if not torch.equal(found.tensors[name], tensor)]
    assert not differing


# ---------------------------------------------------------------------------------------------------------------------
# Runs to compare with


def short_run(run_dir: Path, sources: list[dict[str, Any]], expert_ranks: int) -> RunConfig:
    """5 steps, evaluated and saved after the second, the fourth and the last."""
    config = tiny_config(
        run_dir,
        sources,
        parallel={"expert_parallel_size": expert_ranks},
        checkpoint={"interval_steps": 2, "keep_last": 2},
    )
    return with_values(
        config,
        model={"num_layers": 1},
        data={"validation": sources[:1]},
        train={"global_batch_size": 4, "eval_interval_steps": 2, "eval_windows": 3},
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return unequal_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def uninterrupted(sources: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Ranks -> (what the run left, how often each rank touched the run directory)."""
    runs = {}
    for ranks in (1, 2):
        config = short_run(tmp_path_factory.mktemp("uninterrupted"), sources, ranks)
        touched = run_distributed(run_until_killed, ranks, config, 0, "never", 0)
        runs[ranks] = result(config), touched
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Tests


@pytest.mark.parametrize(("ranks", "rank", "step"), [(1, 0, n) for n in range(5)] + [(2, 0, 2), (2, 1, 3)])
def test_killed_in_a_step(ranks: int, rank: int, step: int, uninterrupted: Any, sources: Any, tmp_path: Path) -> None:
    config = short_run(tmp_path, sources, ranks)
    assert_killed(launch(run_until_killed, ranks, config, rank, "step", step)[rank])
    run_distributed(run, ranks, config)
    assert_bitwise_equal(result(config), uninterrupted[ranks][0])


@pytest.mark.parametrize(("ranks", "rank", "share"), [(1, 0, n / 8) for n in range(9)] + [(2, 0, 0.4), (2, 1, 0.9)])
def test_killed_while_at_files(
    ranks: int, rank: int, share: float, uninterrupted: Any, sources: Any, tmp_path: Path
) -> None:
    """At evenly spaced moments of all those when the run directory changes: many are within savings."""
    wanted, touched = uninterrupted[ranks]
    assert touched[rank] > 5
    config = short_run(tmp_path, sources, ranks)
    count = 1 + round(share * (touched[rank] - 1))
    assert_killed(launch(run_until_killed, ranks, config, rank, "file", count)[rank])
    run_distributed(run, ranks, config)
    assert_bitwise_equal(result(config), wanted)


def assert_killed(outcome: Any) -> None:
    assert isinstance(outcome, RankFailure)
    assert "SIGKILL" in str(outcome)


def test_killed_twice_and_with_other_micro_batches(uninterrupted: Any, sources: Any, tmp_path: Path) -> None:
    """How windows are cut into micro-batches may change from start to start; then losses agree, though not bitwise."""
    config = short_run(tmp_path, sources, 1)
    launch(run_until_killed, 1, config, 0, "step", 2)
    launch(run_until_killed, 1, with_values(config, train={"micro_batch_size": 4}), 0, "step", 1)
    run_distributed(run, 1, config)
    assert_close_losses(read_steps(tmp_path), uninterrupted[1][0].steps)


def test_saving_right_after_an_evaluation_saves_the_optimizer(uninterrupted: Any, sources: Any, tmp_path: Path) -> None:
    """Evaluating leaves no trace: not in the metrics, the weights, or the moments."""
    config = with_values(short_run(tmp_path, sources, 1), train={"eval_interval_steps": 0})
    run_distributed(run, 1, config)
    found, wanted = result(config), uninterrupted[1][0]
    found.evaluations = wanted.evaluations
    assert_bitwise_equal(found, wanted)
    assert all(moment.any() for name, moment in wanted.tensors.items() if name.endswith("exp_avg"))


LAYOUTS = {
    "4 ranks": (4, 1, None),
    "EP 4": (4, 4, None),
    "2 replicas of EP 2": (4, 2, 2),
    "3 ranks": (3, 1, None),
    "EP 2": (2, 2, None),
    "2 ranks": (2, 1, None),
    "alone": (1, 1, None),
}


@pytest.fixture(scope="module")
def halfway(sources: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Any]:
    """EP 2 x ZeRO 2: a run with a checkpoint after 2 of 5 steps, and the metrics of the whole run."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), sources, parallel={"expert_parallel_size": 2})
    config = with_values(config, checkpoint={"interval_steps": 2, "keep_last": 5})
    run_distributed(run, 4, config)
    steps = read_steps(config.train.run_dir)
    for step in (4, 5):
        shutil.rmtree(Path(config.train.run_dir) / "checkpoints" / f"step_{step:08d}")
    return config, steps


def train_rest(config: RunConfig, layouts: list[tuple[Path, int, int | None]]) -> None:
    """Goes on with copies of a run at several layouts of this many ranks."""
    from aria_train.train.trainer import Trainer

    for run_dir, expert, group in layouts:
        here = with_values(
            config,
            parallel={"expert_parallel_size": expert, "zero_group_size": group},
            train={"run_dir": str(run_dir)},
        )
        Trainer(here).run()


@pytest.fixture(scope="module")
def continued(halfway: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    config, _ = halfway
    folder = tmp_path_factory.mktemp("continued")
    for ranks in (1, 2, 3, 4):
        layouts = [(folder / name, expert, group) for name, (n, expert, group) in LAYOUTS.items() if n == ranks]
        for run_dir, _, _ in layouts:
            shutil.copytree(config.train.run_dir, run_dir)
        run_distributed(train_rest, ranks, config, layouts)
    return {name: read_steps(folder / name) for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_goes_on_at_another_layout(name: str, continued: Any, halfway: Any) -> None:
    """From EP 2 x ZeRO 2. Losses by source agree too, so the windows are the same."""
    assert_close_losses(continued[name], halfway[1])


def assert_close_losses(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for line, other in zip(found, wanted, strict=True):
        assert line.keys() == other.keys()
        for name in line:
            if "loss" in name or name == "grad_norm":
                assert line[name] == pytest.approx(other[name], rel=1e-5), (line["step"], name)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("start_step", [0, 3])
def test_the_data_order_is_the_same_at_any_layout(world_size: int, start_step: int, sources: Any) -> None:
    config = tiny_config(Path("unused"), sources)
    wanted = documents(config, 0, 1, 0)[start_step:]
    found = [documents(config, rank, world_size, start_step) for rank in range(world_size)]
    for step, whole in enumerate(wanted):
        assert [document for rank in found for document in rank[step]] == whole


def documents(config: RunConfig, rank: int, world_size: int, start_step: int) -> list[list[list[int]]]:
    """Steps up to the fifth -> documents of the rank's windows."""
    with Loader(config, rank, world_size, start_step) as loader:
        return [
            [part.tolist() for batch in next(loader) for part in batch.token_ids.split(batch.starts.diff().tolist())]
            for _ in range(5 - start_step)
        ]
