"""What a stage takes over from the one before, and what it leaves behind."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from aria_train.cli import main
from aria_train.config import RunConfig
from aria_train.errors import CheckpointError, ConfigError
from aria_train.model import AriaModel
from aria_train.parallel import checkpoint
from aria_train.parallel.job import orderly_end
from aria_train.stages.curriculum import train_stage
from aria_train.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.stages.recipe import saved_tensors, write_text
from tests.tiny import read_steps, tiny_config, with_values


def train(config: RunConfig) -> None:
    with orderly_end():
        Trainer(config).run()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    source = {"name": "text", "path": write_text(tmp_path / "text", 60, 5, 60)}
    return tiny_config(tmp_path / "first", [source], train={"max_steps": 3, "global_batch_size": 4})


def second(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """A stage that follows `config`'s."""
    run_dir = Path(config.train.run_dir)
    sections = {"train": {}, "checkpoint": {}, **sections}
    sections["train"] = {"run_dir": str(run_dir.parent / "second"), **sections["train"]}
    sections["checkpoint"] = {"init_from": str(run_dir), **sections["checkpoint"]}
    return with_values(config, **sections)


# ---------------------------------------------------------------------------------------------------------------------
# Moments


def moments_at_the_start(config: RunConfig) -> dict[str, torch.Tensor]:
    """Adam's state before the first step."""
    with orderly_end():
        trainer = Trainer(config)
        trainer.loader.close()
        return {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
            for name, t in trainer.state.tensors().items()
            if name.startswith("optimizer.")
        }


def test_moments_are_taken_over_where_asked_for(config: RunConfig) -> None:
    train(config)
    saved = saved_tensors(Path(config.train.run_dir))
    taken = moments_at_the_start(second(config, checkpoint={"init_optimizer": True}))
    afresh = moments_at_the_start(second(config))
    for name in afresh:
        assert torch.equal(taken[name], saved[name]), name
        assert not afresh[name].any(), name
    steps = {name: float(tensor) for name, tensor in taken.items() if name.endswith(".step")}
    assert set(steps.values()) == {3.0}
    assert len(steps) == len(afresh) / 2


def test_adam_goes_on_counting_over_stages_and_interruptions(config: RunConfig, tmp_path: Path) -> None:
    train(config)
    follower = second(config, checkpoint={"init_optimizer": True})
    train(follower)
    whole = saved_tensors(tmp_path / "second")
    assert {float(tensor) for name, tensor in whole.items() if name.endswith(".step")} == {6.0}
    third = second(follower, train={"run_dir": str(tmp_path / "third")}, checkpoint={"init_optimizer": True})
    third.checkpoint.init_from = str(tmp_path / "second")
    assert {float(t) for name, t in moments_at_the_start(third).items() if name.endswith(".step")} == {6.0}
    parts = with_values(follower, train={"run_dir": str(tmp_path / "parts"), "max_steps": 1})
    train(parts)
    train(with_values(parts, train={"max_steps": 3}))
    again = saved_tensors(tmp_path / "parts")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_moments_need_a_checkpoint_that_has_them(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="init_optimizer is true, but checkpoint.init_from names no checkpoint"):
        train(with_values(config, checkpoint={"init_optimizer": True}))
    train(with_values(config, train={"lora": None, "max_steps": 1}))
    stripped = second(config, train={"lora": {"rank": 4}}, checkpoint={"init_optimizer": True})
    with pytest.raises(CheckpointError, match="holds no optimizer moments of what this run trains"):
        train(stripped)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_run_directory_stands_for_the_checkpoints_that_its_run_keeps_elsewhere(
    config: RunConfig, tmp_path: Path, scheme: str
) -> None:
    train(with_values(config, checkpoint={"storage": f"{scheme}{tmp_path / 'store'}"}, train={"max_steps": 1}))
    assert not (tmp_path / "first" / "checkpoints").exists()
    newest = checkpoint.resolve(str(tmp_path / "first"))
    assert str(newest) == f"{scheme}{tmp_path / 'store' / 'checkpoints' / 'step_00000001'}"
    assert checkpoint.resolve(tmp_path / "first").name == newest.name
    follower = second(config, train={"max_steps": 1})
    train(follower)
    assert len(read_steps(follower.train.run_dir)) == 1
    assert main(["eval", "loss", str(tmp_path / "first"), "--data", f"text={tmp_path / 'text'}"]) == 0
    assert (tmp_path / "first" / "report" / "loss_step_00000001.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# RoPE


def first_loss(config: RunConfig, run: str, **sections: dict[str, Any]) -> list[float]:
    run_dir = str(Path(config.train.run_dir).parent / run)
    train(with_values(config, **{**sections, "train": {"run_dir": run_dir, "max_steps": 2}}))
    return [line["loss"] for line in read_steps(run_dir)]


def test_the_rope_base_changes_step_by_step(config: RunConfig) -> None:
    """The first step is that of the old base, the second that of neither."""
    low, high = {"rope_base": 10.0}, {"rope_base": 1e6}
    gradual = {"schedule": {"rope_from": 10.0, "rope_tokens": 10 * config.tokens_per_step}, "model": high}
    old, new = (first_loss(config, name, model=model) for name, model in (("old", low), ("new", high)))
    between = first_loss(config, "between", **gradual)
    assert between[0] == old[0] != new[0]
    assert between[1] not in (old[1], new[1])


def test_the_schedule_is_geometric_over_tokens(config: RunConfig) -> None:
    scheduled = with_values(config, model={"rope_base": 5e6}, schedule={"rope_from": 1e5, "rope_tokens": 1000})
    assert [scheduled.rope_base_at(tokens) for tokens in (0, 1000, 10**9)] == [1e5, 5e6, 5e6]
    assert scheduled.rope_base_at(500) == pytest.approx((1e5 * 5e6) ** 0.5)
    assert config.rope_base_at(0) == config.model.rope_base
    with pytest.raises(ValueError, match="rope_from and rope_tokens go together"):
        with_values(config, schedule={"rope_from": 1e5})


def test_an_export_has_the_base_that_the_weights_stand_at(config: RunConfig, tmp_path: Path) -> None:
    ramp = {"rope_from": 1e5, "rope_tokens": 10 * config.tokens_per_step}
    train(with_values(config, model={"rope_base": 5e6}, schedule=ramp))
    assert main(["export", config.train.run_dir, str(tmp_path / "hf")]) == 0
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    text = exported.get("text_config", exported)
    assert text["rope_theta"] == pytest.approx(1e5 * 50**0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def what_stays(config: RunConfig, follower: RunConfig) -> tuple[int, int, int]:
    """Models alive, and process groups, after a stage; models after the next."""
    train_stage(config)
    alive = _models()
    groups = len(dist.distributed_c10d._world.pg_map)
    train_stage(follower)
    return alive, groups, _models()


def _models() -> int:
    return sum(isinstance(thing, AriaModel) for thing in gc.get_objects())


@pytest.mark.distributed
def test_a_finished_stage_leaves_no_memory_and_no_groups_behind(config: RunConfig) -> None:
    spread = with_values(config, parallel={"expert_parallel_size": 2})
    assert run_distributed(what_stays, 2, spread, second(spread)) == [(0, 1, 0)] * 2
